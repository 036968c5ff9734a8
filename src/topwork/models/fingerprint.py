"""A base model's fingerprint: adapters name the weights they were trained on, not only the name they had."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from topwork.quantization.linear import packed_modules

SAMPLE_VALUES = 1024

Sampled = tuple[tuple[int, ...], bytes]
"""A weight's shape, and some of its values."""


def fingerprint(module: nn.Module, samples: Mapping[str, Sampled] | None = None) -> str:
    """`sha256:…` over the parameters' names and shapes and up to 1,024 values of each, rounded to bfloat16.

    The same base loaded in float32 or bfloat16 gives the same value. Take it from the Hugging Face module as loaded:
    before adapters are grafted or layers are fused. Of weights that were packed while they were read, `samples` says by
    name what they were before, so that a base and its quantized reading are the same base; a checkpoint that was
    quantized already is known by its dequantized weights. Tied weights count once, under the first of their names;
    buffers (rotary tables) don't count. A change of a few single values can go unseen.
    """
    packed = {f"{path}.weight": layer.packed for path, layer in packed_modules(module).items()}

    def taken(name: str, parameter: Tensor) -> Sampled:
        known = samples.get(name) if samples else None
        return known or sampled(packed[name].dense() if name in packed else parameter.detach())

    named = sorted(module.named_parameters(remove_duplicate=True))
    return digest_of((name, taken(name, parameter)) for name, parameter in named)


def digest_of(samples: Iterable[tuple[str, Sampled]]) -> str:
    """Of the parameters, sorted by name."""
    digest = hashlib.sha256()
    for name, (shape, values) in samples:
        digest.update(f"{name} {shape}\n".encode())
        digest.update(values)
    return f"sha256:{digest.hexdigest()}"


def sampled(weight: Tensor) -> Sampled:
    """What the fingerprint takes of one weight."""
    return sample_of(weight, weight.dtype)


def sample_of(weight: Tensor, dtype: torch.dtype) -> Sampled:
    """The same of a weight that is run in `dtype` and lies in a type of its own; it is never copied."""
    return tuple(weight.shape), _sample(weight, dtype).numpy().astype("<i2").tobytes()


def _sample(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Evenly spaced values, first and last included, as bfloat16's bits [≤ 1024] int16."""
    count = min(weight.numel(), SAMPLE_VALUES)
    index = torch.arange(count, device=weight.device)
    if weight.numel() > SAMPLE_VALUES:
        index = index * (weight.numel() - 1) // (SAMPLE_VALUES - 1)
    values = weight[torch.unravel_index(index, weight.shape)] if weight.dim() else weight.reshape(1)
    return values.to(dtype).to(torch.bfloat16).cpu().view(torch.int16)
