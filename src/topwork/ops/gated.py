"""The gated unit of a feed-forward layer, forward and backward: plain torch (the truth), C on the CPU, Triton on CUDA.

    h = round(round(act(gate)) * up)        dgate = dh * up * act'(gate)        dup = dh * act(gate)

    silu       x s(x)                               s the logistic function
    gelu_tanh  x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / 2 (1 + tanh(u))
    gelu       x Phi(x) = x / 2 (1 + erf(x / sqrt(2)))

In fp32 (fp64 for fp64); `round` is to gate's type, as transformers' modules round; gradients are rounded once. No
autograd.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("silu", "gelu_tanh", "gelu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up, contiguous, of gate and up [T, f] with any row stride. Raises ValueError else."""
    _check(kind, gate, ("up", up))
    return gated_reference(gate, up, kind)


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """dgate and dup [T, f] from dh [T, f]: the tensors of `into`, which may be halves of one buffer or gate and up
    themselves, or else the halves of a new [T, 2 f]."""
    _check(kind, gate, ("up", up), ("dh", dh), *(zip(("into[0]", "into[1]"), into) if into else ()))
    dgate, dup = into or gate.new_empty(gate.shape[0], 2 * gate.shape[1]).tensor_split(2, 1)
    for out, value in zip((dgate, dup), gated_backward_reference(dh, gate, up, kind)):
        out.copy_(value)
    return dgate, dup


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
        share = torch.special.ndtr(x)
        slope = share + x * torch.exp(-x.pow(2) / 2) / math.sqrt(2 * math.pi)
    return (dh * up * slope).to(gate.dtype), (dh * x * share).to(gate.dtype)


def _check(kind: str, gate: Tensor, *others: tuple[str, Tensor]) -> None:
    """Raises ValueError unless shapes, types and devices belong together: kernels see bare memory."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of a gated unit, expected {', '.join(KINDS)}")
    if gate.ndim != 2 or gate.dtype not in FLOATS:
        raise ValueError(f"gate is {_told(gate)}, expected floats [T, f]")
    for name, other in others:
        if other.shape != gate.shape or other.dtype != gate.dtype or other.device != gate.device:
            raise ValueError(f"{name} is {_told(other)}, expected one like gate, {_told(gate)}")


def _told(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
