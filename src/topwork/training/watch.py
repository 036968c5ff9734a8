"""Watching the curves."""

from collections.abc import Sequence

from topwork.training.checkpoint import Validation

CONSECUTIVE = 2
"""So many validations in a row must rise before it is called overfitting and not noise."""


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
