"""What a step hands to the model, and who runs it: sequences' next rows, over paged keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

VIRTUAL = -1
"""In the place of a token: a learned one that the adapter has in front of its texts (prompt and prefix tuning)."""


@dataclass(frozen=True)
class Rows:
    """Rows of one sequence, one after the other: one token while it is decoded, a chunk while its prompt is read.

    tokens   their ids; the adapter's own virtual tokens are VIRTUAL, at the sequence's first positions
    first    the position of the first, which is how many are in the cache already
    blocks   the pool's blocks that hold the sequence, by position; with room for these rows
    adapter  None is the bare base
    wanted   whether the logits after the last of them are looked at
    """

    tokens: Sequence[int]
    first: int
    blocks: Sequence[int]
    adapter: str | None
    wanted: bool


class Runner(Protocol):
    """Runs rows through the model.

    The logits of a row depend on its own sequence alone, to the bit: not on other rows of the pass, their order, or how
    a prompt was cut.
    """

    most_rows: int
    """How many a pass takes."""

    def run(self, rows: Sequence[Rows]) -> Tensor:
        """Writes their keys and values to the pool; fp32 logits [n, V] of those that are wanted, in order, which
        are read before it runs again. All rows of one adapter stand together."""
        ...

    def begin(self) -> None:
        """Weights do not change from here to `end`."""
        ...

    def end(self) -> None:
        """Nothing runs: weights may change."""
        ...

    def forget(self, adapter: str) -> None:
        """It will not come again."""
        ...
