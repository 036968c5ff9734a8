"""An optimizer step's rows as forward passes, and how large a pass may be."""

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from topwork.common.errors import RecipeError
from topwork.data.batches import collate, pack
from topwork.data.examples import Example
from topwork.ops.stream import Stream

LARGEST_PASS = {"cpu": 2048, "cuda": 16384}
"""Beyond these a larger pass is no faster."""


def step_passes(
    examples: Sequence[Example], tokens_per_pass: int, adapter: str | None, device: torch.device
) -> list[Stream]:
    """The rows of one optimizer step, packed into as few passes as fit."""
    lengths = [len(example.tokens) for example in examples]
    return [collate([examples[i] for i in bin], adapter).to(device) for bin in pack(lengths, tokens_per_pass)]


def choose_tokens_per_pass(
    asked: int | None, longest: int, config: PretrainedConfig, device: torch.device, free_bytes: int
) -> int:
    """The token budget of a pass: what was asked for, or a power of two that half of the free memory holds.

    Raises RecipeError where the longest sequence does not fit into what was asked for.
    """
    if asked is not None:
        if longest > asked:
            raise RecipeError(
                f"training.tokens_per_pass is {asked}, and the longest sequence has {longest} tokens; a sequence is "
                f"not cut in two. Give at least {longest}, leave it out, or set data.max_length lower."
            )
        return asked
    budget = LARGEST_PASS.get(device.type, LARGEST_PASS["cpu"])
    per_token = activation_bytes_per_token(config)
    while budget > 256 and budget * per_token > free_bytes / 2:
        budget //= 2
    return max(budget, longest)


def activation_bytes_per_token(config: PretrainedConfig) -> int:
    """A bound from above for what a 16-bit forward pass keeps per token: about 14 d + 8 f values a layer, and fp32
    copies in the norms."""
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return int(text.num_hidden_layers * 2 * (20 * text.hidden_size + 6 * inner))
