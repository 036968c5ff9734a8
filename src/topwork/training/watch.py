"""Watching the curves."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from topwork.training.checkpoint import TrainState, Validation

_IDLE = re.compile(r"\blora_(embedding_)?A\b")
CONSECUTIVE = 2
"""So many validations in a row must rise before it is called overfitting and not noise."""
PIECE = 1 << 20
"""Values that are summed at a time."""


def overfitting_since(history: Sequence[Validation]) -> int | None:
    """The step of the last good validation, where each of the last two was higher than the one before it while the
    training loss fell; told once of a run, when it shows first."""
    if not _rising(history) or any(_rising(history[:earlier]) for earlier in range(len(history))):
        return None
    return history[-1 - CONSECUTIVE].step


def _rising(history: Sequence[Validation]) -> bool:
    recent = history[-1 - CONSECUTIVE :]
    if len(recent) <= CONSECUTIVE:
        return False
    pairs = list(zip(recent, recent[1:]))
    losses_rise = all(after.eval_loss > before.eval_loss for before, after in pairs)
    trained = [entry.train_loss for entry in recent if entry.train_loss is not None]
    return losses_rise and len(trained) >= 2 and trained[-1] < trained[0]


def worse_than_base(state: TrainState, best: bool, begun_from: str | None = None) -> str | None:
    """What is to be told where the bare base, or the adapter that this one began from, had a validation loss as low as
    the adapter that is kept, which is the `best` or the last; None where it was higher, or nothing was validated."""
    history = state.history
    if len(history) < 2 or history[0].step != 0:
        return None
    kept = min(history[1:], key=lambda one: one.eval_loss) if best else history[-1]
    before = history[0].eval_loss
    if kept.eval_loss < before:
        return None
    first = "the base without the adapter" if begun_from is None else f"{begun_from}, from which it began,"
    return (
        f"{first} is {'better' if kept.eval_loss > before else 'as good'}: its validation loss "
        f"is {before:.4f}, and {kept.eval_loss:.4f} with the adapter of step {kept.step}, the "
        f"{'best' if best else 'last'} of this run. A lower learning rate, more rows or other ones may help; until "
        f"then take {'the base alone' if begun_from is None else 'that'}"
    )


class FirstWeights:
    """What trained tensors began as, in a number each: whether training has moved any of them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters, self._first = parameters, _bits(parameters)

    def unmoved(self) -> bool:
        """Whether the adapter learned nothing. LoRA's A does not count: weight decay alone moves it, and while B is
        zero it changes nothing."""
        now = _bits(self._parameters)
        return all(now[name] == first for name, first in self._first.items() if not _IDLE.search(name))


def _bits(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """The sum of each tensor's values, their bits read as whole numbers: computed where it lies, and read at once."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [_sum(tensor.detach().view(whole[tensor.element_size()])) for tensor in parameters.values()]
    return dict(zip(parameters, torch.stack(sums).tolist() if sums else []))


def _sum(numbers: Tensor) -> Tensor:
    """In int64, piece by piece: torch makes an int64 copy of what it sums so, twice an embedding's own bytes."""
    return torch.stack([piece.sum(dtype=torch.int64) for piece in numbers.flatten().split(PIECE)]).sum()
