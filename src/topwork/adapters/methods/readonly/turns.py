"""Methods that turn what a layer is given or what it gives. x [n, in], y [n, out], in fp32 where they learned.

BOFT    y = s * (W R' x) + bias        R block-diagonal, its blocks orthogonal      (Liu et al., arXiv 2311.06243)
HRA     y = W H1 H2 … x + bias         H = I - 2 u u' / |u|^2                       (Yuan et al., arXiv 2405.17484)
RoAd    y = T (W x + bias)             T turns and scales pairs of outputs          (Liao et al., arXiv 2409.00119)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork.adapters.base_weight import product
from topwork.adapters.methods.readonly.updates import At


@dataclass(frozen=True)
class Turn:
    """forward   y as the layer gives it, x, the layer -> y as the adapter has it
    merged    a weight [out, in] and a bias -> those with the adapter in them"""

    forward: Callable[[At, Tensor, Tensor, nn.Module], Tensor]
    merged: Callable[[At, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def _boft_blocks(at: At) -> Tensor:
    """Each block's Cayley transform [blocks, size, size], of the skew-symmetric half of what is learned."""
    (learned,) = at.tensors["boft_R"]
    skew = (learned - learned.transpose(1, 2)) / 2
    identity = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    return torch.linalg.solve(identity + skew, identity - skew, left=False)


def _by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Each block's values of x times its matrix."""
    return torch.einsum("nkb,kbc->nkc", x.float().unflatten(-1, blocks.shape[:2]), blocks).flatten(1)


def _boft(at: At, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
    turned = product(base_layer, _by_blocks(x, _boft_blocks(at)).to(x.dtype))
    bias = getattr(base_layer, "bias", None)
    scaled = turned * at.tensors["boft_s"].flatten()
    return (scaled if bias is None else scaled + bias).to(y.dtype)


def _boft_merged(at: At, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return at.tensors["boft_s"] * _by_blocks(weight, _boft_blocks(at).transpose(1, 2)), bias


def _reflected(at: At, x: Tensor, backwards: bool) -> Tensor:
    """x H1 H2 …, or x … H2 H1."""
    directions = at.tensors["hra_u"] / at.tensors["hra_u"].norm(dim=0)
    for direction in directions.t().flip(0) if backwards else directions.t():
        x = x - 2 * (x @ direction)[:, None] * direction
    return x


def _hra(at: At, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
    found: Tensor = base_layer(_reflected(at, x.float(), backwards=True).to(x.dtype))
    return found.to(y.dtype)


def _hra_merged(at: At, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return _reflected(at, weight, backwards=False), bias


def _paired(at: At, y: Tensor) -> Tensor:
    """y with every pair of outputs turned and scaled: the partner stands half a group further on."""
    half = at.options["group_size"] // 2
    cosine, sine = _columns(at, half)
    first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
    return y * cosine + torch.stack([-second, first], -2).flatten(-3) * sine


def _columns(at: At, half: int) -> tuple[Tensor, Tensor]:
    """What the outputs and what their partners are multiplied by: by one angle and one length a pair (road_1), an
    output (road_2), or each of an output's two numbers (road_4)."""
    theta, alpha = at.tensors["road_theta"], at.tensors["road_alpha"]
    if at.options["variant"] == "road_4":
        (of_cosine, of_sine), (by_cosine, by_sine) = (
            value.unflatten(0, (-1, 2, 2 * half)).transpose(0, 1).flatten(1) for value in (theta, alpha)
        )
        return by_cosine * of_cosine.cos(), by_sine * of_sine.sin()
    if at.options["variant"] == "road_1":
        theta, alpha = (value.unflatten(0, (-1, half)).repeat_interleave(2, 0).flatten() for value in (theta, alpha))
    return alpha * theta.cos(), alpha * theta.sin()


def _road(at: At, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG001
    return _paired(at, y.float()).to(y.dtype)


def _road_merged(at: At, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return _paired(at, weight.t()).t(), None if bias is None else _paired(at, bias.float()).to(bias.dtype)


TURNS = {"BOFT": Turn(_boft, _boft_merged), "HRA": Turn(_hra, _hra_merged), "ROAD": Turn(_road, _road_merged)}
"""By PEFT's type."""
