"""The C kernels, loaded with the types of their arguments: a call takes plain numbers and addresses, and costs little.

    library = load.kernels("layer", x)     # ops/native/layer.c, or None: then plain torch does the work
    library.topwork_gain(x.data_ptr(), x.stride(0), ...)

A kernel sees bare memory, so whoever calls one has checked shapes and devices before.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topwork.ops.native import build

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The types of floats that kernels know, and their numbers in simd.h."""


class Signature(NamedTuple):
    """The types of a C function's arguments and of its result, None for void."""

    arguments: list[Any]
    result: Any = None


_AT, _LONG, _INT, _UINT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32, ctypes.c_float
_ATTENTION = Signature([_AT, _AT, _FLOAT, _AT, _AT, _AT], _INT)

SIGNATURES = {
    "attention": {
        "topwork_attention_forward": _ATTENTION,
        "topwork_attention_backward": _ATTENTION,
        "topwork_attention_level": Signature([], _INT),
    },
    "decode": {
        "topwork_decode": Signature([_AT, _LONG, _AT, _LONG], _INT),
        "topwork_decode_sizes": Signature([_LONG], _LONG),
    },
    "decoder": {
        "topwork_feedforward": Signature([_AT, _AT, _LONG, _AT, *[_LONG] * 3], _INT),
        "topwork_decoder_layer": Signature([*[_AT] * 4, *[_LONG] * 3], _INT),
        "topwork_decoder_level": Signature([], _INT),
    },
    "grouped": {
        "topwork_grouped_products": Signature([_AT, _AT, _LONG, _LONG], _INT),
        "topwork_grouped_level": Signature([], _INT),
    },
    "layer": {
        "topwork_rms_norm": Signature([_AT, *[_LONG] * 5, _AT, _FLOAT, _INT, _AT, _AT, _INT, _INT]),
        "topwork_rms_norm_backward": Signature([*[_AT, _LONG, _LONG] * 2, *[_LONG] * 3, *[_AT] * 3, _INT, _INT]),
        "topwork_rotate": Signature([_AT, *[_LONG] * 4, _AT, _LONG, _AT, _LONG, _LONG, _INT, _INT]),
        "topwork_add_and_round": Signature([*[_AT] * 4, _FLOAT, _FLOAT, _LONG, _INT]),
        "topwork_add_and_norm": Signature([*[_AT] * 4, _FLOAT, _LONG, _LONG, _AT, _FLOAT, _AT, _AT, _INT, _INT]),
        "topwork_add_and_norm_backward": Signature([*[_AT] * 3, _LONG, _LONG, *[_AT] * 4, _FLOAT, _INT, _INT]),
        "topwork_gain": Signature([_AT, *[_LONG] * 3, _AT, _AT, _INT, _INT]),
        "topwork_gain_backward": Signature([*[_AT, _LONG] * 2, _LONG, _LONG, *[_AT] * 3, _LONG, _INT, _INT]),
        "topwork_drop": Signature([*[_AT, _LONG] * 2, _LONG, _LONG, _AT, _UINT, _UINT, _FLOAT, _INT, _INT]),
        "topwork_gated": Signature([*[_AT, _LONG] * 2, _LONG, _LONG, _AT, _INT, _INT]),
        "topwork_gated_backward": Signature([*[_AT, _LONG] * 3, _LONG, _LONG, *[_AT, _LONG] * 2, _AT, _INT, _INT]),
    },
    "logprobs": {
        "topwork_logprob_slope": Signature([_AT, *[_LONG] * 3, _INT, _AT, _AT, _FLOAT, _AT, _INT]),
    },
    "quantize4": {
        "topwork_dequantize_4bit": Signature([*[_AT] * 4, _FLOAT, _AT, *[_LONG] * 6, _INT, _AT, _INT]),
        "topwork_dequantize_int8": Signature([_AT, _AT, *[_LONG] * 5, _INT, _AT, _INT]),
        "topwork_quantize_4bit": Signature([_AT, _LONG, _LONG, *[_AT] * 4, _INT]),
    },
}
"""Of every function of each C file; tests/ops/test_native_load.py compares them with the files."""


def kernels(name: str, near: Tensor) -> ctypes.CDLL | None:
    """`compiled`, where `near` is a float that kernels know on the CPU; else None."""
    return compiled(name) if near.is_cpu and near.dtype in KINDS else None


@cache
def compiled(name: str) -> ctypes.CDLL | None:
    """`ops/native/NAME.c`, compiled and loaded; None, and a warning, where that cannot be."""
    loaded = build.load(name)
    return None if loaded is None else declared(name, loaded)


def declared(name: str, loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library of NAME.c, its functions told their types."""
    for function, (arguments, result) in SIGNATURES[name].items():
        at = getattr(loaded, function)
        at.argtypes, at.restype = arguments, result
    return loaded


def contiguous_rows(x: Tensor) -> bool:
    """Whether the values of a row (the last dimension) lie side by side."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def told(x: Tensor) -> str:
    """A tensor in a message."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
