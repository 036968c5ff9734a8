"""`topwork compare`: how alike two adapters' changes of their base are."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from topwork.common.os_errors import explained
from topwork.merging.combine.places import alone
from topwork.merging.likeness import Likeness, likeness, overall
from topwork.run.combining.sources import Sources, read_sources

HEAD = f"{'':34}{'cosine':>9}{'norm A':>11}{'norm B':>11}{'A in B':>17}{'B in A':>17}"
NOTE = (
    "cosine of the deltas, and their norms; A in B: the share of A's energy that lies in B's column space / in its row "
    "space (what it writes / what it reads)"
)


@dataclass(frozen=True)
class Comparison:
    """Two adapters: what they and their bases are called, how many modules each changes `only` itself, each module's
    likeness in the model's order, and that over all of them."""

    labels: tuple[str, str]
    bases: tuple[str | None, str | None]
    only: dict[str, int]
    modules: dict[str, Likeness]
    overall: Likeness

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_text(self, layers: bool = False) -> str:
        """A table: a row for each kind of module over all layers, or with `layers` each module."""
        groups: dict[str, list[Likeness]] = {}
        for path, found in self.modules.items():
            groups.setdefault(path if layers else _kind(path), []).append(found)
        lines = [
            f"A: {self.labels[0]}   B: {self.labels[1]}",
            HEAD + (f"{'A / W':>10}{'B / W':>10}" if self._has_base else ""),
        ]
        for name, alike in groups.items():
            told = name if layers else f"{name} ({len(alike)})"
            lines.append(_row(told, overall(alike), self._has_base))
        lines += [_row(f"all ({len(self.modules)})", self.overall, self._has_base), NOTE]
        lines += [f"{label} alone changes {count} modules" for label, count in self.only.items() if count]
        return "\n".join(lines)

    @property
    def _has_base(self) -> bool:
        return self.overall.base is not None


@explained()
def compare_adapters(
    first: Path | str,
    second: Path | str,
    model: str | None = None,
    with_base: bool = False,
    force: bool = False,
    log: Callable[[str], None] = print,
) -> Comparison:
    """Compare the adapters of two runs or PEFT folders; `with_base` reads the base's weights too, for norms beside
    theirs. Adapters of different bases are refused unless `force`. Raises RequestError and AdapterError."""
    read = read_sources([Path(first), Path(second)], model, force, log)
    norm = _base_norm(read) if with_base else None
    found = likeness(read.changes[0], read.changes[1], norm)
    bases = tuple(given.saved.base.name for given in read.given)
    return Comparison(
        (read.labels[0], read.labels[1]),
        (bases[0], bases[1]),
        alone(read.changes),
        found,
        overall(list(found.values())),
    )


def _base_norm(read: Sources) -> Callable[[str], float]:
    """‖W‖ of the base's parameter by its name."""
    weights = read.changes[0].base
    return lambda name: float(torch.linalg.vector_norm(weights(name), dtype=torch.float64))


def _kind(path: str) -> str:
    """A module's name without its layer; a parameter's with its module's."""
    names = path.split(".")
    return ".".join(names[-2:]) if names[-1] in ("weight", "bias") else names[-1]


def _row(name: str, found: Likeness, with_base: bool) -> str:
    def told(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def pair(side: int) -> str:
        return f"{told(found.columns[side], '.1%')} / {told(found.rows[side], '.1%')}"

    row = f"{name:<34}{told(found.cosine, '+.3f'):>9}{found.norms[0]:>11.4g}{found.norms[1]:>11.4g}"
    row += f"{pair(0):>17}{pair(1):>17}"
    if with_base and found.base:
        row += "".join(f"{norm / found.base:>10.3%}" for norm in found.norms)
    return row
