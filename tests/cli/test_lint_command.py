"""`topwork lint`, as people and programs call it."""

import html
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from run import tiny
from run.fixtures import Said
from topwork.reporting.lint_page import lint_page
from topwork.reporting.lint_text import print_lint, visible
from topwork.run.lint import lint

Command = Callable[..., Said]
Make = Callable[..., Path]
SCRIPT = "<script>alert(1)</script> [red]not red[/red] \x1b[31m"


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[dict[int, Any]], Path]:
    """rows(changes): forty tickets, some of them changed, as a file."""

    def write(changes: dict[int, Any]) -> Path:
        made = tiny.rows(40)
        for number, row in changes.items():
            made[number] = row
        return tiny.write_rows(tmp_path / "rows.jsonl", made)

    return write


def said(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def test_learned_text_stands_in_marks_where_the_output_is_no_terminal(topwork: Command, make_recipe: Make) -> None:
    done = topwork("lint", make_recipe(), "--rows", "train.jsonl:1,train.jsonl:40")
    assert done.code == 0
    assert "read as messages" in done.out
    assert (
        "<|im_start|>user\nOrder 0: my kettle leaks.<|im_end|>\n<|im_start|>assistant\n"
        '⟦{"product": "kettle", "order": 0, "urgent": true}<|im_end|>⟧' in done.out
    )
    assert "train.jsonl:40 (train)" in done.out
    assert re.search(r"^0 errors, 0 warnings, \d+ notices$", done.out, re.MULTILINE)


def test_exit_codes(topwork: Command, make_recipe: Make, rows: Callable[..., Path], tmp_path: Path) -> None:
    assert topwork("lint", make_recipe()).code == 0
    warned = make_recipe(data={"train": str(rows({7: said("My card is 4111111111111111.", "Thanks.")}))})
    assert topwork("lint", warned).code == 0
    assert topwork("lint", warned, "--strict").code == 1
    wrong = make_recipe(data={"train": str(rows({7: said("Is it there?", "")}))})
    done = topwork("lint", wrong)
    assert done.code == 1
    assert "error empty-rows: 1 of 40 rows (2.5%) cannot be used" in done.out
    assert "rows: rows.jsonl:8" in done.out
    assert done.out.rstrip().splitlines()[-1].startswith("1 error, 0 warnings, ")
    assert topwork("lint", make_recipe(), "--set", "data.train=nothing.jsonl").code == 2
    assert topwork("lint", tmp_path / "none.yaml").code == 2
    unknown = topwork("lint", make_recipe(), "--rows", "train.jsonl:400")
    assert unknown.code == 2
    assert "did you mean 'train.jsonl:40'" in unknown.err


def test_json_has_names_that_stay(topwork: Command, make_recipe: Make, rows: Callable[..., Path]) -> None:
    path = make_recipe(data={"train": str(rows({7: said("Is it there?", "")}))})
    done = topwork("lint", path, "--json", "--rows", "2")
    found = json.loads(done.out)
    assert done.code == 1
    assert set(found) == {
        "model", "files", "formats", "limit", "context_length", "trained_parameters", "sides", "lengths", "errors",
        "warnings", "notices", "findings", "shown",
    }  # fmt: skip
    assert found["errors"] == 1
    assert found["limit"] == tiny.CONTEXT
    assert found["findings"][0]["rule"] == "empty-rows"
    assert found["findings"][0]["rows"] == ["rows.jsonl:8"]
    assert set(found["findings"][0]) == {"rule", "severity", "message", "remedy", "rows", "count"}
    train = found["sides"]["train"]
    assert (train["rows"], train["bad_rows"], train["sequences"]) == (40, 1, 39)
    assert sum(found["lengths"]["counts"]) == 39
    shown = found["shown"][0]
    assert "".join(piece["text"] for piece in shown["pieces"] if piece["weight"]) in shown["marked"]
    assert len(found["shown"]) == 2
    assert len(shown["pieces"]) == shown["length"]


def test_a_base_without_weights_is_enough(
    topwork: Command, make_recipe: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    done = topwork("lint", make_recipe(model={"model_name_or_path": str(bare)}), "--json")
    assert done.code == 0
    assert json.loads(done.out)["trained_parameters"] > 0


# Strangers' text


def test_a_page_holds_text_as_text(
    topwork: Command, make_recipe: Make, rows: Callable[..., Path], tmp_path: Path
) -> None:
    train = rows({3: said(SCRIPT, "Not <b>bold</b>."), 4: said(SCRIPT + "2", "Not <b>bold</b> &amp; 2.")})
    page = tmp_path / "page.html"
    done = topwork("lint", make_recipe(data={"train": str(train)}), "--html", page, "--rows", "rows.jsonl:4")
    text = page.read_text("utf-8")
    assert f"page: {page}" in done.out
    assert "<script" not in text
    assert "<b>bold" not in text
    assert "\x1b" not in text
    tokens = re.findall(r'<span class="([^"]*)" title="token \d+, ([^"]*)">(.*?)</span>', text, re.DOTALL)
    assert "<script>alert(1)</script>" in "".join(html.unescape(piece) for _, _, piece in tokens)
    learned = "".join(html.unescape(piece) for kinds, _, piece in tokens if "learned" in kinds.split())
    assert learned == "Not <b>bold</b>.<|im_end|>"
    assert "<svg" in text
    assert "control-characters" in text


def test_a_terminal_gets_no_markup_and_no_control_characters(make_recipe: Make, rows: Callable[..., Path]) -> None:
    recipe = make_recipe(data={"train": str(rows({3: said(SCRIPT, "It is [bold]kept[/bold].\u202e")}))})
    found = lint(recipe, rows=["rows.jsonl:4"]).as_json()
    file = io.StringIO()
    print_lint(found, Console(file=file, force_terminal=True, color_system="standard", width=500))
    bare = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert "<script>alert(1)</script> [red]not red[/red] ␛[31m" in bare
    assert "[bold]kept[/bold].⟨U+202E⟩" in bare
    green = "".join(re.findall(r"\x1b\[[0-9;]*32m(.*?)\x1b\[0m", file.getvalue()))
    assert green.startswith("It is [bold]kept[/bold].⟨U+202E⟩<|im_end|>")


def test_signs_for_what_nobody_sees() -> None:
    assert visible("a\0b\x1b\r\n\t\x7f\x9b\u200b👩‍💻\ud83d") == "a␀b␛␍\n\t␡⟨U+009B⟩⟨U+200B⟩👩‍💻⟨U+D83D⟩"


def test_a_long_row_is_shown_from_both_ends(make_recipe: Make, rows: Callable[..., Path]) -> None:
    train = rows({3: said("word " * 3000, "It ends.")})
    result = lint(make_recipe(data={"train": str(train), "max_length": 400}), rows=["rows.jsonl:4"])
    (row,) = result.shown
    assert row.left_out == row.length - 1600
    assert f"… {row.left_out:,} tokens …" in row.marked
    assert row.marked.endswith("⟦It ends.<|im_end|>⟧")
    assert f"… {row.left_out:,} tokens …" in lint_page(result.as_json(), "recipe.yaml")


def test_what_cutting_takes_away_is_not_shown_as_learned(make_recipe: Make, rows: Callable[..., Path]) -> None:
    train = rows({3: said("Say it.", "word " * 80)})
    recipe = make_recipe(data={"train": str(train), "max_length": 120, "too_long": "truncate"})
    (row,) = lint(recipe, rows=["rows.jsonl:4"]).shown
    assert [piece.cut for piece in row.pieces] == [number >= 120 for number in range(row.length)]
    assert row.length > 120
    assert "<|im_end|>⟧" not in row.marked
