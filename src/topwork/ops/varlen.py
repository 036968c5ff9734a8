"""The kernels that attend over a flat batch on a GPU, and the choice among them.

    flash-attn  the package, 2.7 or newer: 16 bits, heads of up to 256 values in eights, soft-capping
    torch       PyTorch's own FlashAttention 2: the same but for soft-capping. After
                `torch.nn.attention.activate_flash_attention_impl("FA3")` the same call is FlashAttention 3
    triton      ours (triton/attention.py): those and fp32, sinks, heads of any size up to 256, values of another size

The first that can is taken, or the one that TOPWORK_ATTENTION names. All of them give and take lse as
`ops/attention.py` says, and all give the same bits every time: FlashAttention adds up the queries' gradient in any
order unless it is asked not to. How it then divides the sum depends on how many sequences there are, so with it the
neighbours in a batch may change the last bits of a gradient; with ours they do not.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topwork.ops.attention_reference import AttentionRule
from topwork.ops.host import sent
from topwork.ops.triton import load as triton

BY_HAND = "TOPWORK_ATTENTION"
"""Environment variable: the kernel's name."""
LONGEST_HEAD = 256


class Inputs(NamedTuple):
    """What `attention_forward` is given."""

    query: Tensor
    key: Tensor
    value: Tensor
    bounds: tuple[int, ...]
    rule: AttentionRule
    sinks: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


Targets = tuple[Tensor, Tensor, Tensor]


class Kernel(NamedTuple):
    """lacks     what is missing for some inputs, in words, or None
    forward   (out, lse)
    backward  of inputs, grad, out and lse: fills the gradients of query, key and value; returns the sinks'"""

    name: str
    lacks: Callable[[Inputs], str | None]
    forward: Callable[[Inputs], tuple[Tensor, Tensor]]
    backward: Callable[[Inputs, Tensor, Tensor, Tensor, Targets], Tensor | None]


def chosen(inputs: Inputs) -> Kernel | None:
    """The kernel for these inputs; None on a CPU, for no tokens, and where none can. Raises ValueError where
    TOPWORK_ATTENTION names one that there is not, or that cannot."""
    if not (inputs.query.is_cuda or triton.INTERPRETED) or not len(inputs.query):
        return None
    name = os.environ.get(BY_HAND)
    if not name:
        return next((kernel for kernel in KERNELS if kernel.lacks(inputs) is None), None)
    names = [kernel.name for kernel in KERNELS]
    if name not in names:
        raise ValueError(f"{BY_HAND} is {name!r}, where one of {', '.join(names)} is expected; unset it for the best")
    kernel = KERNELS[names.index(name)]
    if (lack := kernel.lacks(inputs)) is not None:
        raise ValueError(
            f"{BY_HAND} is {name!r}, which this attention cannot run on: {lack}; unset it for one that can"
        )
    return kernel


def _flash_lacks(inputs: Inputs, softcaps: bool) -> str | None:
    """Of FlashAttention 2, whoever brings it."""
    (tokens, heads, size), size_v = inputs.query.shape, inputs.value.shape[2]
    padded = -(-size // 32) * 32
    needs = {
        "it needs a CUDA device": inputs.query.is_cuda and torch.version.hip is None,
        "it knows no sinks": inputs.sinks is None,
        "it knows no soft-capping": softcaps or inputs.rule.softcap is None,
        f"it wants 16 bits, not {inputs.query.dtype}": inputs.query.dtype in (torch.bfloat16, torch.float16),
        "query, key and value are of several types": len({x.dtype for x in inputs.tensors}) == 1,
        f"it wants one head size of up to {LONGEST_HEAD} in eights, not {size} and {size_v}": (
            size == size_v and size % 8 == 0 and size <= LONGEST_HEAD
        ),
        "it wants a scale above zero": inputs.rule.scale > 0,
        "the sums of its backward pass overflow 32 bits for so many tokens": (
            (tokens + 128 * (len(inputs.bounds) - 1)) * heads * padded < 2**31
        ),
        "it needs compute capability 8.0": not inputs.query.is_cuda or _capability(inputs.query.device) >= (8, 0),
    }  # fmt: skip
    return next((lack for lack, met in needs.items() if not met), None)


def _torch_lacks(inputs: Inputs) -> str | None:
    return _flash_lacks(inputs, softcaps=False)


def _torch_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """As torch.nn.attention.varlen calls it, in 2.11 and 2.13."""
    ends, longest = _ends(inputs.bounds, inputs.query.device)
    with _deterministic():
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *_by_rows(inputs.tensors), ends, ends, longest, longest, 0.0, inputs.rule.window is None, False,
            scale=inputs.rule.scale, **_window(inputs.rule),
        )  # fmt: skip
    return out, lse


def _torch_backward(inputs: Inputs, grad: Tensor, out: Tensor, lse: Tensor, into: Targets) -> None:
    """It has no arguments to write into: three tensors of its own, and a copy of each."""
    ends, longest = _ends(inputs.bounds, inputs.query.device)
    with _deterministic():
        found = torch.ops.aten._flash_attention_backward(
            grad, *_by_rows(inputs.tensors), out, lse, ends, ends, longest, longest, 0.0, inputs.rule.window is None,
            *_no_dropout(inputs.query.device), scale=inputs.rule.scale, **_window(inputs.rule),
        )  # fmt: skip
    for target, result in zip(into, found):
        target.copy_(result)


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's operations take their order of summation from a global flag. New memory is not filled meanwhile."""
    memory: Any = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fills


def _package_lacks(inputs: Inputs) -> str | None:
    return _flash_lacks(inputs, softcaps=True) if _flash_attn() else "flash-attn, 2.7 or newer, is not installed"


def _package_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    module, (ends, longest) = _flash_attn(), _ends(inputs.bounds, inputs.query.device)
    assert module is not None
    query, key, value = _by_rows(inputs.tensors)
    out, lse, *_ = module._flash_attn_varlen_forward(
        q=query, k=key, v=value, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest,
        dropout_p=0.0, softmax_scale=inputs.rule.scale, causal=inputs.rule.window is None,
        softcap=inputs.rule.softcap or 0.0, **_window(inputs.rule),
    )  # fmt: skip
    return out, lse


def _package_backward(inputs: Inputs, grad: Tensor, out: Tensor, lse: Tensor, into: Targets) -> None:
    """It writes where it is told, but may read an input after that."""
    module, (ends, longest) = _flash_attn(), _ends(inputs.bounds, inputs.query.device)
    assert module is not None
    query, key, value = _by_rows(inputs.tensors)
    read = {x.untyped_storage().data_ptr() for x in inputs.tensors}
    dq, dk, dv = written = [
        x if x.stride(-1) == 1 and x.dtype == query.dtype and x.untyped_storage().data_ptr() not in read
        else query.new_empty(x.shape)
        for x in into
    ]  # fmt: skip
    module._flash_attn_varlen_backward(
        dout=grad, q=query, k=key, v=value, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, cu_seqlens_q=ends,
        cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest, dropout_p=0.0, softmax_scale=inputs.rule.scale,
        causal=inputs.rule.window is None, softcap=inputs.rule.softcap or 0.0, alibi_slopes=None, deterministic=True,
        **_window(inputs.rule),
    )  # fmt: skip
    for target, result in zip(into, written):
        if target is not result:
            target.copy_(result)


@cache
def _flash_attn() -> ModuleType | None:
    """flash_attn.flash_attn_interface, from the version on that splits windows and gives lse as [H, T]."""
    try:
        version = tuple(int(part) for part in import_module("flash_attn").__version__.split(".")[:2])
        return import_module("flash_attn.flash_attn_interface") if (2, 7) <= version < (3, 0) else None
    except (ImportError, AttributeError, ValueError):  # none, made for another torch, or another package of that name
        return None


def _triton_lacks(inputs: Inputs) -> str | None:
    sizes = inputs.query.shape[2], inputs.value.shape[2]
    if max(sizes) > LONGEST_HEAD:
        return f"it wants heads of up to {LONGEST_HEAD} values, not {max(sizes)}"
    if len({x.dtype for x in inputs.tensors}) > 1:
        return "query, key and value are of several types"
    return None if triton.kernels("attention", inputs.query) else "it needs triton, and 16 or 32 bits"


def _triton_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _ours(inputs).attention(*inputs)
    return found


def _triton_backward(inputs: Inputs, grad: Tensor, out: Tensor, lse: Tensor, into: Targets) -> Tensor | None:
    query, key, value, *others = inputs
    found: Tensor | None = _ours(inputs).attention_backward(grad, query, key, value, out, lse, *others, into)
    return found


def _ours(inputs: Inputs) -> ModuleType:
    module = triton.kernels("attention", inputs.query)
    assert module is not None
    return module


KERNELS = (
    Kernel("flash-attn", _package_lacks, _package_forward, _package_backward),
    Kernel("torch", _torch_lacks, _torch_forward, _torch_backward),
    Kernel("triton", _triton_lacks, _triton_forward, _triton_backward),
)
"""By preference."""


def _by_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _window(rule: AttentionRule) -> dict[str, int]:
    return {"window_size_left": -1 if rule.window is None else rule.window - 1, "window_size_right": 0}


@lru_cache(maxsize=64)
def _ends(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """The bounds on the device, and the longest sequence. Kept, because every layer of a pass asks for the same."""
    ends = sent(torch.tensor(bounds, dtype=torch.int32), device)
    return ends, max(stop - start for start, stop in pairwise(bounds))


@cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a random generator that nothing is drawn from."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
