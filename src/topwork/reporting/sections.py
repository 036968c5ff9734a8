"""What the page shows, taken from a run's files and put into words. Where nothing is known, nothing is returned."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from topwork.reporting import wording
from topwork.reporting.differences import Piece, differences
from topwork.reporting.endings import (
    Trend,
    ending,
    epochs,
    held_out_rows,
    is_told,
    rows_told,
    share_trend,
    too_few,
    trend,
)
from topwork.reporting.readers import RunFiles, entries, number, section

SHOWN_SAMPLES = 60
NOT_SHARES = frozenset({"loss", "perplexity", "tokens_per_second", "seconds", "tokens", "rows"})

OUTCOMES = {
    "False True": "learned",
    "True True": "right both times",
    "False False": "still wrong",
    "True False": "lost",
}
"""Right before and after training, in a word."""


@dataclass(frozen=True)
class Card:
    """A key figure: the value now and, where it is known, the one before training."""

    title: str
    value: str
    before: str | None = None
    detail: str | None = None
    trend: Trend | None = None


@dataclass(frozen=True)
class Score:
    """A share of rows before and after; either may be unknown. `interval` is the 95 % interval of `after`."""

    name: str
    is_field: bool
    before: float | None
    after: float | None
    interval: str | None
    difference: str | None
    trend: Trend | None


@dataclass(frozen=True)
class Answer:
    title: str
    pieces: list[Piece]
    correct: bool | None


@dataclass(frozen=True)
class Sample:
    prompt: str
    outcome: str
    answers: list[Answer]


@dataclass(frozen=True)
class ParameterRow:
    name: str
    modules: str
    trainable: str
    share: float


def cards(run: RunFiles) -> list[Card]:
    """The figures that people look for first."""
    result = run.result
    found = [_loss_card(run), _exact_card(run)]
    if (speed := number(result, "tokens_per_second")) is not None:
        tokens = number(result, "tokens")
        seen = f"{wording.count(tokens)} tokens" if tokens is not None else None
        found.append(Card("Speed", f"{wording.count(speed)} tokens/s", detail=seen))
    if (memory := number(result, "peak_memory_bytes")) is not None:
        found.append(Card("Peak memory", wording.size(memory)))
    if (weights := number(result, "base_weights_bytes")) is not None:
        found.append(Card("Base weights", wording.size(weights), detail=result.get("base_held_as")))
    if (trained := number(result, "parameters", "share")) is not None:
        count = number(result, "parameters", "trainable")
        detail = f"{wording.count(count)} parameters" if count is not None else None
        found.append(Card("Trainable", wording.share(trained), detail=detail))
    if (seconds := number(result, "seconds")) is not None:
        steps = number(result, "steps")
        detail = f"{wording.whole(steps)} step{'' if steps == 1 else 's'}" if steps is not None else None
        found.append(Card("Duration", wording.duration(seconds), detail=detail))
    return [card for card in found if card is not None]


def _loss_card(run: RunFiles) -> Card | None:
    before, after = number(run.result, "eval_loss_before"), number(run.result, "eval_loss_after")
    validations = [record for record in run.records if record["kind"] == "eval"]
    if after is None and validations:
        after = number(validations[-1], "loss")
    if after is None:
        last = number(run.result, "last_loss")
        return Card("Training loss", wording.loss(last)) if last is not None else None
    best, step = number(run.result, "best_eval_loss"), number(run.result, "best_step")
    rows = held_out_rows(run)
    lowest = (
        f"best {wording.loss(best)} at step {wording.whole(step)}" if best is not None and step is not None else None
    )
    detail = ", ".join(part for part in (lowest, rows_told(rows)) if part) or None
    shown_before = wording.loss(before) if before is not None else None
    return Card("Validation loss", wording.loss(after), shown_before, detail, trend(before, after, False, rows))


def _exact_card(run: RunFiles) -> Card | None:
    before, after = (number(run.evaluation, when, "exact_match") for when in ("before", "after"))
    if after is None:
        return None
    rows = number(run.evaluation, "rows")
    shown_before = wording.share(before) if before is not None else None
    found, detail = share_trend(before, after, rows), rows_told(rows)
    if rows and not too_few(rows) and before is not None and found is None:
        detail = f"{detail}: a difference that may be chance"
    return Card("Exact match", wording.share(after), shown_before, detail, found)


def scores(evaluation: Mapping[str, Any]) -> list[Score]:
    """One row per share that was measured: the whole answer's first, then one per field."""
    rows = number(evaluation, "rows")
    before, after = section(evaluation, "before"), section(evaluation, "after")
    found = []
    for name in dict.fromkeys([*before, *after]):
        if name not in NOT_SHARES:
            found.append(_score(name, False, number(before, name), number(after, name), rows))
    for name in dict.fromkeys([*section(before, "fields"), *section(after, "fields")]):
        found.append(_score(name, True, number(before, "fields", name), number(after, "fields", name), rows))
    return [score for score in found if score is not None]


def _score(name: str, is_field: bool, before: float | None, after: float | None, rows: float | None) -> Score | None:
    known = [value for value in (before, after) if value is not None]
    if not known or not all(0 <= value <= 1 for value in known):
        return None
    interval = None
    if after is not None and rows:
        low, high = wording.wilson(after, rows)
        interval = f"{100 * low:.0f}–{100 * high:.0f} %"
    difference = wording.points(after - before) if before is not None and after is not None else None
    title = name if is_field else name.replace("_", " ").replace("json", "JSON")
    return Score(title, is_field, before, after, interval, difference, share_trend(before, after, rows))


def evaluation_facts(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured beside the shares: loss and generation speed."""
    found = []
    for name, title, worded in (("loss", "Loss", wording.loss), ("tokens_per_second", "Tokens/s", wording.count)):
        values = [number(evaluation, when, name) for when in ("before", "after")]
        if any(value is not None for value in values):
            found.append((title, " → ".join(worded(value) if value is not None else "–" for value in values)))
    return found


def samples(evaluation: Mapping[str, Any]) -> list[Sample]:
    """The first `SHOWN_SAMPLES` samples, their answers compared with the reference."""
    rows = [row for row in entries(evaluation, "samples") if isinstance(row, Mapping)]
    return [_sample(row) for row in rows[:SHOWN_SAMPLES]]


def _sample(row: Mapping[str, Any]) -> Sample:
    reference = _indented(row.get("reference"))
    answers = [Answer("Expected", [Piece("same", reference)], None)] if reference else []
    for when, title in (("before", "Before training"), ("after", "After training")):
        if row.get(when) is not None:
            answer, correct = _indented(row[when]), row.get(f"correct_{when}")
            pieces = differences(reference, answer) if reference and not correct else [Piece("same", answer)]
            answers.append(Answer(title, pieces, correct if isinstance(correct, bool) else None))
    outcome = OUTCOMES.get(f"{row.get('correct_before')} {row.get('correct_after')}", "")
    return Sample(_text(row.get("prompt")), outcome, answers)


def _indented(value: Any) -> str:
    """A text that is a JSON object or list with a line per entry: read and compared by people, not by machines."""
    text = _text(value)
    try:
        parsed = json.loads(text)
    except ValueError:
        return text
    return json.dumps(parsed, ensure_ascii=False, indent=2) if isinstance(parsed, dict | list) else text


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, indent=2)


def parameter_rows(result: Mapping[str, Any]) -> list[ParameterRow]:
    """The trainable parameters by the name of their module, each with its share of the trainable ones."""
    rows = [row for row in entries(section(result, "parameters"), "by_module") if isinstance(row, Mapping)]
    counts = [number(row, "trainable") or 0.0 for row in rows]
    total = number(result, "parameters", "trainable") or sum(counts) or 1.0
    found = []
    for row, count in zip(rows, counts):
        modules = number(row, "modules")
        shown = wording.whole(modules) if modules is not None else "–"
        found.append(ParameterRow(_text(row.get("name")), shown, wording.whole(count), min(1.0, count / total)))
    return found


def facts(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as rows of a dotted path and its value."""
    found: list[tuple[str, str]] = []
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found.extend(facts(value, f"{path}."))
        elif isinstance(value, bool) or value is None:
            found.append((path, {True: "yes", False: "no", None: "–"}[value]))
        elif isinstance(value, int):
            found.append((path, wording.whole(value) if abs(value) >= 10_000 else str(value)))
        elif isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
            found.append((path, ", ".join(map(str, value))))
        else:
            found.append((path, _text(value)))
    return found


def notes(run: RunFiles) -> list[str]:
    """Everything that asks for attention, the run's end first."""
    noted = [(record["step"], _text(record.get("text"))) for record in run.records if record["kind"] == "note"]
    own = {text for _, text in noted}  # a run's warnings are its notes and others
    found = ending(run)
    if (step := number(run.evaluation, "checkpoint")) is not None:
        found.append(f"The scores and answers are those of the checkpoint of step {wording.whole(step)}.")
    found.extend(text for warning in entries(run.result, "warnings") if (text := _text(warning)) not in own)
    found.extend(f"Step {step}: {text}" for step, text in noted if not is_told(run, text))
    found.extend(run.problems)
    return list(dict.fromkeys(found))


def headline(run: RunFiles) -> list[tuple[str, str]]:
    """Base, method and the settings that decide a run, for the page's head."""
    adapter, training = section(run.recipe, "adapter"), section(run.recipe, "training")
    base = section(run.provenance, "base").get("id") or section(run.recipe, "model").get("model_name_or_path")
    method = str(adapter.get("method", "")).replace("lora", "LoRA")
    if method and adapter.get("use_rslora"):
        method = f"rs{method}"
    settings = [
        ("Base", base),
        ("Method", method),
        ("Rank", adapter.get("r")),
        ("Alpha", adapter.get("lora_alpha")),
        ("Learning rate", training.get("learning_rate")),
        ("Batch", training.get("batch_size")),
        ("Epochs", epochs(run)),
        ("Seed", run.provenance.get("seed", training.get("seed"))),
        ("Ended", run.result.get("stopped")),
    ]
    return [
        (name, f"{value:g}" if isinstance(value, float) else _text(value))
        for name, value in settings
        if value not in (None, "")
    ]
