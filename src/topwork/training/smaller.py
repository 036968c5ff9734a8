"""Passes that turn out to be larger than memory: half of one, from where the failed one began.

Nothing of a failed pass is left to count: no adapter was updated, its gradients are cleared, what drops out follows
from the row and the step, and rows that were drawn are drawn already. So smaller passes give the same step, to
rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from topwork.common.errors import DataError, RunError
from topwork.common.memory import out_of_memory
from topwork.ops.batch import Batch
from topwork.ops.workspace import Workspace

LEAST_TOKENS = 64
"""A pass that is smaller still saves nothing: what does not fit then is something else."""

Found = TypeVar("Found")


@dataclass
class PassSize:
    """How many tokens a pass may have.

    on_smaller  told of each new size; left out where the size was asked for, and a pass that does not fit ends the run
    """

    tokens: int
    on_smaller: Callable[[int, str], None] | None = None
    workspace: Workspace | None = field(default=None, repr=False)

    @property
    def free(self) -> bool:
        """Whether nobody asked for the size, so that a sequence that is longer may have a pass of its own: other steps
        go on with a size that is too small for it."""
        return self.on_smaller is not None

    def run(
        self, work: str, packed: Callable[[], Sequence[Batch]], run: Callable[[Sequence[Batch]], Found],
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> tuple[Found, Sequence[Batch]]:  # fmt: skip
        """What `run` finds in passes as `packed` makes them, and these. Raises RunError where they do not fit."""
        while True:
            passes = packed()
            try:
                return run(passes), passes
            except Exception as error:
                if not out_of_memory(error):
                    raise
                half = self._smaller(packed, _largest(passes))
                if half is None or self.on_smaller is None:
                    raise RunError(self._told(work, half)) from error
            del passes  # and the error, which holds what the pass kept
            for optimizer in optimizers:
                optimizer.zero_grad()
            if self.workspace is not None:
                self.workspace.release()
            self.tokens = half
            self.on_smaller(half, work)

    def _smaller(self, packed: Callable[[], Sequence[Batch]], largest: int) -> int | None:
        """The next half, or half of that, by which the largest pass gets smaller; None where none does."""
        whole = self.tokens
        try:
            while self.tokens // 2 >= LEAST_TOKENS:
                self.tokens //= 2
                if _largest(packed()) < largest:
                    return self.tokens
        except DataError:  # too little for a sequence
            pass
        finally:
            self.tokens = whole
        return None

    def _told(self, work: str, half: int | None) -> str:
        smaller = "" if half is None else f" training.tokens_per_pass={half} or --set"
        shorter = ", or begin anew with a smaller data.max_length" if half is None else ""
        return (
            f"out of memory {work} with {self.tokens} tokens per pass; the result does not depend on it, so go on with "
            f"--resume --set{smaller} training.activation_checkpointing=full{shorter}"
        )


def _largest(passes: Sequence[Batch]) -> int:
    return max(len(batch.tokens) for batch in passes)
