"""`topwork count`: parameters before and after, from a configuration alone."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.common.os_errors import explained
from topwork.models.config import ModelConfig
from topwork.plan.base import structure_named
from topwork.plan.count import RANKS, CountRow, ParameterCount, count_adapter, count_table
from topwork.plan.new_tokens import with_planned_tokens
from topwork.recipe.recipe import load_recipe


@dataclass(frozen=True)
class Counted:
    """A model's parameters, a table of adapters, and the recipe's own adapter where a recipe was given."""

    model: str
    total: int
    table: list[CountRow]
    own: ParameterCount | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def as_text(self) -> str:
        """A table for people."""
        lines = [f"{self.model}: {self.total:,} parameters before any adapter", ""]
        lines.append(f"{'targets':12} {'r':>4} {'trainable':>15} {'frozen':>18} {'total':>18} {'share':>8}")
        lines += [
            f"{row.target_set:12} {row.r:4} {row.count.trainable:15,} {row.count.frozen:18,} "
            f"{row.count.total:18,} {row.count.share:8.3%}"
            for row in self.table
        ]
        if self.own is not None:
            own = self.own
            lines += ["", f"this recipe: {own.trainable:,} trained of {own.total:,} ({own.share:.3%})"]
            lines += [f"  {part.name:20} {part.modules:4} modules {part.trainable:15,}" for part in own.by_module]
        return "\n".join(lines)


@explained()
def count(
    what: str,
    ranks: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = lambda _: None,
) -> Counted:
    """Count a recipe's adapter, or the adapters that a model could have. `what` is a recipe or names a model; `log` is
    told where its config alone is not enough, which takes longer. Raises RequestError for ranks that there are not."""
    ranks = ranks or RANKS
    if min(ranks) < 1:
        raise RequestError(f"--rank is {min(ranks)}; expected a positive whole number")
    if Path(what).suffix.lower() in (".yaml", ".yml"):
        recipe = load_recipe(Path(what), overrides)
        base = structure_named(recipe.model, log)
        own = count_adapter(base, with_planned_tokens(recipe, base).adapter)
        return Counted(recipe.model.model_name_or_path, own.frozen, count_table(base, ranks), own)
    base = structure_named(ModelConfig(model_name_or_path=what), log)
    return Counted(what, base.parameters, count_table(base, ranks))
