"""How many rows plain torch takes at once."""

from torch import Tensor

CACHED_VALUES = 1 << 17
"""How many values of an elementwise product stay in a core's cache."""


def rows_at_once(x: Tensor) -> int:
    """Of x [T, n], for work on all of its values: on the CPU as many rows as stay in the cache, else all."""
    return max(1, CACHED_VALUES // x.shape[1] if x.is_cpu else len(x))
