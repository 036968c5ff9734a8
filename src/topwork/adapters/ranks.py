"""Whether a config and the tensors beside it tell of the same ranks. Free of torch."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from topwork.adapters.config import AdapterConfig, LoraConfig
from topwork.adapters.methods.lora.places import lora_places
from topwork.adapters.places import Places
from topwork.common.errors import AdapterError

RANK_AXIS = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""PEFT's names behind a module's path, and which of their two axes is as long as the rank."""


class Shaped(Protocol):
    """A tensor, of whatever make."""

    @property
    def shape(self) -> Sequence[int]: ...


def refuse_other_ranks(base: Places, config: AdapterConfig, tensors: Mapping[str, Shaped], called: str) -> None:
    """AdapterError where the ranks that a config means in this base are not those of the tensors, by their names
    without PEFT's prefix: with both, since the rank decides the scale too."""
    if not isinstance(config, LoraConfig):
        return
    wrong: list[tuple[str, int, int]] = []
    for target in lora_places(base, config)[0]:
        keys = {f"{target.path}.{name}": axis for name, axis in RANK_AXIS.items()}
        found = [(tuple(tensors[key].shape), axis) for key, axis in keys.items() if key in tensors]
        ranks = {shape[axis] for shape, axis in found if len(shape) == 2 and 0 not in shape}
        if ranks and ranks != {target.r}:
            wrong.append((target.path, target.r, min(ranks - {target.r})))
    if wrong:
        path, said, there = wrong[0]
        by = "r" if said == config.r else "rank_pattern"
        more = f", and so for {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise AdapterError(
            f"{called}: adapter_config.json gives {path} the rank {said} ({by}), and the tensors beside it have rank "
            f"{there}{more}; they were not saved together. The rank decides the scale, so neither is guessed: bring "
            "back the config that belongs to the tensors, with its r, rank_pattern and lora_alpha"
        )
