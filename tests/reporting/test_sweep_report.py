"""A sweep's report: means with their errors, the rule for ranks, and what the pages say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from topwork.reporting.sweep import write_sweep_report
from topwork.reporting.sweep_points import diminishing_returns, estimate, final_loss, points
from topwork.reporting.sweep_state import (
    Cost,
    Rungs,
    SweepState,
    TrialRecord,
    TrialResult,
    TrialScores,
    TrialState,
)
from topwork.reporting.sweep_text import base_scores, cost_lines

COST = Cost(
    pass_seconds=100.0, tokens=50000, tokens_per_second=500.0, peak_memory_bytes=2**30, trials=3, waves=1,
    largest_alone_bytes_estimate=2**29, base_weights_bytes=2**28, one_by_one_seconds_estimate=100.0,
)  # fmt: skip


def trial(r: int, seed: int = 0, share: float | None = None, loss: float = 1.0, **changes: Any) -> TrialRecord:
    """A finished one; without `share` nothing was graded."""
    result = TrialResult(
        stopped="finished", steps=10, planned_steps=10, tokens=100, seconds=1.0, tokens_per_second=100.0,
        peak_memory_bytes=2**30, first_loss=3.0, last_loss=loss, eval_loss_before=None, eval_loss_after=loss,
        best_step=10, best_eval_loss=loss, shared_with=2, base_weights_bytes=2**28, warnings=[], trained=1000 * r,
        last_eval_loss=None,
    )  # fmt: skip
    values: dict[str, Any] = {
        "name": f"r-{r}_seed-{seed}", "folder": f"r-{r}_seed-{seed}", "point": f"r-{r}", "values": {"adapter.r": r},
        "seed": seed, "recipe": "", "state": TrialState.FINISHED, "rung": 0, "left_at": None, "result": result,
        "on_validation": None,
        "scores": TrialScores(exact_match=share, loss=loss, rows=100, grader="json", data="test.jsonl"),
        "before": TrialScores(exact_match=0.0, loss=3.0, rows=100, grader="json", data="test.jsonl"),
    } | changes  # fmt: skip
    return TrialRecord(**values)


def sweep_of(*trials: TrialRecord, **changes: Any) -> SweepState:
    values: dict[str, Any] = {
        "format": 1, "name": "ranks", "model": "tiny", "preset": None, "text": "What it shows.", "left_out": [],
        "jobs": False, "axes": {label: [trial.values[label] for trial in trials] for label in trials[0].values},
        "halving": None, "trials": list(trials), "waves": [], "alone": {}, "cost": COST,
    }  # fmt: skip
    return SweepState(**values | changes)


def test_errors_are_of_the_mean_over_seeds_or_binomial() -> None:
    over_seeds = estimate([0.5, 0.7, 0.6], rows=100)
    assert over_seeds is not None
    assert over_seeds.mean == pytest.approx(0.6)
    assert over_seeds.error == pytest.approx(0.1 / math.sqrt(3))
    one = estimate([0.2], rows=100)
    assert one is not None
    assert one.error == pytest.approx(0.04)
    alone = estimate([0.2])
    assert alone is not None
    assert alone.error is None
    assert estimate([]) is None


def test_with_one_seed_the_binomial_error_decides() -> None:
    found = sweep_of(trial(2, share=0.5), trial(4, share=0.76), trial(8, share=0.75), trial(16, share=0.8))
    (verdict,) = diminishing_returns(found)
    assert (verdict.best, verdict.rank, verdict.measure) == (16, 4, "exact answers")  # 0.8 - 0.04 <= 0.76
    assert "one seed" in verdict.text
    (strict,) = diminishing_returns(sweep_of(trial(2, share=0.5), trial(4, share=0.75), trial(16, share=0.8)))
    assert strict.rank == 16


def test_with_seeds_the_error_is_theirs() -> None:
    trials = [trial(r, seed, share) for r, shares in ((2, (0.70, 0.72)), (8, (0.71, 0.75))) for seed, share in
               enumerate(shares)]  # fmt: skip
    (verdict,) = diminishing_returns(sweep_of(*trials))
    assert verdict.rank == 2  # 0.73 - 0.71 <= 0.02
    assert "over 2 seeds" in verdict.text
    (verdict,) = diminishing_returns(sweep_of(trial(2, 0, 0.68), *trials[1:]))
    assert verdict.rank == 8


def test_where_nothing_is_graded_the_loss_decides_and_one_seed_tells_nothing() -> None:
    (verdict,) = diminishing_returns(sweep_of(trial(2, loss=1.1), trial(4, loss=1.0)))
    assert (verdict.best, verdict.rank) == (4, None)
    assert "--seeds 3" in verdict.text
    trials = [trial(r, seed, None, loss) for r, losses in ((2, (1.01, 1.03)), (4, (1.0, 1.04))) for seed, loss in
               enumerate(losses)]  # fmt: skip
    (verdict,) = diminishing_returns(sweep_of(*trials))
    assert (verdict.rank, verdict.measure) == (2, "loss")


def test_all_wrong_tells_nothing_so_the_loss_decides() -> None:
    trials = [trial(2, 0, 0.0, 1.5), trial(2, 1, 0.0, 1.6), trial(4, 0, 0.0, 1.0), trial(4, 1, 0.0, 1.01)]
    (verdict,) = diminishing_returns(sweep_of(*trials))
    assert (verdict.rank, verdict.measure) == (4, "loss")


def test_a_rank_with_a_diverged_seed_is_no_candidate_and_in_no_mean() -> None:
    lost = trial(16, 1, 0.99, state=TrialState.DIVERGED, scores=None)
    trials = [trial(2, 0, 0.5), trial(2, 1, 0.5), trial(16, 0, 0.9), lost]
    found = sweep_of(*trials)
    (verdict,) = diminishing_returns(found)
    assert verdict.best == 2
    point = points(found)[1]
    assert point.diverged == 1
    assert point.accuracy is not None
    assert (point.accuracy.mean, point.accuracy.count) == (0.9, 1)


def test_the_loss_is_over_all_rows_that_are_known() -> None:
    few = trial(2, share=0.5, loss=1.0, on_validation=True)
    assert few.scores is not None
    assert few.result is not None
    few.scores.loss = 9.0  # of the few rows that were answered
    assert final_loss(few) == 1.0
    assert final_loss(few.model_copy(update={"on_validation": False})) == 9.0
    assert final_loss(few.model_copy(update={"scores": None})) == 1.0
    few.result.eval_loss_before = 4.0
    base = base_scores(sweep_of(few))
    assert base is not None
    assert (base.loss, base.exact_match) == (4.0, 0.0)


def test_a_base_that_was_asked_other_rows_is_not_told() -> None:
    other = TrialScores(exact_match=0.5, loss=2.0, rows=100, grader="json", data="other.jsonl")
    assert base_scores(sweep_of(trial(2), trial(4, before=other))) is None
    assert base_scores(sweep_of(trial(2, before=None))) is None


def test_other_axes_have_verdicts_of_their_own() -> None:
    trials = [
        trial(r, share=share, values={"adapter.r": r, "training.learning_rate": rate}, point=f"{r} {rate}")
        for r, rate, share in ((2, 1e-3, 0.5), (8, 1e-3, 0.9), (2, 1e-4, 0.4), (8, 1e-4, 0.41))
    ]
    found = {repr(v.others): v.rank for v in diminishing_returns(sweep_of(*trials))}
    assert found == {"{'training.learning_rate': 0.001}": 8, "{'training.learning_rate': 0.0001}": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three ranks, of which one diverged, and one that left."""
    lost = trial(64, scores=None, state=TrialState.DIVERGED, name="<b>r-64</b>", point="<b>r-64</b>")
    left = trial(32, scores=None, state=TrialState.LEFT, left_at=0)
    found = sweep_of(
        trial(2, share=0.5), trial(4, share=0.52), lost, left, left_out=["bitfit: no biases | none"],
        halving=Rungs(factor=3, rungs=2, stops=[5]),
    )  # fmt: skip
    found.save(tmp_path)
    for each in found.trials[:3]:
        run = tmp_path / each.folder
        run.mkdir()
        lines = [{"kind": "eval", "step": step, "loss": 2.0 / (step + 1)} for step in (0, 5, 10)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return tmp_path


def test_the_pages_say_all_that_happened(folder: Path) -> None:
    paths = write_sweep_report(folder)
    text, page = paths.markdown.read_text("utf-8"), paths.html.read_text("utf-8")
    for told in (
        "What it shows.", "r-2", "2,000", "bare base", "1 diverged", "diverged after step 10", "left at rung 1",
        "rung 1, step 5: r-32_seed-0", "Diminishing returns from r = 2", "The rule:", "an estimate", "2.00 times",
    ):  # fmt: skip
        assert told in text, told
        assert told in page, told
    assert "&lt;b&gt;r-64&lt;/b&gt;" in page  # names are never markup
    assert "<b>r-64" not in page
    assert "default-src 'none'" in page
    assert "bitfit: no biases" in page
    for picture in ("curves", "accuracy-adapter.r", "loss-adapter.r"):
        assert f"pictures/{picture}.png" in text
        assert (folder / "pictures" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_sweep_gives_the_same_pages(folder: Path) -> None:
    first = write_sweep_report(folder).html.read_bytes()
    assert write_sweep_report(folder).html.read_bytes() == first


def test_without_matplotlib_there_are_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    heard: list[str] = []
    paths = write_sweep_report(folder, heard.append)
    assert "matplotlib" in heard[0]
    assert "![" not in paths.markdown.read_text("utf-8")
    assert "Diminishing returns" in paths.html.read_text("utf-8")


@pytest.mark.parametrize("axis", [["q,v", "all-linear"], [0.25, 16], [True, False], [[1, 2], "x"], [-1, 1]])
def test_every_kind_of_axis_is_drawn(axis: list[Any], tmp_path: Path) -> None:
    trials = [
        trial(index, share=0.5, values={"axis/of a kind": value}, point=f"p{index}", state=state, name=f"p{index}")
        for index, (value, state) in enumerate(zip(axis, (TrialState.FINISHED, TrialState.DIVERGED)))
    ]
    sweep_of(*trials).save(tmp_path)
    write_sweep_report(tmp_path)
    assert (tmp_path / "pictures" / "accuracy-axis-of-a-kind.png").is_file()


def test_measured_alone_is_not_called_an_estimate() -> None:
    alone = {"alone_seconds": 150.0, "time_ratio": 0.667, "alone_steps": 8, "largest_alone_bytes": 2**29}
    told = "\n".join(cost_lines(COST.model_copy(update=alone)))
    assert "estimate" not in told
    assert "0.67 of that time" in told
    assert "(an estimate" in "\n".join(cost_lines(COST))
    assert cost_lines(None) == ["not known before the sweep ends"]
