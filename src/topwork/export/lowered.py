"""A LoRA in its plainest form, which every reader takes alike: one rank R for all modules, lora_alpha = R, the scale in
B. rsLoRA, patterns, unequal ranks, chosen layers and expressions, PiSSA and its kin are no more than that."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from topwork.adapters.fitting import Parts
from topwork.adapters.lowrank import LowRankUpdate, low_rank_updates
from topwork.adapters.method import Bare
from topwork.quantization.kinds import features


@dataclass(frozen=True)
class Lowered:
    """An adapter as readers get it: updates by the paths of their modules in the Hugging Face model, in the model's
    order, all of rank `rank`. A reader's scale alpha / r is one with alpha = rank."""

    updates: dict[str, LowRankUpdate]
    rank: int

    @property
    def alpha(self) -> int:
        """lora_alpha."""
        return self.rank


def lowered(parts: Parts, bare: Bare, ranks: Sequence[int] | None = None, whole_layers: bool = False) -> Lowered:
    """The plain form of a LoRA's parts.

    ranks         what R may be, the smallest that fits is taken; None takes the largest rank that a module has
    whole_layers  where some layers have an update at a module's name, an update of zeros in the others too

    Raises AdapterError for parts that are no LoRA; ValueError where no rank fits (the preflight has refused it).
    """
    updates = low_rank_updates(parts)
    if whole_layers:
        updates |= {path: _zeros(path, bare) for path in missing_layers(updates, bare.modules)}
    largest = max(update.rank for update in updates.values())
    rank = largest if ranks is None else min(rank for rank in ranks if rank >= largest)
    order = {path: place for place, path in enumerate(bare.modules)}
    return Lowered({path: updates[path].padded(rank) for path in sorted(updates, key=order.__getitem__)}, rank)


def missing_layers(paths: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Modules that differ from one of the `paths` in a layer's number alone and are not among them."""
    chosen = set(paths)
    names = {_any_layer(path) for path in chosen}
    return [path for path in modules if path not in chosen and _any_layer(path) in names]


def _any_layer(path: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", path, count=1)


def _zeros(path: str, bare: Bare) -> LowRankUpdate:
    inputs, outputs = features(bare.modules[path])
    return LowRankUpdate(torch.zeros(1, inputs), torch.zeros(outputs, 1), 1.0)
