"""The run report, made from a made-up run folder."""

import base64
import builtins
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from topwork.common.errors import RequestError
from topwork.reporting.curves import curves, png_bytes, series, small_chart, smoothed, svg_bytes
from topwork.reporting.differences import differences
from topwork.reporting.page import ReportPaths, render
from topwork.reporting.readers import read_metrics, read_run
from topwork.run.report import report as write_report

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x.png>"
NOTE = "validation loss rises while training loss falls: overfitting since step 8"
OPTIONAL = {
    "recipe.yaml": 'id="configuration"',
    "result.json": 'id="parameters"',
    "provenance.json": 'id="provenance"',
    "evaluation.json": 'id="scores"',
}


def train(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.2, "tokens": 1980,
        "learned_tokens": 700, "tokens_per_second": 412.0, "seconds": 4.8, "epoch": step / 6,
    }  # fmt: skip


def evaluated(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": loss, "perplexity": 6.7}


def write_lines(folder: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
    return path


def result() -> dict[str, Any]:
    return {
        "steps": 12, "seconds": 301.2, "tokens": 140000, "tokens_per_second": 465.1, "peak_memory_bytes": 3 * 2**29,
        "base_weights_bytes": 107 * 2**20, "base_held_as": "210 layers in nf4, the rest in bfloat16",
        "eval_loss_before": 2.713, "eval_loss_after": 0.412, "best_step": 8, "best_eval_loss": 0.409,
        "stopped": "interrupted", "warnings": ["two rows stand twice"], "data": {"train": {"rows": 1200}},
        "parameters": {
            "trainable": 4884480, "frozen": 134515008, "total": 139399488, "share": 0.035,
            "by_module": [{"name": "q_proj", "modules": 30, "trainable": 552960}],
        },
    }  # fmt: skip


def evaluation() -> dict[str, Any]:
    def sample(before: str, after: str, correct: bool) -> dict[str, Any]:
        reference = '{"intent":"refund","item":"lamp"}'
        return {
            "prompt": HOSTILE, "reference": reference, "before": before, "after": after, "correct_before": False,
            "correct_after": correct,
        }  # fmt: skip

    return {
        "rows": 300,
        "before": {"exact_match": 0.0, "json_valid": 0.02, "fields": {"intent": 0.01}, "loss": 2.3},
        "after": {"exact_match": 0.713, "json_valid": 0.997, "fields": {"intent": 0.91}, "loss": 0.4},
        "samples": [
            sample("no idea", '{"intent":"refund","item":"lamp"}', True),
            sample(HOSTILE, '{"intent":"refund","item":"table"}', False),
        ],
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    folder.mkdir()
    records = [train(step, 2.5 / step) for step in range(1, 13)]
    records += [
        evaluated(4, 0.9),
        evaluated(8, 0.409),
        evaluated(12, 0.412),
        {"kind": "note", "step": 12, "text": NOTE},
    ]
    write_lines(folder, records, tail='{"kind": "train", "st')
    (folder / "recipe.yaml").write_text("adapter:\n  method: lora\n  r: 16\n", encoding="utf-8")
    provenance = {"base": {"id": "owner/base-model", "fingerprint": "ab" * 32}, "seed": 0}
    for name, value in (("result", result()), ("provenance", provenance), ("evaluation", evaluation())):
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def page_of(paths: ReportPaths) -> str:
    return paths.html.read_text(encoding="utf-8")


def test_the_page_tells_the_key_figures(run_dir: Path) -> None:
    paths = write_report(run_dir)
    page = page_of(paths)
    assert paths.html == run_dir / "report" / "index.html"
    figures = (
        "2.713", "0.412", "71.3 %", "+71.3", "91.0 %", "465 tokens/s", "1.5 GiB", "107 MiB", "210 layers in nf4",
        "3.5 %", "5 min 01 s", "4,884,480", "552,960", "owner/base-model", "my-run", "best 0.409 at step 8",
    )  # fmt: skip
    for figure in figures:
        assert figure in page, figure
    for note in (NOTE, "two rows stand twice", "The run was stopped after step 12"):
        assert page.index(note) < page.index('id="curves"')


def test_the_page_asks_for_nothing_from_outside(run_dir: Path) -> None:
    page = page_of(write_report(run_dir))
    references = re.findall(r"<[^>]*?\b(?:src|srcset|href|action)\s*=\s*[\"']?([^\"'\s>]+)", page)
    assert references
    assert all(reference.startswith(("data:image/", "#")) for reference in references)
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page
    drawings = [base64.b64decode(text) for text in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert all(b"</svg>" in drawing for drawing in drawings)
    assert len(drawings) == 4 + 3 * 2  # loss: light and dark, wide and narrow; the small ones: light and dark


def test_everything_from_the_run_is_escaped(run_dir: Path) -> None:
    (run_dir / "recipe.yaml").write_text(f'note: "{HOSTILE}"\n', encoding="utf-8")
    write_lines(run_dir, [train(1), train(2), {"kind": "note", "step": 2, "text": HOSTILE}])
    hostile_result = {"warnings": [HOSTILE], "stopped": HOSTILE, "data": {HOSTILE: HOSTILE}}
    (run_dir / "result.json").write_text(json.dumps(hostile_result), encoding="utf-8")
    page = page_of(write_report(run_dir))
    assert "<script" not in page
    assert "<img src=http" not in page
    assert page.count("&lt;script&gt;alert(") >= 7


def test_samples_show_marks_and_differences(run_dir: Path) -> None:
    page = page_of(write_report(run_dir))
    assert page.count("✓ right") == 1
    assert page.count("✗ wrong") == 3
    assert "<del>lamp</del><ins>table</ins>" in page


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_file_leaves_its_section_out(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    page = render(read_run(run_dir))
    assert OPTIONAL[name] not in page
    assert all(mark in page for other, mark in OPTIONAL.items() if other != name)


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    write_lines(tmp_path, [train(1)])
    page = page_of(write_report(tmp_path))
    assert 'id="curves"' in page
    assert "has not finished" in page


def test_odd_values_do_not_break_the_page(run_dir: Path) -> None:
    odd = {"steps": None, "seconds": "long", "parameters": {"by_module": [1, {}]}, "warnings": "text", "data": [1]}
    (run_dir / "result.json").write_text(json.dumps(odd), encoding="utf-8")
    (run_dir / "evaluation.json").write_text('{"after": {"exact_match": null}, "samples": [3, {}]}', encoding="utf-8")
    write_lines(run_dir, [train(1), {"kind": "train", "step": 2, "loss": float("nan")}, {"kind": "eval", "step": 2}])
    assert 'id="curves"' in render(read_run(run_dir))


def test_a_torn_result_is_named_and_left_out(run_dir: Path) -> None:
    (run_dir / "result.json").write_text('{"steps": 12, "sec', encoding="utf-8")
    page = render(read_run(run_dir))
    assert "result.json is not whole JSON" in page
    assert 'id="parameters"' not in page


def test_two_reports_are_the_same_bytes(run_dir: Path) -> None:
    first = write_report(run_dir)
    before = (first.html.read_bytes(), first.curves_png.read_bytes())
    second = write_report(run_dir)
    assert (second.html.read_bytes(), second.curves_png.read_bytes()) == before
    assert sorted(path.name for path in second.html.parent.iterdir()) == [
        "curves.png", "grad_norm.png", "index.html", "learning_rate.png", "tokens_per_second.png",
    ]  # fmt: skip


def test_the_png_is_a_png_of_sane_size(run_dir: Path) -> None:
    content = write_report(run_dir).curves_png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 <= width <= 2000
    assert 500 <= height <= 1200
    assert 10_000 < len(content) < 500_000


@pytest.mark.parametrize("content", [None, "", '{"kind": "note", "step": 1, "text": "x"}\n', '{"kind": "tr'])
def test_no_metrics_is_a_wrong_request(run_dir: Path, content: str | None) -> None:
    metrics = run_dir / "metrics.jsonl"
    metrics.unlink()
    if content is not None:
        metrics.write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=r"metrics|measurement"):
        write_report(run_dir)
    assert not (run_dir / "report").exists()


def test_no_folder_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no run folder at"):
        write_report(tmp_path / "absent")


def test_matplotlib_missing_tells_how_to_install_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(RequestError, match=re.escape("pip install matplotlib")):
        write_report(run_dir)
    assert not (run_dir / "report").exists()


def test_a_torn_last_line_is_silent_and_a_torn_middle_is_told(tmp_path: Path) -> None:
    problems: list[str] = []
    whole = json.dumps(train(1)) + "\n"
    path = write_lines(tmp_path, [train(1), train(2)], tail='{"kind": "train", "step": 3, "lo')
    assert [record["step"] for record in read_metrics(path, problems)] == [1, 2]
    assert problems == []
    path.write_bytes(whole.encode() + b'{"kind": "tr\xff{"kind"\n' + json.dumps(train(2)).encode())
    assert [record["step"] for record in read_metrics(path, problems)] == [1, 2]
    assert "the first is 2" in problems[0]


def test_a_resumed_run_counts_its_later_telling(tmp_path: Path) -> None:
    first = [train(1, 9.0), train(2, 9.0), evaluated(2, 8.0), train(3, 9.0), train(4, 9.0), evaluated(4, 8.0)]
    path = write_lines(tmp_path, [*first, train(3, 1.0), train(4, 2.0)])
    records = read_metrics(path)
    assert [(record["kind"], record["step"], record["loss"]) for record in records] == [
        ("train", 1, 9.0), ("train", 2, 9.0), ("eval", 2, 8.0), ("train", 3, 1.0), ("train", 4, 2.0),
    ]  # fmt: skip


def test_curves_draw_all_measurements_and_mark_the_best() -> None:
    records = [train(1, 2.0), train(2, float("nan")), train(3, 1.0), evaluated(1, 2.2), evaluated(3, 1.5)]
    axes = curves(records).axes[0]
    raw, smooth, validation, best = axes.lines[:4]
    assert list(raw.get_xdata()) == [1, 3]
    assert list(smooth.get_ydata()) == [2.0, 1.0]
    assert list(validation.get_ydata()) == [2.2, 1.5]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (3, 1.5)
    assert best.get_label() == "best 1.5 at step 3"


@pytest.mark.parametrize(("last", "scale"), [(0.5, "linear"), (0.01, "log"), (0.0, "linear")])
def test_the_scale_is_logarithmic_where_the_range_demands_it(last: float, scale: str) -> None:
    assert curves([train(1, 2.0), train(2, 1.0), train(3, last)]).axes[0].get_yscale() == scale


def test_long_runs_are_thinned_only_in_the_drawing() -> None:
    records = [train(step) for step in range(1, 5001)]
    figure = small_chart(records, "grad_norm", smooth=True)
    assert len(figure.axes[0].lines[0].get_xdata()) == 1000
    assert len(series(records, "train", "loss").steps) == 5000
    assert len(svg_bytes(figure)) < 200_000
    assert png_bytes(figure).startswith(b"\x89PNG")


def test_smoothing_keeps_lines_straight_and_averages_noise() -> None:
    assert smoothed([]) == []
    assert smoothed([3.0]) == [3.0]
    assert smoothed([2.0] * 30) == [2.0] * 30
    assert smoothed([float(at) for at in range(100)])[:90] == pytest.approx([float(at) for at in range(90)])
    noisy = smoothed([1.0, -1.0] * 100)
    assert max(abs(value) for value in noisy[20:]) < 0.15


def test_differences_join_to_the_answer() -> None:
    pieces = differences("the red lamp broke", "the blue lamp broke today")
    assert "".join(piece.text for piece in pieces if piece.kind != "missing") == "the blue lamp broke today"
    assert [piece.text for piece in pieces if piece.kind == "missing"] == ["red"]
    assert [piece.text for piece in pieces if piece.kind == "extra"] == ["blue", " today"]


@pytest.mark.parametrize("answer", ["", "something else altogether, of another kind", "word " * 2000])
def test_unlike_or_long_answers_carry_no_marks(answer: str) -> None:
    assert [(piece.kind, piece.text) for piece in differences("the red lamp", answer)] == [("same", answer)]
