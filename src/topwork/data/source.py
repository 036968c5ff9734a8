"""Where the rows of a training step come from."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from topwork.common.errors import DataError, RunError
from topwork.data.batches import Order
from topwork.data.examples import Example, grouped
from topwork.data.streaming.examples import StreamedExamples, Visits


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
        self._order = Order(len(self.units), batch_size, seed)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    def examples(self, step: int) -> list[Example]:
        return [row for at in self._order.step(step) for row in self.units[at]]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


class StreamedRows:
    """Rows that are read from disk for each step, in the order in which `FixedRows` would have them: where a step goes
    on follows from its number. The sequences of a row stay in its step.

    A row that turns out to be left out (too long, or refused by the template, where the recipe drops such) makes its
    step smaller and changes no other; a step of which nothing is left takes the rows of the next that has some.
    """

    def __init__(self, rows: StreamedExamples, batch_size: int, seed: int) -> None:
        self.rows, self.read = rows, Visits()
        self._order = Order(len(rows), batch_size, seed)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    def examples(self, step: int) -> list[Example]:
        """Raises RunError for a row that the recipe refuses, and where a file has changed."""
        self.rows.check_unchanged()
        for later in range(step, step + self.steps_per_epoch):
            try:
                taken = self.rows.take(self._order.step(later))
            except DataError as error:
                raise RunError(
                    f"step {step + 1}: {error}\nWith streaming, such rows are found when a step needs them. The "
                    "checkpoints before it stay: go on with --resume, and with data.too_long or data.on_bad_row other "
                    "than refuse"
                ) from error
            self.read.add(taken.counts, taken.notes)
            if taken.examples:
                return taken.examples
        raise RunError(f"step {step + 1}: no row is left to learn from\n" + "\n".join(self.read.told()))

    def state(self) -> dict[str, Any]:
        return self.read.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.read = Visits.of(state)


def rows_of(rows: Sequence[Example], batch_size: int, seed: int) -> FixedRows | StreamedRows:
    """The source of a data set's rows, held or streamed."""
    if isinstance(rows, StreamedExamples):
        return StreamedRows(rows, batch_size, seed)
    return FixedRows(rows, batch_size, seed)
