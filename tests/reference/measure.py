"""How far two results are apart, and how far rounding may drive them."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROUNDING = 2.0**-24
"""By how much of itself fp32 moves a value at most as it rounds it: u."""
LOGITS_APART, GRADIENTS_APART = 1e-5, 2e-5
"""How far apart (`relative`, over whole tensors) two right passes in fp32 through a base of `families.py` may be.

A product of n terms of mixed signs is off by u sqrt(n) of its size (`apart_by_rounding` says why). Two layers and a
head are 13 products in a row of at most 96 terms, and backward three times as many; on two sides that makes
u sqrt(2 * 13 * 96) = 3e-6 of logits and 5e-6 of gradients. Norms that are divided by small lengths, as gemma3's, make
twice as much of it: what `apart_by_rounding` tries comes to 2e-6 (gpt2) .. 7e-6 (gemma3) of all logits. Three times the
first figures it is, then. Whatever is wrong, or in 16 bits where it should not be, is a hundred times as far.
"""


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
