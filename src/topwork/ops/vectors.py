"""The vectors that adapters learn at a group of projections, each for some rows: gains on inputs (IA3), shifts of
outputs (BitFit's bias), gains on outputs (DoRA's magnitude, IA3). What each does to values: `ops/gain.py`.

The base's products see inputs with their gains, low-rank terms see them without; outputs are shifted, then multiplied.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from topwork.ops.context import scratch_empty
from topwork.ops.gain import add_, column_sums, gain_gradients_, input_gain_gradients_, multiply_


@dataclass(frozen=True)
class Gain:
    """The outputs (or inputs) of rows start:stop times `factor` [out] (or [in]) in fp32, which learns; of outputs the
    bias too, or only what is added to it."""

    start: int
    stop: int
    factor: Tensor
    with_bias: bool = True

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Shift:
    """`amount` [out] in fp32, which learns, on top of the outputs of rows start:stop."""

    start: int
    stop: int
    amount: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class PlacedGain(NamedTuple):
    """A gain, its columns in the group's output, and the bias that it leaves alone."""

    gain: Gain
    columns: slice
    left_alone: Tensor | None


class PlacedShift(NamedTuple):
    """A shift, and its columns in the group's output."""

    shift: Shift
    columns: slice


@dataclass(frozen=True)
class Vectors:
    """Those of a group."""

    inputs: tuple[Gain, ...] = ()
    shifts: tuple[PlacedShift, ...] = ()
    gains: tuple[PlacedGain, ...] = ()

    @property
    def learned(self) -> list[Tensor]:
        """The vectors, in the order of their gradients: of inputs, then of outputs."""
        outputs = [*(placed.shift.amount for placed in self.shifts), *(placed.gain.factor for placed in self.gains)]
        return [*(gain.factor for gain in self.inputs), *outputs]

    def scaled(self, n: Tensor, given: Tensor) -> Tensor:
        """n [T, in] as the base sees it: in n's own memory, unless n is what was `given` to the group."""
        if self.inputs and n is given:
            n = scratch_empty(n, *n.shape).copy_(n)
        for gain in self.inputs:
            multiply_(n[gain.rows], gain.factor)
        return n

    def change_(self, out: Tensor) -> None:
        """The products [T, outputs] become the outputs."""
        for shift, columns in self.shifts:
            add_(out[shift.rows, columns], shift.amount)
        for gain, columns, left_alone in self.gains:
            multiply_(out[gain.rows, columns], gain.factor, left_alone)

    def output_gradients_(self, dout: Tensor, out: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The gradient of the products, and those of shifts and of gains. Where there are gains it takes the place of
        `out`: whoever took that is done, and another buffer of this size would raise the peak in every layer."""
        factors = []
        if out is not None:
            for gain, columns, left_alone in self.gains:
                at = gain.rows, columns
                factors.append(gain_gradients_(out[at], dout[at], gain.factor, left_alone))
            for at in self._without_gain(out):
                out[at].copy_(dout[at])
            dout = out
        return dout, [*(column_sums(dout[shift.rows, columns]) for shift, columns in self.shifts), *factors]

    def input_gradients_(self, n: Tensor, dn: Tensor) -> list[Tensor]:
        """Those of the inputs' gains, from n without them; dn [T, in] of the base's products becomes that of n."""
        return [input_gain_gradients_(n[gain.rows], dn[gain.rows], gain.factor) for gain in self.inputs]

    def _without_gain(self, out: Tensor) -> Iterator[tuple[slice, slice]]:
        """The rest of `out`, as rows and columns."""
        ends = sorted({0, out.shape[1], *(end for _, own, _ in self.gains for end in (own.start, own.stop))})
        for columns in map(slice, ends, ends[1:]):
            inside = [gain for gain, own, _ in self.gains if own.start <= columns.start < own.stop]
            rows = sorted((gain.start, gain.stop) for gain in inside)
            for (_, before), (after, _) in pairwise([(0, 0), *rows, (len(out), len(out))]):
                if before < after:
                    yield slice(before, after), columns
