"""The functions of layer.c with the types of their arguments: a call takes plain ints, and costs little."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from topwork.ops.native import build

_AT, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_UINT = ctypes.c_uint32
_TYPES = {
    "topwork_rms_norm": [_AT, *[_LONG] * 5, _AT, _FLOAT, _INT, _AT, _AT, _INT, _INT],
    "topwork_rms_norm_backward": [*[_AT, _LONG, _LONG] * 2, *[_LONG] * 3, _AT, _AT, _AT, _INT, _INT],
    "topwork_rotate": [_AT, *[_LONG] * 4, _AT, _LONG, _AT, _LONG, _LONG, _INT, _INT],
    "topwork_add_and_round": [_AT, _AT, _AT, _AT, _FLOAT, _FLOAT, _LONG, _INT],
    "topwork_gain": [_AT, *[_LONG] * 3, _AT, _AT, _INT, _INT],
    "topwork_gain_backward": [*[_AT, _LONG] * 2, _LONG, _LONG, _AT, _AT, _AT, _LONG, _INT, _INT],
    "topwork_drop": [*[_AT, _LONG] * 2, _LONG, _LONG, _AT, _UINT, _UINT, _FLOAT, _INT, _INT],
    "topwork_gated": [*[_AT, _LONG] * 2, _LONG, _LONG, _AT, _INT, _INT],
    "topwork_gated_backward": [*[_AT, _LONG] * 3, _LONG, _LONG, *[_AT, _LONG] * 2, _INT, _INT],
}


@cache
def kernels() -> ctypes.CDLL | None:
    """layer.c, compiled and loaded; None where that cannot be."""
    loaded = build.load("layer")
    if loaded is not None:
        for name, types in _TYPES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = types, None
    return loaded


def row_kernels(*tensors: Tensor) -> ctypes.CDLL | None:
    """The same, where they know the types of these [rows, n] and can walk their rows."""
    for x in tensors:
        if not x.is_cpu or x.dtype not in (torch.bfloat16, torch.float32) or (x.stride(1) != 1 and x.shape[1] > 1):
            return None
    return kernels()


def told(x: Tensor) -> str:
    """A tensor in a message."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
