"""metrics.jsonl is strict JSON at every moment; sinks get the same records and cannot end a run."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from topwork.common.errors import RequestError
from topwork.training.metrics import MetricsLog, _shown_numbers, metrics_text, open_sinks, strict_record

NAN, INF = float("nan"), float("inf")


class Recorder:
    """A sink that keeps what it gets, and fails from the `fails_at`-th record on."""

    def __init__(self, fails_at: int = 100) -> None:
        self.records: list[dict[str, Any]] = []
        self.fails_at = fails_at
        self.tries = 0
        self.closed = 0

    def write(self, record: dict[str, Any]) -> None:
        self.tries += 1
        if self.tries >= self.fails_at:
            raise ConnectionError("no network")
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


def lines(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_record_is_one_line_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run") as log:
        log.write("train", 1, {"loss": 0.1 + 0.2, "tokens": 12})
        assert lines(tmp_path / "run") == [{"kind": "train", "step": 1, "loss": 0.1 + 0.2, "tokens": 12}]
        log.write("note", 1, {"text": "grüße\nzwei"})
    assert lines(tmp_path / "run")[1] == {"kind": "note", "step": 1, "text": "grüße\nzwei"}


def test_what_is_not_finite_becomes_null_and_is_named(tmp_path: Path) -> None:
    recorder = Recorder()
    with MetricsLog(tmp_path, sinks=[recorder]) as log:
        log.write("train", 1, {"loss": NAN, "grad_norm": INF, "tokens": 3, "per": {"a": [1.0, -INF]}})
    expected = {"loss": None, "grad_norm": None, "tokens": 3, "per": {"a": [1.0, None]}}
    names = ["loss", "grad_norm", "per.a[1]"]
    assert lines(tmp_path) == [{"kind": "train", "step": 1, **expected, "nonfinite": names}]
    assert recorder.records == lines(tmp_path)
    assert strict_record({"loss": 1.0}) == {"loss": 1.0}


def test_a_fresh_log_starts_empty(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLog(tmp_path) as log:
            log.write("eval", 0, {"loss": 1.0})
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("torn", ["", '{"kind": "train", "step": 2, "lo', '{"kind": "train", "step": 2}'])
def test_resume_cuts_later_steps_and_a_torn_line(tmp_path: Path, torn: str) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write("train", step, {"loss": 1.0 / step})
            log.write("eval", step, {"loss": 2.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    warnings: list[str] = []
    with MetricsLog(tmp_path, resume_step=2, warn=warnings.append) as log:
        log.write("train", 3, {"loss": 9.0})
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)] == [
        ("train", 1),
        ("eval", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
    ]
    assert lines(tmp_path)[-1]["loss"] == 9.0
    assert warnings == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_line_in_the_middle_is_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"kind": "train", "step": 1}\n\x00\x00\n[1]\n{"kind": "train", "step": 2}\n'
    )
    warnings: list[str] = []
    MetricsLog(tmp_path, resume_step=2, warn=warnings.append).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert ["line 2" in warnings[0], "line 3" in warnings[1], len(warnings)] == [True, True, 2]


def test_resume_without_a_file_starts_one(tmp_path: Path) -> None:
    MetricsLog(tmp_path, resume_step=5).close()
    assert lines(tmp_path) == []


def test_a_failing_sink_is_named_once_and_dropped(tmp_path: Path) -> None:
    failing, sound = Recorder(fails_at=2), Recorder()
    warnings: list[str] = []
    with MetricsLog(tmp_path, sinks=[failing, sound], warn=warnings.append) as log:
        for step in range(4):
            log.write("train", step, {"loss": 1.0})
    assert len(warnings) == 1
    assert "Recorder failed" in warnings[0]
    assert "no network" in warnings[0]
    assert (failing.tries, len(failing.records)) == (2, 1)
    assert (len(sound.records), sound.closed, len(lines(tmp_path))) == (4, 1, 4)


def test_unknown_sink_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"'tensorbord', expected tensorboard or wandb; did you mean 'tensorboard'"):
        open_sinks(["tensorbord"], tmp_path, {})


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError, match=rf"pip install {name}"):
        open_sinks([name], tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def scalars(run_dir: Path, name: str = "tensorboard") -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / name))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_files_hold_the_finite_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    with MetricsLog(tmp_path, sinks=open_sinks(["tensorboard"], tmp_path, {"r": 16}), warn=pytest.fail) as log:
        log.write("train", 1, {"loss": 0.5, "tokens": 7, "grad_norm": NAN, "done": True, "text": "x"})
        log.write("eval", 2, {"loss": 0.25})
    assert scalars(tmp_path) == {"train/loss": [(1, 0.5)], "train/tokens": [(1, 7.0)], "eval/loss": [(2, 0.25)]}


def test_tensorboard_after_a_resume_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    for resume_step, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):
        sinks = open_sinks(["tensorboard"], tmp_path, {}, resume_step)
        with MetricsLog(tmp_path, resume_step, sinks, warn=pytest.fail) as log:
            for step in steps:
                log.write("train", step, {"loss": float(step if resume_step is None else 10 * step)})
    assert scalars(tmp_path) == {"train/loss": [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]}


WANDB = ("PROJECT", "NAME", "DIR", "RUN_ID", "RESUME", "ENTITY", "RUN_GROUP", "MODE")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TENSORBOARD_LOGGING_DIR", *(f"WANDB_{each}" for each in WANDB)):
        monkeypatch.delenv(name, raising=False)


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str | None]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def fake_wandb(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[tuple[dict[str, Any], FakeRun]]:
    """Stands for the package: the runs it was asked for, with the options they were asked for with."""
    runs: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**options: Any) -> FakeRun:
        if error is not None:
            raise error
        runs.append((options, FakeRun()))
        return runs[-1][1]

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_gets_the_records_and_a_resume_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake_wandb(monkeypatch)
    for resume_step in (None, 1):
        sinks = open_sinks(["wandb"], tmp_path / "support", {"r": 16}, resume_step)
        with MetricsLog(tmp_path / "support", resume_step, sinks, warn=pytest.fail) as log:
            log.write("train", 2, {"loss": 0.5, "text": "x", "grad_norm": INF})
    options, run = runs[0]
    assert (options["name"], options["config"], options["resume"]) == ("support", {"r": 16}, "allow")
    assert options["id"] == runs[1][0]["id"]
    assert options["reinit"] == "create_new"  # several members of one process have a run each
    assert run.logged == [{"step": 2, "train/loss": 0.5}]
    assert ("*", "step") in run.defined
    assert run.finished


def test_the_environment_goes_before_what_stands_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fake_wandb(monkeypatch)
    said = {
        "WANDB_PROJECT": "mills", "WANDB_NAME": "tuesday", "WANDB_DIR": str(tmp_path), "WANDB_RUN_ID": "abc",
        "WANDB_RESUME": "must", "WANDB_ENTITY": "us", "WANDB_RUN_GROUP": "g", "WANDB_MODE": "offline",
    }  # fmt: skip
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    together = [open_sinks(["wandb"], tmp_path / name, {}, warn=pytest.fail) for name in ("first", "second")]
    for sinks in together:
        sinks[0].close()
    first, second = (options for options, _ in runs)
    asked = ("project", "name", "dir", "id", "resume")
    assert [first[name] for name in asked] == ["mills", "tuesday", str(tmp_path), "abc", "must"]
    assert second["name"] == "tuesday-second"
    assert second["id"] != "abc"
    assert not {"entity", "group", "mode"} & first.keys()  # wandb reads these itself, and an argument would go before
    monkeypatch.delenv("WANDB_RUN_ID")
    open_sinks(["wandb"], tmp_path / "first", {}, 1, warn=pytest.fail)[0].close()
    assert (runs[-1][0]["id"], runs[-1][0]["name"]) == ("abc", "tuesday")
    for name in said:
        monkeypatch.setenv(name, "")
    open_sinks(["wandb"], tmp_path / "third", {}, warn=pytest.fail)[0].close()
    assert [runs[-1][0][name] for name in ("project", "name", "resume")] == ["topwork", "third", "allow"]


def test_tensorboards_place_is_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    run = tmp_path / "support"
    run.mkdir()
    for value in (1.0, 2.0):
        with MetricsLog(run, sinks=open_sinks(["tensorboard"], run, {}), warn=pytest.fail) as log:
            log.write("train", 1, {"loss": value})
    assert scalars(tmp_path / "boards", "support") == {"train/loss": [(1, 2.0)]}
    assert not (run / "tensorboard").exists()


def test_wandb_that_cannot_start_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch, ConnectionError("no network"))
    warnings: list[str] = []
    assert open_sinks(["wandb"], tmp_path, {}, warn=warnings.append) == []
    assert len(warnings) == 1
    assert "could not be started (no network)" in warnings[0]


def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sinks = open_sinks(["wandb"], tmp_path, {"r": 16}, warn=pytest.fail)
    with MetricsLog(tmp_path, sinks=sinks, warn=pytest.fail) as log:
        log.write("train", 1, {"loss": 0.5})
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_an_objectives_own_figures_stand_beside_the_runs(tmp_path: Path) -> None:
    """Under names of their own, so that one called loss hides nothing; and in a line of progress."""
    record = {"kind": "train", "step": 3, "loss": 0.5, "metrics": {"loss": 0.25, "accuracy": 1.0, "kl": None}}
    assert _shown_numbers(record) == {"train/loss": 0.5, "train/metrics/loss": 0.25, "train/metrics/accuracy": 1.0}
    assert metrics_text(record) == "  loss 0.25  accuracy 1  kl –"
    assert metrics_text({"loss": 0.5}) == ""
    sink = Recorder()
    with MetricsLog(tmp_path, sinks=[sink]) as log:
        log.write("train", 3, {"metrics": {"margin": NAN, "accuracy": 0.5}})
    assert lines(tmp_path)[0]["metrics"] == {"margin": None, "accuracy": 0.5}
    assert lines(tmp_path)[0]["nonfinite"] == ["metrics.margin"]
