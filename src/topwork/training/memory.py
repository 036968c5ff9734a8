"""What training takes of memory, part by part and moment by moment: the one model of it, by which runs are planned and
which `topwork plan` prints. Free of torch.

    loading   the base as it is read                        memory_held.py
    forward   what is held, and what a pass keeps           memory_layers.py
    loss      the same with a chunk of logits
    backward  the same with what going backward needs
    update    what is held, and what the optimizer needs
    saving    what is held, and a checkpoint on its way

What is held from step to step: weights and their constants, adapters, gradients, optimizer states, and the process
(`memory_process.py`). On a CPU the blocks of a pass stay too (`ops/workspace.py`).
"""

from bisect import bisect_left

from topwork.training.config import Checkpointing
from topwork.training.memory_pass import all_moments
from topwork.training.memory_setup import Member, Part, PassShape, Setup, Usage

__all__ = [
    "Member", "Part", "PassShape", "Setup", "Usage", "fits", "fitting_pass", "largest_pass", "moments", "needed_bytes",
    "peak",
]  # fmt: skip


def moments(setup: Setup, shape: PassShape, checkpointed_layers: int = 0) -> list[Usage]:
    """What is held at each moment of a run, in its order."""
    return all_moments(setup, shape, checkpointed_layers)


def peak(setup: Setup, shape: PassShape, checkpointed_layers: int = 0) -> Usage:
    """The moment that takes most."""
    return max(moments(setup, shape, checkpointed_layers), key=lambda usage: usage.bytes)


LARGEST_PASS = {"cpu": 2048, "cuda": 16384}
"""Beyond these a larger pass is no faster."""
FAST_PASS = {"cpu": 512, "cuda": 4096}
"""Down to these a smaller pass is hardly slower, so that it comes before checkpointing."""
SMALLEST_PASS = 256
"""Where memory asks for less, less would not help: the weights themselves do not fit."""
MARGIN = {"cpu": 1.07, "cuda": 1.04}
"""How many times what is planned a run may take: on a CPU the furthest that one was above, in docs/planning-errors.md,
by holes in the C library's heap; on a card, which has no such heap, the aim that page is held to."""


def largest_pass(
    setup: Setup, memory_bytes: int, learned_share: float, longest: int, checkpointing: Checkpointing = "auto"
) -> tuple[int, int] | None:
    """(tokens_per_pass, checkpointed_layers) of the largest pass with which a run fits into `memory_bytes`, the process
    included; None where none does.

    Smaller passes come before checkpointing while they are as fast as large ones; only then as few layers as fit are
    checkpointed, and passes smaller still are for where even that leaves too little. A pass holds at least the
    `longest` sequence.
    """
    found, layers = fitting_pass(setup, memory_bytes, learned_share, longest, checkpointing)
    return (found, layers) if fits(setup, memory_bytes, found, learned_share, longest, layers) else None


def fitting_pass(
    setup: Setup, memory_bytes: int, learned_share: float, longest: int, checkpointing: Checkpointing = "auto",
    asked: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """The same, or what needs least where nothing fits; with a size that was `asked` for, that, and the layers."""

    def enough(tokens: int, layers: int) -> bool:
        return fits(setup, memory_bytes, tokens, learned_share, longest, layers)

    def tokens(layers: int, least: int) -> int:
        if asked is not None:
            return asked
        budget = LARGEST_PASS[setup.device]
        while budget > max(least, SMALLEST_PASS) and not enough(max(budget, longest), layers):
            budget //= 2
        return max(budget, longest)

    every = setup.structure.checkpointable
    if checkpointing != "auto":  # where none can be, it is refused when it is switched on
        layers = int({"off": 0, "full": every or setup.structure.layers}.get(str(checkpointing), checkpointing))
        return tokens(layers, 1), layers
    found, most = tokens(0, FAST_PASS[setup.device]), max(0, every - 1)  # the last would be wanted again at once
    layers = 0  # from the first checkpointed layer on each more saves some
    if not enough(found, 0):
        layers = min(most, bisect_left(range(most + 1), True, lo=1, key=lambda count: enough(found, count)))
    return (min(found, tokens(layers, 1)) if layers == most else found), layers


def fits(
    setup: Setup, memory_bytes: int, tokens: int, learned_share: float, longest: int, checkpointed_layers: int
) -> bool:
    """Whether a run in passes of so many tokens does."""
    return needed_bytes(setup, tokens, learned_share, longest, checkpointed_layers) <= memory_bytes


def needed_bytes(setup: Setup, tokens: int, learned_share: float, longest: int, checkpointed_layers: int) -> int:
    """What a run is planned to need, so that it surely has it: its peak with the margin."""
    shape = PassShape(tokens, max(1, round(learned_share * tokens)), min(longest, tokens))
    return round(MARGIN[setup.device] * peak(setup, shape, checkpointed_layers).bytes)
