"""What a combined adapter kept: on each source's held-out rows, beside that source and the bare base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, SavedAdapter, load_adapter
from topwork.common.errors import RequestError
from topwork.data.config import DataConfig, Sources
from topwork.data.files.places import find_place
from topwork.data.files.sources import with_held_out
from topwork.evaluation.config import EvaluationConfig
from topwork.run.evaluate import score_arms
from topwork.run.folder import data_of
from topwork.run.given import Given
from topwork.run.loading import open_base

BASE, COMBINED = "base", "combined"


@dataclass(frozen=True)
class _Asked:
    """Rows, how they are read, and which of the sources are asked them beside the base and the result."""

    called: str
    data: DataConfig
    named: Sources | None
    config: EvaluationConfig
    seed: int
    sources: tuple[int, ...]


def check_rows(given: Sequence[Given], labels: Sequence[str], data: str | None) -> None:
    """Before anything is computed. Raises RequestError where a source has no rows of its own and none are named,
    DataError where those that are named are not there."""
    alone = [label for label, one in zip(labels, given) if one.recipe is None]
    if data is None and alone:
        raise RequestError(
            f"--evaluate scores on the rows that each run held out, and {', '.join(alone)} is an adapter alone; name "
            "rows for all with --data"
        )
    if data is not None:
        find_place(data)


def scores_of(
    given: Sequence[Given],
    labels: Sequence[str],
    combined: SavedAdapter,
    data: str | None = None,
    max_rows: int | None = None,
    force: bool = False,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One record for each source's rows (for `data` one in all): {"data", "rows", "grader", "scores": {arm: summary}},
    the arms being `base`, sources by their labels, and `combined`. The base is held as the first run's was in training.
    """
    first = next((one for one in given if one.recipe is not None), given[0])
    base = open_base(first.model, log, first.quantization)
    adapters, own = Adapters(base.module), BaseId(base.name, base.fingerprint)
    names = [f"source_{at}" for at in range(len(given))]
    for name, saved in [*zip(names, (one.saved for one in given)), (COMBINED, combined)]:
        load_adapter(adapters, name, saved, own, force)
    found = []
    for asked in _asked(given, labels, data, max_rows):
        arms = {BASE: None, **{_arm(labels[at]): names[at] for at in asked.sources}, COMBINED: COMBINED}
        scored = score_arms(base, arms, asked.data, asked.named, asked.config, asked.seed, log)
        found.append(
            {
                "data": asked.called,
                "rows": len(scored.rows.questions or scored.rows.examples),
                "grader": scored.grader if scored.rows.questions else "loss alone",
                "scores": {arm: scores.summary for arm, scores in scored.arms.items()},
            }
        )
    return found


def _arm(label: str) -> str:
    """A source's column; one that is called as the others' are keeps its own."""
    return f"source {label}" if label in (BASE, COMBINED) else label


def _asked(
    given: Sequence[Given], labels: Sequence[str], data: str | None, max_rows: int | None
) -> list[_Asked]:  # fmt: skip
    if data is not None:
        run = next((one for one in given if one.recipe is not None), None)
        config = EvaluationConfig() if run is None or run.recipe is None else run.recipe.evaluation
        way = DataConfig(train=data) if run is None or run.recipe is None else data_of(run.place, run.recipe)
        config = config.model_copy(update={"max_rows": max_rows or config.max_rows})
        return [_Asked(data, way, data, config, 0, tuple(range(len(given))))]
    found = []
    for at, one in enumerate(given):
        assert one.recipe is not None
        recipe = one.recipe
        config = recipe.evaluation.model_copy(update={"max_rows": max_rows or recipe.evaluation.max_rows})
        named = config.data or (None if recipe.data.eval is None else with_held_out(recipe.data).eval)
        found.append(
            _Asked(labels[at], data_of(one.place, recipe), named, config, recipe.training.seed, (at,))
        )  # fmt: skip
    return found
