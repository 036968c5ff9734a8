"""The modules of Triton kernels, imported when the first CUDA tensor arrives.

With TRITON_INTERPRET=1, which is read when triton is imported, they take CPU tensors too, slowly: with
TOPWORK_NO_NATIVE=1 beside it whatever runs on a CPU runs as it would on a GPU.
"""

import os
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
"""As Triton reads it."""


def kernels(name: str, near: Tensor) -> ModuleType | None:
    """`module`, where `near` is a 16- or 32-bit float on a CUDA device; else None."""
    return module(name) if near.dtype in FLOATS and (near.is_cuda or INTERPRETED) else None


@cache
def module(name: str) -> ModuleType | None:
    """`ops/triton/NAME.py`; None, with one warning, without triton."""
    try:
        return import_module(f"topwork.ops.triton.{name}")
    except ImportError as error:
        warnings.warn(
            f"triton is not to be had here, so plain torch does the work of the kernels for the GPU ({name}), slower: "
            f"{error}. `pip install triton`",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
