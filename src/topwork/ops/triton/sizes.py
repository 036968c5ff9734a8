"""Whole numbers of the host's side of a launch. Triton's own are made to be called in kernels too, and were most of
what a launch cost the host."""


def cdiv(values: int, by: int) -> int:
    """How many times `by` holds them all."""
    return -(-values // by)


def power_of_2(values: int) -> int:
    """The smallest that is not below them; 1 for none."""
    return 1 << max(0, values - 1).bit_length()
