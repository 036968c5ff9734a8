"""How a run ended and how far it came, and whether its figures can bear a word like better."""

from typing import Literal

from topwork.reporting import wording
from topwork.reporting.readers import RunFiles, number, section

FEW_ROWS = 20
"""Of fewer held-out rows a single one decides a twentieth of every figure, and with it which step is the best."""
WORSE = "the base without the adapter is"
"""How the note of training begins that the bare base is the better one."""
Trend = Literal["better", "worse", "same"]


def trend(before: float | None, after: float | None, higher_is_better: bool, rows: float | None = None) -> Trend | None:
    """Whether the second value is better; None where one is unknown, or was measured on too few rows to tell."""
    if before is None or after is None or too_few(rows):
        return None
    if before == after:
        return "same"
    return "better" if (after > before) == higher_is_better else "worse"


def share_trend(before: float | None, after: float | None, rows: float | None) -> Trend | None:
    """Whether the second share of so many rows is better; None where that may be chance: one lies in the other's 95 %
    interval."""
    found = trend(before, after, True, rows)
    if found is None or before is None or after is None or not rows:
        return found
    (low, high), (lowest, highest) = wording.wilson(after, rows), wording.wilson(before, rows)
    return None if before != after and (low <= before <= high or lowest <= after <= highest) else found


def too_few(rows: float | None) -> bool:
    """Whether these are too few rows to tell anything; not where their number is not known."""
    return rows is not None and rows < FEW_ROWS


def rows_told(rows: float | None, what: str = "held-out row") -> str | None:
    """'1 held-out row: too few to tell'."""
    if rows is None:
        return None
    counted = f"{wording.whole(rows)} {what}{'' if rows == 1 else 's'}"
    return f"{counted}: too few to tell" if too_few(rows) else counted


def ending(run: RunFiles) -> list[str]:
    """What is to be said first: that it is no finished run, and that it is none to use."""
    return [told for told in (_end(run), _worse_than_base(run)) if told is not None]


def _end(run: RunFiles) -> str | None:
    if run.alone:
        return None
    stopped = run.result.get("stopped")
    reached = number(run.result, "steps")
    reached = max((record["step"] for record in run.records), default=0) if reached is None else reached
    of = f" of {wording.whole(planned)}" if (planned := planned_steps(run)) is not None else ""
    if stopped == "diverged":
        why = str(run.result.get("reason") or next(iter(_divergence(run)), "its loss was no number any more"))
        return f"The run diverged after step {wording.whole(reached)}{of}, and its adapter is not one to use: {why}"
    if stopped == "interrupted":
        return (
            f"The run was stopped after step {wording.whole(reached)}{of}: these are the figures up to there, not "
            "those of a finished run."
        )
    if not run.result:
        return (
            f"The run has not finished (or was cut off): step {wording.whole(reached)}{of} is the last that it wrote "
            "down. There is no result yet, only its measurements so far."
        )
    return None


def _divergence(run: RunFiles) -> list[str]:
    notes = [str(record.get("text")) for record in run.records if record["kind"] == "note"]
    return [note for note in notes if note.startswith("diverged")]


def is_told(run: RunFiles, note: str) -> bool:
    """Whether the ending says what a note of the training says."""
    return note.startswith("diverged") and run.result.get("stopped") == "diverged"


def _worse_than_base(run: RunFiles) -> str | None:
    before, after = number(run.result, "eval_loss_before"), number(run.result, "eval_loss_after")
    noted = any(str(record.get("text")).startswith(WORSE) for record in run.records if record["kind"] == "note")
    if before is None or after is None or after <= before or noted:
        return None
    rows = rows_told(held_out_rows(run))
    return (
        f"The base was better on the held-out rows than the adapter is: validation loss {wording.loss(before)} before "
        f"training, {wording.loss(after)} after it{f' ({rows})' if rows else ''}."
    )


def held_out_rows(run: RunFiles) -> float | None:
    """Rows that the run validated on; None where nothing says."""
    return number(run.result, "plan", "held_out_rows")


def planned_steps(run: RunFiles) -> float | None:
    """Steps of the whole plan, as the result says or the recipe and the epochs of the steps done."""
    for path in (("planned_steps",), ("plan", "steps")):
        if (told := number(run.result, *path)) is not None:
            return told
    training = section(run.recipe, "training")
    steps, epochs, each = number(training, "max_steps"), number(training, "num_train_epochs"), _epochs_a_step(run)
    if steps is not None:
        return steps
    return max(1.0, round(epochs / each)) if epochs is not None and each else None


def _epochs_a_step(run: RunFiles) -> float | None:
    trained = [record for record in run.records if record["kind"] == "train" and number(record, "epoch")]
    return (number(trained[-1], "epoch") or 0.0) / trained[-1]["step"] if trained and trained[-1]["step"] else None


def epochs(run: RunFiles) -> str | None:
    """How often the rows were seen, of how often they were to be: '3.6', '0.4 of 2'. The recipe's number is not asked
    where `max_steps` decides."""
    each = _epochs_a_step(run)
    training = section(run.recipe, "training")
    planned = number(training, "num_train_epochs") if number(training, "max_steps") is None else None
    if each is None:
        return None if planned is None else f"{planned:g}"
    reached, whole = max(record["step"] for record in run.records), planned_steps(run)
    seen, all_of = wording.number(each * reached), wording.number(each * (whole or 0))
    return f"{seen} of {all_of}" if whole is not None and reached < whole else seen
