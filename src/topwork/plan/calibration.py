"""What is to be measured of a machine, and what a measurement says of a step. Free of torch.

A measurement (`run/calibrate.py`) runs steps of the very model with fewer layers, a and b of L:

    layer = (t_b - t_a) / (b - a)        recomputed = (t_b with all layers checkpointed - t_b) / b
    step  = t_b + (L - b) layer + k recomputed
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from topwork.plan.time import Speed, step_seconds
from topwork.plan.work import pass_work
from topwork.training.memory_setup import PassShape, Setup

STEADY = 0.2
"""Half of the steps lie this near, relative to their median, where nobody else works on the machine; they lay within
0.01 to 0.1 there, and within 0.67 beside five other jobs."""


@dataclass(frozen=True)
class Rows:
    """The rows of a data set as a step meets them: means of their tokens, of the learned ones among these, and of what
    they attend to (sum l^2 / sum l), and the longest."""

    tokens: float
    learned: float
    attended: float
    longest: int


@dataclass(frozen=True)
class Question:
    """What was measured, or is asked for: members of `setup`, each with so many rows in a step, in passes of at most
    so many tokens."""

    setup: Setup
    rows: Rows
    batch_size: int
    tokens_per_pass: int
    checkpointed_layers: int

    @property
    def step_tokens(self) -> float:
        """Of all members."""
        return self.rows.tokens * self.batch_size * len(self.setup.members)

    @property
    def passes(self) -> float:
        """That a step's rows fill, at least; the last is rarely full."""
        return max(1.0, self.step_tokens / self.tokens_per_pass)

    @property
    def shape(self) -> PassShape:
        """Of an average pass."""
        tokens = self.step_tokens / self.passes
        learned = tokens * self.rows.learned / self.rows.tokens
        return PassShape(max(1, round(tokens)), max(1, round(learned)), self.rows.longest)

    def reckoned(self, speed: Speed) -> float:
        """Seconds of a step at a speed."""
        attended = self.rows.attended
        return step_seconds(self.setup, self.shape, self.checkpointed_layers, speed, self.passes, attended)

    def flops(self) -> float:
        """Floating-point operations of a step."""
        work = pass_work(self.setup, self.shape, self.checkpointed_layers, self.rows.attended)
        return work.flops * self.passes

    def key(self) -> dict[str, Any]:
        """What makes two questions the same, as plain values."""
        base, quantization = self.setup.structure, self.setup.quantization
        shape = (base.layers, base.hidden, base.inner, base.heads, base.key_value_heads, base.head_dim, base.vocabulary)
        return {
            "base": [base.family, *shape, self.setup.dtype],
            "quantization": _said(quantization.model_dump(mode="json"), type(quantization)().model_dump(mode="json")),
            "members": [
                {
                    **member.adapter.model_dump(mode="json", exclude_none=True, exclude={"init_from"}),
                    "optim": member.optim,
                }
                for member in self.setup.members
            ],
            "rows": [round(self.rows.tokens), round(self.rows.learned), round(self.rows.attended), self.rows.longest],
            "batch_size": self.batch_size,
            "tokens_per_pass": self.tokens_per_pass,
            "checkpointed_layers": self.checkpointed_layers,
            "device": self.setup.device,
        }


@dataclass(frozen=True)
class Arm:
    """A model of `layers` layers, the first so many of them checkpointed, and what its steps took, round by round."""

    layers: int
    checkpointed: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """Seconds of a step on this machine, and how sure they are.

    layer, recomputed  of it for a layer, and for checkpointing one more; None where the whole model was measured
    spread   quartiles of the rounds' steps, over their median
    load     the machine's load average before
    """

    step: float
    layer: float | None
    recomputed: float | None
    spread: float
    load: float
    layers: tuple[int, ...]
    rounds: int

    @property
    def unsteady(self) -> bool:
        """Whether others worked on the machine meanwhile, so that a quiet hour may give another number."""
        return self.spread > STEADY


def measured(arms: Sequence[Arm], layers: int, checkpointed_layers: int, load: float) -> Measured:
    """What arms that took turns say of a model of so many layers; each round is one estimate, and the median counts."""
    plain = sorted(
        (arm for arm in arms if arm.checkpointed in (0, arm.layers)), key=lambda arm: (arm.layers, arm.checkpointed)
    )
    rounds = min(len(arm.seconds) for arm in arms)
    if len(arms) == 1:
        return _summed(list(arms[0].seconds), None, None, arms, load)
    least, most = plain[0], plain[1]
    span = most.layers - least.layers
    each = [(b - a) / span for a, b in zip(least.seconds[:rounds], most.seconds)]
    layer = max(0.0, median(each))
    repeated = next((arm for arm in arms if arm.layers == most.layers and arm is not most), None)
    more = [] if repeated is None else [(c - b) / most.layers for b, c in zip(most.seconds[:rounds], repeated.seconds)]
    recomputed = max(0.0, median(more)) if more else 0.0
    extra = checkpointed_layers * recomputed if more else 0.0
    steps = [b + (layers - most.layers) * layer + extra for b in most.seconds[:rounds]]
    return _summed(steps, layer, recomputed if more else None, arms, load)


def _summed(
    steps: list[float], layer: float | None, recomputed: float | None, arms: Sequence[Arm], load: float
) -> Measured:
    middle = median(steps)
    quarters = sorted(steps)[len(steps) // 4], sorted(steps)[-1 - len(steps) // 4]
    spread = (quarters[1] - quarters[0]) / middle if middle else 0.0
    return Measured(middle, layer, recomputed, spread, load, tuple(sorted({arm.layers for arm in arms})), len(steps))


def planned_arms(
    question: Question, speed: Speed, seconds: float, most_layers: int, rounds: int = 4
) -> list[tuple[int, int]]:
    """(layers, checkpointed ones) of the models to measure: the whole one where its rounds take no longer than
    `seconds` at a speed that is a guess, else one of few layers and the largest that does, of at most so many."""
    layers, repeated = question.setup.structure.layers, question.checkpointed_layers

    def cost(models: Sequence[tuple[int, int]]) -> float:
        one = sum(
            replace(question, setup=fewer_layers(question.setup, n), checkpointed_layers=k).reckoned(speed)
            for n, k in models
        )
        return (rounds + 1) * one

    if most_layers >= layers and (layers < 3 or cost([(layers, repeated)]) <= seconds):
        return [(layers, repeated)]
    best: list[tuple[int, int]] = []
    for most in range(2, min(layers, most_layers) + 1):
        least = max(1, most // 4)
        whole = repeated >= layers
        models = [(n, n if whole else 0) for n in (least, most)] + ([(most, most)] if 0 < repeated < layers else [])
        if best and cost(models) > seconds:
            break
        best = models
    return best or [(1, 0), (2, 0)]


def fewer_layers(setup: Setup, layers: int) -> Setup:
    """The same with the first layers alone."""
    base = setup.structure
    kept = tuple(module for module in base.modules if module.path in base.beside or _number(module.path) < layers)
    paths = {module.path for module in kept}
    members = tuple(
        replace(member, sizes={path: sizes for path, sizes in member.sizes.items() if path in paths})
        for member in setup.members
    )
    cut = replace(base, modules=kept, layers=layers, checkpointable=min(layers, base.checkpointable))
    return replace(setup, structure=cut, members=members)


def _number(path: str) -> int:
    """The layer that a module is in; -1 for none."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), -1)


def rows_of(lengths: Sequence[tuple[int, int]]) -> Rows:
    """Means of rows of (tokens, learned tokens)."""
    tokens = [length for length, _ in lengths]
    total = sum(tokens)
    return Rows(
        total / len(tokens),
        sum(learned for _, learned in lengths) / len(tokens),
        sum(length**2 for length in tokens) / total,
        max(tokens),
    )


def spread_rows(
    mean: float, learned_share: float, longest: int, percentiles: Mapping[int, int], count: int = 64
) -> list[tuple[int, int]]:
    """Rows of (tokens, learned tokens) that have this mean, longest row and these percentiles, about: lengths rise in
    straight lines from one to the next, from whatever the shortest must be for the mean."""
    knots = [(share / 100, float(length)) for share, length in sorted(percentiles.items())] + [(1.0, float(longest))]
    above = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in zip(knots, knots[1:]))
    share, first = knots[0]
    shortest = min(first, max(1.0, 2 * (mean - above) / share - first))
    knots = [(0.0, shortest), *knots]

    def length_at(share: float) -> float:
        (left, low), (right, high) = next(pair for pair in zip(knots, knots[1:]) if share <= pair[1][0])
        return low + (high - low) * (share - left) / (right - left) if right > left else high

    drawn = [length_at((number + 0.5) / count) for number in range(count)]
    factor = min(1.0, mean * count / sum(drawn))  # lengths that crowd below the first percentile
    lengths = [min(longest, max(2, round(length * factor))) for length in drawn]
    return [(length, min(length - 1, max(1, round(length * learned_share)))) for length in lengths]


def _said(given: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from its default."""
    return {name: value for name, value in given.items() if value != default[name]}
