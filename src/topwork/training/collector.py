"""Python's garbage collector, which need not look at a model again and again."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def looked_through_once() -> Iterator[None]:
    """What the first full collection within leaves is not looked through again before the end.

    A step's autograd nodes live from its forward to its backward pass, and bring a full collection every twenty steps,
    0.25 s for the 430,000 objects of transformers and of a model's modules. All of them are still freed as soon as
    nobody holds them, but for cycles, which wait for the end.
    """

    frozen = False

    def freeze(phase: str, info: dict[str, Any]) -> None:
        nonlocal frozen
        if phase == "stop" and info["generation"] == 2 and not frozen:
            gc.freeze()
            frozen = True

    if gc.get_freeze_count():  # somebody else's, and to thaw it is not ours
        yield
        return
    gc.callbacks.append(freeze)
    try:
        yield
    finally:
        gc.callbacks.remove(freeze)
        gc.unfreeze()
