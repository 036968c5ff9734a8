"""bitsandbytes' checkpoint format: a packed weight as named tensors, and back.

    M.weight                                uint8 [n / 2, 1]          codes, row by row, first value in the high nibble
    M.weight.absmax                         fp32 or uint8 [blocks]    block constants; uint8 when double-quantized
    M.weight.quant_map                      fp32 [16]
    M.weight.nested_absmax                  fp32 [ceil(blocks / 256)] with double quantization, as are
    M.weight.nested_quant_map               fp32 [256]
    M.weight.quant_state.bitsandbytes__nf4  the bytes of a JSON object: quant_type, blocksize, dtype, shape, nested_…

    M.weight                                int8 [out, in]            the 8-bit format
    M.SCB                                   fp32 [out]                each row's largest magnitude
    M.weight_format                         uint8 [], 0

What is read is checked against itself: an altered or half-written file is refused here, by the layer's name.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topwork.common.errors import ModelError
from topwork.ops.blockwise8 import dynamic_map
from topwork.ops.packed import NESTED_BLOCK, Packed, Packed4bit, PackedInt8
from topwork.ops.quantize import BLOCK_SIZES, CODES, FLOATS, code_of

STATE = "quant_state.bitsandbytes__"
FOUR_BIT_PARTS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
INT8_PARTS = ("SCB", "weight_format")


def to_tensors(packed: Packed) -> dict[str, Tensor]:
    """A packed weight's tensors by name, after the layer's own name and a dot."""
    if isinstance(packed, PackedInt8):
        return {"weight": packed.codes, "SCB": packed.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    if not isinstance(packed, Packed4bit):
        raise TypeError(f"no checkpoint format for {type(packed).__name__}")
    state: dict[str, Any] = {
        "quant_type": packed.quant_type,
        "blocksize": packed.block_size,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    tensors = {
        "weight": packed.codes.view(-1, 1),
        "weight.absmax": packed.absmax,
        "weight.quant_map": code_of(packed.quant_type),
    }
    if packed.nested_absmax is not None and packed.nested_code is not None:
        tensors |= {"weight.nested_absmax": packed.nested_absmax, "weight.nested_quant_map": packed.nested_code.clone()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": packed.offset}
    tensors[f"weight.{STATE}{packed.quant_type}"] = torch.frombuffer(
        bytearray(json.dumps(state).encode()), dtype=torch.uint8
    )
    return tensors


def layer_of(key: str) -> tuple[str, str] | None:
    """(layer, part) of a key that holds constants of a packed weight; None for any other, the codes' own included."""
    for part in (*FOUR_BIT_PARTS, *INT8_PARTS):
        if key.endswith("." + part):
            return key.removesuffix("." + part), part
    layer, found, kind = key.partition(f".weight.{STATE}")
    return (layer, f"weight.{STATE}{kind}") if found else None


def from_tensors(layer: str, tensors: Mapping[str, Tensor]) -> Packed:
    """A packed weight from a layer's tensors. Raises ModelError naming the layer and what does not fit."""
    if "weight" not in tensors:
        raise _broken(layer, "has constants but no codes")
    if "SCB" in tensors:
        return _int8(layer, tensors["weight"], tensors["SCB"], tensors.get("weight_format"))
    said = _description(layer, tensors)
    try:
        absmax, code = tensors["weight.absmax"].flatten(), tensors["weight.quant_map"]
        nested_absmax = tensors["weight.nested_absmax"].flatten() if said.nested else None
        nested_code = tensors["weight.nested_quant_map"].flatten() if said.nested else None
    except KeyError as error:
        raise _broken(layer, f"lacks {error}") from error
    codes = tensors["weight"].flatten().view(torch.uint8)
    packed = Packed4bit(
        codes, absmax, said.shape, said.dtype, said.quant_type, said.block_size, nested_absmax, nested_code, said.offset
    )
    _check_4bit(layer, packed, code)
    return packed


class _Description(NamedTuple):
    quant_type: str
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, int]
    nested: bool
    offset: float


def _description(layer: str, tensors: Mapping[str, Tensor]) -> _Description:
    """What the JSON object says, each field checked."""
    states = [name for name in tensors if name.startswith(f"weight.{STATE}")]
    if len(states) != 1:
        raise _broken(layer, f"has {len(states) or 'no'} {STATE}… that says how its codes are to be read, expected one")
    try:
        state = json.loads(bytes(tensors[states[0]].tolist()))
        quant_type, block_size = str(state["quant_type"]), int(state["blocksize"])
        dtype, (outputs, inputs) = getattr(torch, state["dtype"]), map(int, state["shape"])
        nested = "nested_offset" in state
        offset = float(state["nested_offset"]) if nested else 0.0
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _broken(layer, f"has a description that cannot be read ({error})") from error
    if quant_type not in CODES or block_size not in BLOCK_SIZES or dtype not in FLOATS:
        raise _broken(
            layer,
            f"is {quant_type} in blocks of {block_size} from {dtype}, expected {' or '.join(CODES)} in blocks of "
            f"{', '.join(map(str, BLOCK_SIZES))}, from a 16- or 32-bit float",
        )
    if states[0] != f"weight.{STATE}{quant_type}" or outputs < 1 or inputs < 1 or not math.isfinite(offset):
        raise _broken(
            layer,
            f"has a description named {states[0]!r} that says {quant_type}, shape {(outputs, inputs)}, offset {offset}",
        )
    found = (state.get("nested_blocksize"), state.get("nested_dtype"))
    if nested and found != (NESTED_BLOCK, "float32"):
        raise _broken(layer, f"has nested blocks of {found[0]} in {found[1]}, expected {NESTED_BLOCK} in float32")
    return _Description(quant_type, block_size, dtype, (outputs, inputs), nested, offset)


def _check_4bit(layer: str, packed: Packed4bit, code: Tensor) -> None:
    count = packed.shape[0] * packed.shape[1]
    blocks = -(-count // packed.block_size)
    sizes = {"codes": (packed.codes.numel(), (count + 1) // 2), "absmax": (packed.absmax.numel(), blocks)}
    if packed.nested_absmax is not None and packed.nested_code is not None:
        sizes["nested_absmax"] = (packed.nested_absmax.numel(), -(-blocks // NESTED_BLOCK))
        sizes["nested_quant_map"] = (packed.nested_code.numel(), 256)
    for name, (found, expected) in sizes.items():
        if found != expected:
            raise _broken(layer, f"has {found} {name}, expected {expected} for a weight of shape {packed.shape}")
    wanted = torch.uint8 if packed.nested_absmax is not None else torch.float32
    if packed.absmax.dtype != wanted:
        raise _broken(layer, f"holds its constants as {packed.absmax.dtype}, expected {wanted}")
    nested = [part.dtype for part in (packed.nested_absmax, packed.nested_code) if part is not None]
    if any(dtype != torch.float32 for dtype in nested):
        raise _broken(layer, f"holds its nested constants as {nested[0]} and {nested[1]}, expected {torch.float32}")
    floats = [part for part in (packed.absmax, packed.nested_absmax, packed.nested_code) if part is not None]
    if not all(torch.isfinite(part).all() for part in floats if part.is_floating_point()):
        raise _broken(layer, "has constants that are not finite")
    if code.shape != (16,) or not torch.allclose(code.float().cpu(), code_of(packed.quant_type), atol=1e-6):
        raise _broken(layer, f"has another map of codes than {packed.quant_type}'s")
    nested_code = packed.nested_code
    if nested_code is not None and not torch.allclose(nested_code.cpu(), dynamic_map(signed=True), atol=1e-6):
        raise _broken(layer, "has another map of nested constants than bitsandbytes'")


def _int8(layer: str, codes: Tensor, absmax: Tensor, layout: Tensor | None) -> PackedInt8:
    if layout is not None and (layout.numel() != 1 or layout.item() != 0):
        raise _broken(layer, f"has the weight_format {layout.tolist()}, expected 0: row by row")
    if codes.dtype != torch.int8 or codes.dim() != 2 or absmax.numel() != codes.shape[0]:
        raise _broken(
            layer,
            f"has codes {tuple(codes.shape)} of {codes.dtype} and {absmax.numel()} constants, expected int8 rows and a "
            "constant for each",
        )
    absmax = absmax.float().flatten()
    if not torch.isfinite(absmax).all():
        raise _broken(layer, "has constants that are not finite")
    return PackedInt8(codes.contiguous(), absmax, (codes.shape[0], codes.shape[1]), torch.float16)


def _broken(layer: str, what: str) -> ModelError:
    return ModelError(f"{layer} {what}; the checkpoint was altered or not written whole: fetch or write it anew")
