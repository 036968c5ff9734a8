"""The adapter methods: for each, which parts a config puts at which modules of a base."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from topwork.adapters.config import AdapterConfig
from topwork.adapters.lora import Lora
from topwork.adapters.part import Part
from topwork.adapters.targets import Target, features, find_targets


@dataclass(frozen=True)
class Planned:
    """A part that is yet to be made, and how many parameters it trains."""

    make: Callable[[], Part]
    trained: int


Plan = dict[str, Planned]
"""By the path of the module where the part goes."""


@dataclass(frozen=True)
class Bare:
    """A base as if nothing were grafted: its modules by path, and which of them are its embedding and its head."""

    modules: Mapping[str, nn.Module]
    embedding: str | None
    head: str | None


def lora_plan(bare: Bare, config: AdapterConfig) -> Plan:
    """LoRA in every target."""

    def at(target: Target) -> Planned:
        inputs, outputs = features(bare.modules[target.path])
        scaling = target.alpha / (math.sqrt(target.r) if config.use_rslora else target.r)
        gaussian = config.init_lora_weights == "gaussian"
        return Planned(
            lambda: Lora(inputs, outputs, target.r, scaling, config.lora_dropout, gaussian),
            target.r * (inputs + outputs),
        )

    return {target.path: at(target) for target in find_targets(bare.modules, bare.head, config)}


METHODS: dict[str, Callable[[Bare, AdapterConfig], Plan]] = {"lora": lora_plan}
"""Method -> which parts it puts where."""
