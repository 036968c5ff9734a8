"""What a report says of runs that did not end well, and of figures that are too few to mean anything."""

import json
from pathlib import Path
from typing import Any

import pytest

from reporting.test_report import evaluated, evaluation, result, train, write_lines
from topwork.common.errors import RequestError
from topwork.reporting import sections
from topwork.reporting.endings import epochs, share_trend, trend
from topwork.reporting.page import render
from topwork.reporting.readers import read_run
from topwork.run.report import report as write_report


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """made(records, recipe, result=…, evaluation=…) -> the run's folder."""

    def folder(records: list[dict[str, Any]], recipe: str = "", **files: Any) -> Path:
        write_lines(tmp_path, records)
        (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value), "utf-8")
        return tmp_path

    return folder


STEPS = [train(step) for step in range(1, 12)]
THREE = "training: {num_train_epochs: 3, max_steps: null}\n"


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        ({"stopped": "interrupted", "steps": 11, "planned_steps": 40}, "The run was stopped after step 11 of 40"),
        ({"stopped": "interrupted", "steps": 11}, "The run was stopped after step 11 of 18"),
        (
            {"stopped": "diverged", "steps": 11, "reason": "step 12: the loss is nan. Look at these rows"},
            "step 12: the",
        ),
        ({"stopped": "diverged", "steps": 11}, "The run diverged after step 11 of 18, and its adapter is not one to"),
        ({}, "The run has not finished (or was cut off): step 11 of 18"),
    ],
)
def test_how_it_ended(made: Any, ended: dict[str, Any], told: str) -> None:
    notes = [{"kind": "note", "step": 11, "text": "diverged at step 12: step 12: the loss is nan"}]
    folder = made([*STEPS, *notes], THREE, **({"result": ended} if ended else {}))
    run = read_run(folder)
    assert told in sections.notes(run)[0]
    page = render(run)
    assert told in page
    if ended.get("stopped") == "diverged":
        assert page.count("the loss is nan") == 1
        assert "has not finished" not in page
    assert write_report(folder).html.is_file()


def test_a_warning_stands_there_once(made: Any) -> None:
    text = "validation loss has risen since step 4 while training loss falls: overfitting."
    folder = made([*STEPS, {"kind": "note", "step": 8, "text": text}], result=result() | {"warnings": [text, "others"]})
    page = render(read_run(folder))
    assert page.count(text) == 1
    assert f"Step 8: {text}" in page
    assert "others" in page


@pytest.mark.parametrize(
    ("last", "recipe", "finished", "seen"),
    [
        (22, "training: {num_train_epochs: 1, max_steps: 22}\n", True, "3.67"),
        (18, THREE, True, "3"),
        (18, THREE, False, "3"),
        (3, THREE, False, "0.5 of 3"),
        (11, THREE, True, "1.83 of 3"),  # it stopped early
        (3, "training: {num_train_epochs: 1, max_steps: 22}\n", False, "0.5 of 3.67"),
    ],
)
def test_epochs_are_those_that_were_seen(made: Any, last: int, recipe: str, finished: bool, seen: str) -> None:
    files = {"result": {"stopped": "finished", "steps": last}} if finished else {}
    run = read_run(made([train(step) for step in range(1, last + 1)], recipe, **files))
    assert epochs(run) == seen
    assert ("Epochs", seen) in sections.headline(run)


@pytest.mark.parametrize(("recipe", "told"), [(THREE, "3"), ("training: {num_train_epochs: 1, max_steps: 9}\n", None)])
def test_epochs_of_rows_without_any(made: Any, recipe: str, told: str | None) -> None:
    records = [{key: value for key, value in record.items() if key != "epoch"} for record in STEPS]
    assert epochs(read_run(made(records, recipe))) == told


@pytest.mark.parametrize(("rows", "few"), [(1, True), (19, True), (20, False), (300, False)])
def test_few_rows_make_nothing_better(made: Any, rows: int, few: bool) -> None:
    measured = evaluation() | {"rows": rows}
    folder = made(STEPS, result=result() | {"plan": {"held_out_rows": rows}}, evaluation=measured)
    run = read_run(folder)
    loss, exact = sections.cards(run)[:2]
    told = f"{rows} held-out row{'s' if rows > 1 else ''}"
    for card in (loss, exact):
        assert card.trend == (None if few else "better")
        assert (f"{told}: too few to tell" in str(card.detail)) == few
        assert told in str(card.detail)
    assert {score.trend for score in sections.scores(run.evaluation)} == ({None} if few else {"better"})
    page = render(run)
    assert ("card better" in page) == (not few)
    assert ('class="number better"' in page) == (not few)
    assert (f"over {told}: too few to tell." in page) == few


@pytest.mark.parametrize(
    ("before", "after", "rows", "found"),
    [
        (0.50, 0.52, 100, None),  # two rows of a hundred
        (0.50, 0.58, 100, None),
        (0.50, 0.70, 100, "better"),
        (0.70, 0.50, 100, "worse"),
        (0.50, 0.52, 10_000, "better"),
        (0.5, 0.5, 100, "same"),
        (0.5, 0.9, None, "better"),
    ],
)
def test_a_difference_that_may_be_chance_is_none(before: float, after: float, rows: int | None, found: Any) -> None:
    assert share_trend(before, after, rows) == found


def test_a_loss_is_better_where_it_is_lower() -> None:
    assert (trend(2.0, 1.0, False), trend(1.0, 2.0, False), trend(1.0, None, False)) == ("better", "worse", None)


def test_that_the_base_was_better_is_said_first(made: Any) -> None:
    worse = result() | {"stopped": "finished", "eval_loss_before": 3.7756, "eval_loss_after": 3.8115}
    run = read_run(made([*STEPS, evaluated(11, 3.8115)], result=worse | {"plan": {"held_out_rows": 1}}))
    assert sections.notes(run)[0] == (
        "The base was better on the held-out rows than the adapter is: validation loss 3.776 before training, 3.812 "
        "after it (1 held-out row: too few to tell)."
    )
    note = "the base without the adapter is better: its validation loss is 3.7756"
    run = read_run(made([*STEPS, {"kind": "note", "step": 11, "text": note}], result=worse))
    assert not any("The base was better" in told for told in sections.notes(run))
    better = read_run(made(STEPS, result=result() | {"stopped": "finished"}))
    assert not any("base" in told for told in sections.notes(better))


def test_a_run_that_diverged_at_once_has_no_page_and_says_why(made: Any) -> None:
    folder = made([{"kind": "note", "step": 0, "text": "diverged at step 1: step 1: the loss is nan"}])
    with pytest.raises(RequestError, match="the run diverged at step 1: step 1: the loss is nan"):
        write_report(folder)
