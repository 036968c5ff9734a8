"""Frozen layers and the low-rank terms of adapters as the kernels take them that make several groups of projections in
one call (native/terms.h)."""

import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.bundles import LowRank
from topwork.ops.context import scratch_empty
from topwork.ops.grouped import MOST_ADDENDS, ON_AMX
from topwork.ops.native import load as native
from topwork.ops.packed import Packed
from topwork.ops.projection import Projection

PART, TERM = struct.Struct("7q"), struct.Struct("10qd3qd")
"""As terms.h has a layer and a term."""
MOST_OPENED = 32 << 20
"""Bytes of packed weights that are made dense together: panels of larger ones are not worth less."""
NOT_ON_AMX = 2
"""A kernel's answer where it is not compiled for it."""


class Placed(NamedTuple):
    """A term, and the number of the layer that it is added to."""

    term: LowRank
    part: int


def on_amx() -> bool:
    """Whether the kernels are there, and made for AMX."""
    library = native.compiled("decoder")
    return library is not None and bool(library.topwork_decoder_level() == ON_AMX)


def placed_terms(groups: Sequence[Sequence[Projection]], dtype: torch.dtype) -> tuple[Placed, ...] | None:
    """The terms of groups of layers that follow one another; None where the kernels do not know what is there: they
    know weights of `dtype`, biases and plain terms."""
    found: list[Placed] = []
    first = 0
    for group in groups:
        before, biases = len(found), 0
        for part, layer in enumerate(group, first):
            if not is_plain(layer) or not _fits(layer, dtype):
                return None
            biases += layer.bias is not None
            found += (Placed(term, part) for term in layer.terms)
        found[before:] = _together(found[before:])
        if len(found) - before + biases > MOST_ADDENDS:
            return None
        first += len(group)
    fits = openable([layer.weight for group in groups for layer in group])
    return tuple(found) if fits and all(_is_placeable(term) for term, _ in found) else None


def _fits(layer: Projection, dtype: torch.dtype) -> bool:
    weight, bias = layer.weight, layer.bias
    if bias is not None and not (bias.dtype in native.KINDS and bias.is_contiguous()):
        return False
    return weight.dtype == dtype and (isinstance(weight, Packed) or weight.stride(1) == 1)


def is_plain(layer: Projection) -> bool:
    """Whether it is a product and low-rank terms alone."""
    return not (layer.gains or layer.shifts or layer.input_gains)


def _together(terms: Sequence[Placed]) -> list[Placed]:
    """Those that see the same of the same rows one after the other, as `bundled` has them."""
    shared: dict[tuple[object, ...], list[Placed]] = defaultdict(list)
    for placed in terms:
        dropout = placed.term.dropout
        drops = dropout and (dropout.p, dropout.key)
        shared[placed.term.start, placed.term.stop, drops].append(placed)
    return [placed for those in shared.values() for placed in those]


def _is_placeable(term: LowRank) -> bool:
    draws = None if term.dropout is None else term.dropout.seeds
    masters = all(x.dtype == torch.float32 and x.is_contiguous() for x in (term.a, term.b))
    return masters and (draws is None or (draws.dtype == torch.int64 and draws.is_contiguous()))


def check_terms(terms: Iterable[Placed], sizes: Sequence[tuple[int, int]], rows: int) -> None:
    """Raises ValueError for what does not belong to layers of (outputs, inputs): a kernel sees bare memory."""
    for term, part in terms:
        (outputs, inputs), r = sizes[part], len(term.a)
        if term.a.shape != (r, inputs) or term.b.shape != (outputs, r) or not 0 <= term.start <= term.stop <= rows:
            raise ValueError(
                f"a term of rows {term.start}:{term.stop} with A {tuple(term.a.shape)} and B {tuple(term.b.shape)}, "
                f"where rows of {rows}, {inputs} inputs and {outputs} outputs are expected"
            )
        if term.dropout is not None and not (len(term.dropout.seeds) == term.stop - term.start and _is_placeable(term)):
            raise ValueError(
                f"a term of rows {term.start}:{term.stop} with dropout seeds {native.told(term.dropout.seeds)}, "
                "where one for each row is expected, in contiguous int64"
            )


def openable(weights: Sequence[Tensor | Packed]) -> bool:
    """Whether what is packed of them is little enough to be made dense all at once."""
    return sum(2 * w.shape[0] * w.shape[1] for w in weights if isinstance(w, Packed)) <= MOST_OPENED


def opened(group: Sequence[Tensor | Packed]) -> list[Tensor]:
    """A group's weights; of packed ones what they stand for, inside of `scratch_scope` gone when that ends. These lie
    behind one another: how the input's gradient is rounded must not depend on where memory was."""
    packed = [weight for weight in group if isinstance(weight, Packed)]
    if len(packed) < len(group):
        return [_dense(weight) for weight in group]
    return list(opened_whole(packed).split([int(weight.shape[0]) for weight in packed]))


def opened_whole(group: Sequence[Packed]) -> Tensor:
    """The same of packed ones, as one."""
    rows = [int(weight.shape[0]) for weight in group]
    whole = scratch_empty(group[0].codes, sum(rows), group[0].shape[1], dtype=group[0].dtype)
    for packed, out in zip(group, whole.split(rows)):
        packed.write(out)
    return whole


def _dense(weight: Tensor | Packed) -> Tensor:
    if not isinstance(weight, Packed):
        return weight
    out = scratch_empty(weight.codes, *weight.shape, dtype=weight.dtype)
    weight.write(out)
    return out


def part_lines(weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> list[bytes]:
    """A group's layers as the kernel has them."""
    lines, column = [], 0
    for weight, bias in zip(weights, biases or [None] * len(weights)):
        outputs, inputs = weight.shape
        its = (0, 0) if bias is None else (bias.data_ptr(), native.KINDS[bias.dtype])
        lines.append(PART.pack(weight.data_ptr(), weight.stride(0), *its, inputs, outputs, column))
        column += outputs
    return lines


def term_line(placed: Placed, s: int, g: int = 0, da: Tensor | None = None, db: Tensor | None = None) -> bytes:
    """A term as the kernel has it, with the addresses of S and G."""
    term, part = placed
    a, b = term.a, term.b
    learned = (0, 0) if da is None or db is None else (da.data_ptr(), db.data_ptr())
    lost = (0, 0, 0, 1.0)
    if (dropout := term.dropout) is not None:
        lost = dropout.seeds.data_ptr(), dropout.key, dropout.least, dropout.scale
    return TERM.pack(
        a.data_ptr(), b.data_ptr(), s, g, *learned, a.shape[0], term.start, term.stop, part, term.scaling, *lost
    )  # fmt: skip
