"""A pass of generation over a whole model in one call of C (native/decode.c), whose structures stand here once more.

A model is a list of steps over buffers (`models/steps.py`); a pass tells which rows are whose. The truth of all of it
is the model's own modules (`generation/module_runner.py`).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from topwork.ops.native import load as native
from topwork.ops.packed import Packed, Packed4bit, PackedInt8, constants
from topwork.ops.quantize import code_of

BRANCH, NORM, SCALE, INNER, PRODUCTS, HEADS, ATTEND, GATED = range(8)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
COLUMNS, PANEL, ROWS, QUERIES = 32, 16, 64, 32
"""As in decode.c and paged.h: what a task's memory is made for."""

SUBNORMAL = 1e-30
"""As in packed4.h: a block's constant from here on makes no subnormal values."""

_AT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Weight(ctypes.Structure):
    """A frozen weight [n, k], dense or packed."""

    _fields_ = [
        ("format", _LONG), ("at", _AT), ("absmax", _AT), ("nested", _AT), ("nested_code", _AT), ("code", _AT),
        ("bias", _AT), ("n", _LONG), ("k", _LONG), ("block", _LONG), ("offset", _DOUBLE), ("plain", _LONG),
    ]  # fmt: skip


class Part(ctypes.Structure):
    """What an adapter has at a place."""

    _fields_ = [
        ("a", _AT), ("b", _AT), ("rank", _LONG), ("alpha", _DOUBLE), ("gain", _AT), ("shift", _AT),
        ("input_gain", _AT), ("leaves_bias", _LONG), ("weight", _AT), ("bias", _AT),
    ]  # fmt: skip


class Attend(ctypes.Structure):
    """How a layer attends, and where its keys and values are."""

    _fields_ = [
        ("keys", _AT), ("values", _AT), ("heads", _LONG), ("size", _LONG), ("group", _LONG), ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float), ("window", _LONG), ("sinks", _AT),
    ]  # fmt: skip


class Step(ctypes.Structure):
    """One step over all rows."""

    _fields_ = [
        ("op", _LONG), ("in_", _AT), ("in_by", _LONG), ("out", _AT), ("out_by", _LONG), ("out_kind", _LONG),
        ("width", _LONG), ("stream", _AT), ("multiplier", _DOUBLE), ("norm", _AT), ("eps", _DOUBLE),
        ("unit_offset", _LONG), ("unrounded", _LONG), ("place", _LONG), ("count", _LONG), ("weights", _AT),
        ("inner", _AT), ("inner_by", _LONG), ("inner_apart", _LONG), ("attend", Attend), ("cos", _AT), ("sin", _AT),
        ("turned", _LONG), ("query_norm", _AT), ("key_norm", _AT), ("across_heads", _LONG), ("activation", _LONG),
    ]  # fmt: skip


class Segment(ctypes.Structure):
    """Rows of one adapter."""

    _fields_ = [("start", _LONG), ("stop", _LONG), ("parts", _AT)]


class Run(ctypes.Structure):
    """Rows of one sequence, the position of the first, and where its keys and values are."""

    _fields_ = [("start", _LONG), ("stop", _LONG), ("first", _LONG), ("blocks", _AT)]


class Pass(ctypes.Structure):
    """What a pass runs over."""

    _fields_ = [
        ("rows", _LONG), ("segments", _LONG), ("runs", _LONG), ("segment", _AT), ("run", _AT), ("run_of", _AT),
        ("terms", _LONG), ("input_gains", _LONG), ("scratch", _AT), ("scratch_each", _LONG), ("threads", _LONG),
    ]  # fmt: skip


STRUCTURES = (Weight, Part, Step, Segment, Run, Pass)


@dataclass
class Kept:
    """Tensors whose addresses were given to C: they live as long as this does."""

    tensors: list[Tensor] = field(default_factory=list)

    def at(self, tensor: Tensor | None) -> int | None:
        """Its address; None for None."""
        if tensor is None:
            return None
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def fp32(self, tensor: Tensor | None) -> int | None:
        """That of its values in fp32."""
        return None if tensor is None else self.at(tensor.detach().float().contiguous())


def weight_of(weight: Tensor | Packed, bias: Tensor | None, dtype: torch.dtype, kept: Kept) -> Weight | None:
    """A frozen linear layer as C takes it; None where it cannot be."""
    n, k = weight.shape
    if isinstance(weight, Tensor):
        if weight.dtype != dtype or weight.stride() != (k, 1):
            return None
        return Weight(format=0, at=kept.at(weight.detach()), bias=kept.fp32(bias), n=n, k=k)
    if isinstance(weight, PackedInt8):
        plain = weight.codes.is_contiguous() and weight.absmax.dtype == torch.float32
        if not plain or weight.dtype not in (dtype, torch.float32):
            return None
        return Weight(
            format=2,
            at=kept.at(weight.codes),
            absmax=kept.at(weight.absmax.contiguous()),
            bias=kept.fp32(bias),
            n=n,
            k=k,
        )
    if not isinstance(weight, Packed4bit) or weight.dtype not in (dtype, torch.float32):  # would be rounded twice
        return None
    nested = weight.nested_absmax is not None
    return Weight(
        format=1, at=kept.at(weight.codes.contiguous()), absmax=kept.at(weight.absmax.contiguous()),
        nested=kept.at(weight.nested_absmax), nested_code=kept.at(weight.nested_code if nested else None),
        code=kept.at(code_of(weight.quant_type, weight.codes.device)), bias=kept.fp32(bias), n=n, k=k,
        block=weight.block_size, offset=weight.offset, plain=_is_plain(weight),
    )  # fmt: skip


def _is_plain(weight: Packed4bit) -> bool:
    """Whether decode.c may look its values up as it multiplies."""
    blocks = weight.block_size % 32 == 0 and weight.shape[1] % weight.block_size == 0
    return blocks and bool((constants(weight) > SUBNORMAL).all())


def packed_ranks(b: Tensor, dtype: torch.dtype) -> Tensor:
    """B [out, r] as C reads it: [ceil(out / 16), ceil(r / u), 16, u], u ranks of 4 bytes together, filled up with
    zeros."""
    unit = 4 // dtype.itemsize
    out, r = b.shape
    whole = torch.zeros(-(-out // 16) * 16, -(-r // unit) * unit, dtype=dtype)
    whole[:out, :r] = b.detach().to(dtype)
    return whole.unflatten(1, (-1, unit)).unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def scratch_floats(rows: int, inputs: int, rank: int, size: int) -> int:
    """What a thread's tasks write meanwhile, at most: of weights with so many inputs, ranks and a head's size."""
    return max(rows * COLUMNS + PANEL * inputs, ROWS * rank, QUERIES * size, inputs) + 64


def run_steps(steps: Any, over: Pass, dtype: torch.dtype) -> None:
    """All steps over the rows of a pass."""
    library = native.compiled("decode")
    assert library is not None
    if library.topwork_decode(steps, len(steps), ctypes.byref(over), native.KINDS[dtype]):
        raise MemoryError(f"no memory for a pass of {len(steps)} steps")


def is_there(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether C can run a model of this type here."""
    return device.type == "cpu" and dtype in native.KINDS and native.compiled("decode") is not None


def array_of(structures: Sequence[ctypes.Structure]) -> Any:
    """One behind another, as C reads them; one at least."""
    return (type(structures[0]) * len(structures))(*structures)


def address_of(array: Any) -> int:
    """Where an array of structures begins."""
    return ctypes.addressof(array)
