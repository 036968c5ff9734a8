"""`topwork lint`: a recipe's data as the model will see them, and what is wrong with them. No weight is read."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from topwork.common.errors import AdapterError, ModelError
from topwork.common.os_errors import explained
from topwork.common.paths import plain_path
from topwork.data.examples import Data
from topwork.data.summary import WARNING
from topwork.models.config import ModelConfig
from topwork.models.skeleton import skeleton
from topwork.models.source import ALIASES, Source, find_source
from topwork.models.tokenizer import load_config, load_tokenizer, usable_length
from topwork.plan.base import structure_named
from topwork.plan.built import config_of, count_built
from topwork.plan.count import count_adapter
from topwork.plan.lint.examine import examine, examine_loaded
from topwork.plan.lint.examined import Examined, Side
from topwork.plan.lint.finding import Finding, Severity, totals
from topwork.plan.lint.rules import check
from topwork.plan.lint.shown import ShownRow, shown_rows
from topwork.plan.new_tokens import with_planned_tokens
from topwork.recipe.recipe import Recipe, load_recipe

Log = Callable[[str], None]
ROWS = 5
"""Rows that are shown unless the request says how many."""
_BINS = 32


@dataclass(frozen=True)
class LintResult:
    """What was found, and some rows."""

    recipe: Recipe
    examined: Examined
    findings: list[Finding]
    shown: list[ShownRow]

    @cached_property
    def totals(self) -> dict[Severity, int]:
        """Findings of each severity."""
        return totals(self.findings)

    def exit_code(self, strict: bool = False) -> int:
        """1 where there is an error (with `strict`, a warning is one), else 0."""
        return int(self.totals["error"] > 0 or (strict and self.totals["warning"] > 0))

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        sides = {side.name: _counts(side) for side in self.examined.sides}
        return {
            "model": self.recipe.model.model_name_or_path,
            "formats": list(dict.fromkeys(told for side in self.examined.sides for told in side.formats)),
            "files": [
                told
                for told in dict.fromkeys(r for side in self.examined.sides for r in side.remarks)
                if not told.startswith(WARNING)
            ],
            "limit": self.examined.limit,
            "context_length": self.examined.context_length,
            "trained_parameters": self.examined.trainable,
            "sides": sides,
            "lengths": _histogram(self.examined.train, self.examined.limit),
            "errors": self.totals["error"],
            "warnings": self.totals["warning"],
            "notices": self.totals["notice"],
            "findings": [asdict(finding) for finding in self.findings],
            "shown": [{**asdict(row), "marked": row.marked} for row in self.shown],
        }


@explained()
def lint(
    recipe: Recipe | Path | str,
    overrides: Sequence[str] = (),
    rows: int | Sequence[str] = ROWS,
    log: Log = lambda _: None,
) -> LintResult:
    """Read a recipe's data, encode them as training would, and check them. A row that cannot be used is a finding.

    rows  how many are shown, or the sources of those to be shown (`train.jsonl:17`)

    Needs the base's tokenizer and config alone. Raises RequestError for a recipe, a file or a base that cannot be read.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)
    source = _source(recipe.model, log)
    tokenizer = load_tokenizer(source, recipe.model.trust_remote_code, recipe.model)
    length = usable_length(load_config(source, recipe.model.trust_remote_code))
    examined = examine(recipe, tokenizer, length, _trainable(recipe, source, log))
    return LintResult(recipe, examined, check(examined), shown_rows(examined, rows))


def _source(model: ModelConfig, log: Log) -> Source:
    """Where the base is; a folder that has a config and no weights is enough here."""
    folder = Path(plain_path(model.model_name_or_path))
    if model.model_name_or_path not in ALIASES and (folder / "config.json").is_file() and model.revision is None:
        return Source(model.model_name_or_path, str(folder), None)
    return find_source(model, log)


def _trainable(recipe: Recipe, source: Source, log: Log) -> int | None:
    """Parameters that the recipe's adapter trains; None where they cannot be counted, and `log` is told why."""
    model = recipe.model
    try:
        if model.grows:
            structure = structure_named(model)
            return count_adapter(structure, with_planned_tokens(recipe, structure).adapter).trainable
        config = config_of(source.folder, source.revision, model.trust_remote_code)
        return count_built(skeleton(config, model.trust_remote_code), recipe.adapter).trainable
    except (ModelError, AdapterError) as error:
        log(f"warning: what the adapter trains was not counted: {error}")
        return None


def quick_line(recipe: Recipe, data: Data, tokenizer: Any, room: int) -> str:
    """What the cheap checks find in loaded data, in a line: training goes on whatever it says."""
    findings = check(examine_loaded(recipe, data, tokenizer, room, None), quick=True)
    grave = [finding for finding in findings if finding.severity != "notice"]
    notices = len(findings) - len(grave)
    rest = f"{notices} notice{'s' * (notices != 1)}" if notices else ""
    if not grave:
        told = f"; {rest}: topwork lint RECIPE shows {'them' if notices != 1 else 'it'}" if rest else ""
        return f"lint: nothing found by the quick checks{told}"
    counted = [_counted(severity, findings) for severity in ("error", "warning")]
    rules = ", ".join(dict.fromkeys(f"{each.rule} {each.count:,}" if each.count else each.rule for each in grave))
    parts = [part for part in (*counted, rest) if part]
    return f"lint: {', '.join(parts)} ({rules}): topwork lint RECIPE shows {'them' if len(findings) > 1 else 'it'}"


def _counted(severity: str, findings: Sequence[Finding]) -> str:
    count = sum(finding.severity == severity for finding in findings)
    return f"{count} {severity}{'s' * (count != 1)}" if count else ""


def _counts(side: Side) -> dict[str, Any]:
    found = side.sequences
    lengths = found.lengths if len(found) else np.zeros(1, np.int64)
    return {
        "named": side.named,
        "rows": side.rows,
        "bad_rows": len({row.source for row in side.bad}),
        "sequences": len(found),
        "tokens": int(found.lengths.sum()),
        "learned_tokens": int(found.learned.sum()),
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
    }


def _histogram(side: Side, limit: int) -> dict[str, Any]:
    """Sequences by their length in tokens: counts[i] have from edges[i] up to edges[i + 1] of them."""
    lengths = side.sequences.lengths
    if not len(lengths):
        return {"edges": [], "counts": [], "limit": limit, "logarithmic": False}
    low, high = int(lengths.min()), int(lengths.max()) + 1
    wide = high > 20 * max(1.0, float(np.median(lengths)))
    edges = np.geomspace(max(1, low), high, _BINS + 1) if wide else np.linspace(low, high, min(_BINS, high - low) + 1)
    counts, edges = np.histogram(lengths, np.unique(np.round(edges).astype(int)))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "limit": limit, "logarithmic": wide}
