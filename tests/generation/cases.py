"""The calls whose tokens `before.json` holds, the greedy ones as they were before there was an engine."""

from collections.abc import Callable
from typing import Any

from reference.families import added, sequences, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.models.base import Base

WILD = {"initializer_range": 0.3, "init_std": 0.3}
"""Random models of the usual deviation say one token for ever."""

LENGTHS = (9, 1, 17, 4, 9, 30, 2, 52)
NAMES = ["lora", None, "prefix", "dora", "lora", "dora", None, "prefix"]
NEW, STOPS = 14, {5, 11, 40, 41, 42, 77}
CALLS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({}, 64),
    "greedy, three at once": ({}, 3),
    "drawn": ({"temperature": 0.8, "top_p": 0.9, "seed": 7}, 64),
    "drawn, three at once": ({"temperature": 0.8, "top_p": 0.9, "seed": 7}, 3),
}
"""Name -> sampling and batch size. The context ends one of the prompts, stop tokens some, their number the others."""


def mixed_base() -> Base:
    """A LoRA, a DoRA and a prefix of three virtual tokens."""
    base = tiny_base("llama", **WILD)
    configs = {
        "lora": AdapterConfig(r=4, lora_alpha=16),
        "dora": AdapterConfig(r=4, lora_alpha=16, use_dora=True),
        "prefix": AdapterConfig(method="prefix", num_virtual_tokens=3),
    }
    added(base, **configs)
    return base


def called(
    generate: Callable[..., list[list[int]]], base: Base, sampling: Any, batch_size: int
) -> dict[str, list[Any]]:
    """The tokens of a call, and what its callbacks were told in their order."""
    told: list[Any] = []
    tokens = generate(
        base, [part.tolist() for part in sequences(LENGTHS)], NAMES, STOPS, sampling, batch_size,
        lambda count: told.append(count), lambda index, token: told.append([index, token]),
    )  # fmt: skip
    return {"tokens": tokens, "told": told}
