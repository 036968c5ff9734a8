"""How far two results are apart, and how far rounding may drive them."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROUNDING = 2.0**-24
"""By how much of itself fp32 moves a value at most as it rounds it: u."""


def apart(products: int, terms: int) -> float:
    """How far apart (`relative`, over whole tensors) two right results of `products` in a row may be in fp32.

    A product of n terms of mixed signs is off by u sqrt(n) of its size (`apart_by_rounding` says why), so several of
    them on two sides by u sqrt(2 products n). Three times that, for norms that are divided by small lengths: for the
    bases of `families.py`, LOGITS_APART, it is 9e-6, and `apart_by_rounding` finds 2e-6 (gpt2) .. 7e-6 (gemma3).
    Whatever is wrong, or in 16 bits where it should not be, is a hundred times as far.
    """
    return 3 * ROUNDING * math.sqrt(2 * products * terms)


LOGITS_APART = apart(2 * 6 + 1, 96)
"""Of a base of `families.py`, whose two layers are six products in a row each, and its head one."""
GRADIENTS_APART = apart(3 * (2 * 6 + 1), 96)
"""Backward it is two more for each."""


def relative(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor], least: float = 1e-300) -> float:
    """|found - expected| / |expected|, over all tensors together, in float64.

    `least` is a norm below which `expected` is rounding's own noise; it then stands in the denominator.
    """
    left, right = (
        torch.cat([x.detach().double().flatten() for x in ([side] if isinstance(side, Tensor) else side)])
        for side in (found, expected)
    )
    return float((left - right).norm() / right.norm().clamp_min(least))


def furthest(found: Tensor, expected: Tensor) -> float:
    """The largest distance of two values, in float64."""
    return float((found.detach().double() - expected.detach().double()).abs().max())


@torch.no_grad()
def apart_by_rounding(model: nn.Module, forward: Callable[[nn.Module], Tensor], draws: int = 8) -> float:
    """How far (`furthest`) two results of `forward(model)` may be apart that are right, both in fp32, but made by other
    kernels, in another order, or of weights that were added up before.

    A product sums n terms t_1 .. t_n. Each of its n partial sums is rounded, by u = 2^-24 of itself at most. Where
    the terms' signs are mixed, a partial sum is no larger than sqrt(t_1^2 + .. + t_n^2) = |t| in the mean square, and
    as roundings' signs are mixed too, n of them come to u sqrt(n) |t|; sums in blocks, or fused, to less. What becomes
    of that on its way to the result is the model's doing: an adapter that learned at a high rate has made models that
    enlarge it a hundred times as much as others. So it is tried: in float64 the output of every linear layer is moved
    by a normal number of that size, for its own inputs and weights, and the furthest that the result is moved by in
    `draws` tries is taken four times: twice for two results, twice because the tries are few. Norms, softmax, rotary
    positions and sums of two round each value a few times where a product does n, and are covered by it.
    """
    exact, noise = copy.deepcopy(model).double(), torch.Generator()

    def moved(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        size = (weight.shape[1] * (inputs[0].square() @ weight.square().t())).sqrt()
        return output + ROUNDING * size * torch.randn(output.shape, dtype=output.dtype, generator=noise)

    expected, far = forward(exact), 0.0
    for layer in exact.modules():
        if isinstance(layer, nn.Linear | Conv1D):
            layer.register_forward_hook(moved)
    for draw in range(draws):
        noise.manual_seed(draw)
        far = max(far, furthest(forward(exact), expected))
    return 4 * far
