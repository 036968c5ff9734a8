"""The gated unit of a feed-forward layer, forward and backward: plain torch (the truth), C on the CPU, Triton on CUDA.

    h = round(round(act(gate)) * up)        dgate = dh * up * act'(gate)        dup = dh * act(gate)

    silu       x s(x)                               s the logistic function
    gelu_tanh  x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / 2 (1 + tanh(u))
    gelu       x Phi(x) = x / 2 (1 + erf(x / sqrt(2)))

In fp32 (fp64 for fp64); `round` is to gate's type, as transformers' modules round; gradients are rounded once. No
autograd.
"""

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.context import scratch_empty
from topwork.ops.native import load as native
from topwork.ops.native.load import told
from topwork.ops.triton import load as triton

KINDS = ("silu", "gelu_tanh", "gelu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up, contiguous, of gate and up [T, f] with any row stride. Raises ValueError else."""
    _check(kind, gate, ("up", up))
    if (library := native.kernels("layer", gate)) is not None:
        return _gated_cpu(library, gate, up, kind)
    if (kernels := triton.kernels("layer", gate)) is not None:
        return kernels.gated(gate, up, kind)
    return gated_reference(gate, up, kind)


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, into: tuple[Tensor, Tensor] | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dgate and dup [T, f] from dh [T, f]: the tensors of `into`, which may be halves of one buffer or gate and up
    themselves, or else the halves of a new [T, 2 f]. Contiguous `h` [T, f] becomes `gated` once more, to the bit: going
    backward both are wanted, and read the same."""
    _check(kind, gate, ("up", up), ("dh", dh))
    if into is None:
        both, f = gate.new_empty(gate.shape[0], 2 * gate.shape[1]), gate.shape[1]
        into = both[:, :f], both[:, f:]
    else:
        _check(kind, gate, ("into[0]", into[0]), ("into[1]", into[1]))
    dgate, dup = into
    if h is not None:
        _check(kind, gate, ("h", h))
    fillable = _fillable(dgate) and _fillable(dup) and (h is None or h.is_contiguous())
    if fillable and (library := native.kernels("layer", gate)) is not None:
        _backward_cpu(library, dh, gate, up, kind, dgate, dup, h)
        return into
    if h is not None:
        h.copy_(gated(gate, up, kind))
    if fillable and (kernels := triton.kernels("layer", gate)) is not None:
        kernels.gated_backward(dh, gate, up, kind, dgate, dup)
        return into
    for out, value in zip((dgate, dup), gated_backward_reference(dh, gate, up, kind)):
        out.copy_(value)
    return into


def _fillable(out: Tensor) -> bool:
    """Whether a kernel can write the rows of `out`; anything else is left to the truth and torch's errors."""
    by_row, by_value = out.stride()
    return by_value == 1 and (by_row >= out.shape[1] or out.shape[0] <= 1)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _gated_cpu(library: ctypes.CDLL, gate: Tensor, up: Tensor, kind: str) -> Tensor:
    h = scratch_empty(gate, *gate.shape)
    gate, up = _rows(gate), _rows(up)
    rows, f = gate.shape
    library.topwork_gated(
        gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), rows, f, h.data_ptr(), _mode(gate, kind),
        torch.get_num_threads(),
    )  # fmt: skip
    return h


def _backward_cpu(
    library: ctypes.CDLL, dh: Tensor, gate: Tensor, up: Tensor, kind: str, dgate: Tensor, dup: Tensor, h: Tensor | None
) -> None:
    dh, gate, up = _rows(dh), _rows(gate), _rows(up)
    rows, f = gate.shape
    library.topwork_gated_backward(
        dh.data_ptr(), dh.stride(0), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), rows, f,
        dgate.data_ptr(), dgate.stride(0), dup.data_ptr(), dup.stride(0), None if h is None else h.data_ptr(),
        _mode(gate, kind), torch.get_num_threads(),
    )  # fmt: skip


def _mode(gate: Tensor, kind: str) -> int:
    """As layer.c counts."""
    return (gate.dtype == torch.bfloat16) + 2 * KINDS.index(kind)


def gated_reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """The truth of `gated`."""
    x = gate.to(torch.promote_types(gate.dtype, torch.float32))
    if kind == "silu":
        active = F.silu(x)
    else:
        active = F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return (active.to(gate.dtype) * up).contiguous()


def gated_backward_reference(dh: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The truth of `gated_backward`, in new tensors."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    x, up, dh = gate.to(wide), up.to(wide), dh.to(wide)
    if kind == "silu":
        share = torch.sigmoid(x)
        slope = share * (1 + x * (1 - share))
    elif kind == "gelu_tanh":
        share = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))
        slope = share + x * share * (1 - share) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.pow(2))
    else:
        share = torch.erfc(-x * math.sqrt(0.5)) / 2
        slope = share + x * torch.exp(-x.pow(2) / 2) / math.sqrt(2 * math.pi)
    return (dh * up * slope).to(gate.dtype), (dh * (x * share)).to(gate.dtype)


def _check(kind: str, gate: Tensor, *others: tuple[str, Tensor]) -> None:
    """Raises ValueError unless shapes, types and devices belong together: kernels see bare memory."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of a gated unit, expected {', '.join(KINDS)}")
    if gate.ndim != 2 or gate.dtype not in FLOATS:
        raise ValueError(f"gate is {told(gate)}, expected floats [T, f]")
    for name, other in others:
        if other.shape != gate.shape or other.dtype != gate.dtype or other.device != gate.device:
            raise ValueError(f"{name} is {told(other)}, expected one like gate, {told(gate)}")
