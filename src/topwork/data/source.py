"""Where the rows of a training step come from."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from topwork.data.batches import step_indices, steps_per_epoch
from topwork.data.examples import Example, grouped


class RowSource(Protocol):
    """Gives the rows of every optimizer step. The loop asks once a step, in order; after a resume it asks again from
    the step of the checkpoint on, and the same rows have to come.

    A source may run the model (rollouts): it is asked between steps. Dropout is on in an adapter that trains, so it
    runs it inside `Adapters.evaluating(name)`.
    """

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps after which every row was seen once; None where there is no such thing."""
        ...

    def examples(self, step: int) -> Sequence[Example]:
        """The rows of optimizer step `step`, counted from 0; at least one."""
        ...

    def state(self) -> dict[str, Any]:
        """What `restore` needs beside the step, as JSON holds it, in a value of its own: it is asked for after every
        step, and stands in the checkpoint of that step, which may be written once the next rows have been asked for."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...


class FixedRows:
    """A data set, in an order that the seed and the epoch decide alone: there is no state. Rows of a group come in one
    step and in their order, and count as one of its `batch_size`."""

    def __init__(self, rows: Sequence[Example], batch_size: int, seed: int) -> None:
        self.units = [[rows[number] for number in own] for own in grouped(rows)]
        self.batch_size, self.seed = batch_size, seed

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.units), self.batch_size)

    def examples(self, step: int) -> list[Example]:
        chosen = step_indices(len(self.units), self.batch_size, self.seed, step)
        return [row for at in chosen for row in self.units[at]]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass
