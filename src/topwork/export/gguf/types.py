"""The types that weights are stored in, and which weight gets which."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topwork.common.errors import ModelError, RequestError, did_you_mean
from topwork.export.gguf.package import gguf_package

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
"""What a model can be written in; the figures after q are bits a weight, in blocks of 32 with a float16 scale."""
_BLOCK = 32
_FLOAT16_MAX = 65504.0
_SMALL = ("q4_0", "q4_1", "q5_0", "q5_1")


@dataclass(frozen=True)
class Stored:
    """A weight's type in the file; `why` it is not the one that was asked for, where that is worth telling."""

    type: str
    why: str = ""


def check_type(wanted: str) -> None:
    """Raises RequestError for a type that is not written."""
    if wanted not in TYPES:
        raise RequestError(
            f"a GGUF model is written as {', '.join(TYPES)}, not {wanted!r}{did_you_mean(wanted, TYPES)}. K-quants are "
            "made of an f16 file by llama.cpp's llama-quantize"
        )


def stored_as(name: str, shape: Sequence[int], wanted: str, is_head: bool) -> Stored:
    """The type of one weight, by the file's name for it and its shape.

    Vectors (norms, biases, rotary factors) are F32. The head, and the embedding where it is the head, has 8 bits where
    the others have 4 or 5: llama.cpp keeps it at 6 there, which this package cannot make. Rows that are no multiple of
    32 cannot be packed and become F16.
    """
    if len(shape) == 1 or "norm" in name:
        return Stored("f32")
    if wanted in ("f32", "f16", "bf16"):
        return Stored(wanted)
    if shape[-1] % _BLOCK:
        return Stored("f16", f"its rows of {shape[-1]} are no multiple of {_BLOCK}")
    return Stored("q8_0") if is_head and wanted in _SMALL else Stored(wanted)


def quantization_type(stored: str) -> Any:
    """The package's number for a type."""
    return getattr(gguf_package().GGMLQuantizationType, stored.upper())


def file_type(wanted: str) -> int:
    """What `general.file_type` says of a whole file."""
    types = gguf_package().LlamaFileType
    return int(types.ALL_F32 if wanted == "f32" else getattr(types, f"MOSTLY_{wanted.upper()}"))


def stored_bytes(shape: Sequence[int], stored: str) -> int:
    """How many bytes a weight of this shape takes."""
    block, size = gguf_package().GGML_QUANT_SIZES[quantization_type(stored)]
    return int(np.prod(shape, dtype=np.int64)) // int(block) * int(size)


def packed(weight: Tensor, stored: str, key: str) -> np.ndarray:
    """The bytes of a weight in a type, as an array. Raises ModelError for NaN and infinity, and for values that a
    float16 (the type, or its blocks' scales) does not hold."""
    values = weight.detach().to("cpu", torch.float32).contiguous()
    largest = max(-float(values.min()), float(values.max()))
    if not math.isfinite(largest):
        raise ModelError(f"{key} holds NaN or infinity; the model is broken and is not written. Did its training fail?")
    if stored not in ("f32", "bf16") and largest > _FLOAT16_MAX:
        raise ModelError(
            f"{key} holds {largest:.3g}, beyond float16's {_FLOAT16_MAX:.0f}, which {stored} is made of; write bf16"
        )
    from gguf.quants import quantize

    return np.ascontiguousarray(quantize(values.numpy(), quantization_type(stored)))
