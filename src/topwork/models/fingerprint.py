"""A base model's fingerprint: adapters name the weights they were trained on, not only the name they had."""

import hashlib

import torch
from torch import Tensor

SAMPLE_VALUES = 1024


def fingerprint(module: torch.nn.Module) -> str:
    """`sha256:…` over the parameters' names and shapes and up to 1,024 values of each, rounded to bfloat16.

    The same base loaded in float32 or bfloat16 gives the same value. Take it from the Hugging Face module as loaded:
    before adapters are grafted, layers are fused, or weights are packed into 4 bits. Tied weights count once, under
    the first of their names; buffers (rotary tables) don't count. A change of a few single values can go unseen.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters(remove_duplicate=True)):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(_sample(parameter.detach()).numpy().astype("<i2").tobytes())
    return f"sha256:{digest.hexdigest()}"


def _sample(weight: Tensor) -> Tensor:
    """Evenly spaced values, first and last included, as bfloat16's bits [≤ 1024] int16; `weight` is never copied."""
    count = min(weight.numel(), SAMPLE_VALUES)
    index = torch.arange(count, device=weight.device)
    if weight.numel() > SAMPLE_VALUES:
        index = index * (weight.numel() - 1) // (SAMPLE_VALUES - 1)
    values = weight[torch.unravel_index(index, weight.shape)] if weight.dim() else weight.reshape(1)
    return values.to(torch.bfloat16).cpu().view(torch.int16)
