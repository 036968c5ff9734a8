"""An adapter method is one record: its options, which parts it puts where, its files, and what a sweep tries of it.

Each method's own file in `methods/` holds its class, its plan, its PEFT files and its record; `methods/table.py` lists
the records. `Adapters`, `plan_adapter` and `read_adapter` take the table as an argument, so one of your own is given as
`METHODS | {"mine": Method(…)}`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic

from torch import Tensor, nn

from topwork.adapters.files import Config, Files
from topwork.adapters.module import AdapterModule
from topwork.adapters.seen import SeenBase, seen_base

Original = Callable[[str], Tensor]
"""Path of a linear layer -> its weight [out, in] as it was before it was quantized."""


@dataclass(frozen=True)
class Planned:
    """A part that is yet to be made, how many parameters it trains, and what it does by besides (`setting`, as the part
    tells it)."""

    make: Callable[[], AdapterModule]
    trained: int
    setting: Any = None


Plan = dict[str, Planned]
"""By the path of the module where the part goes."""


@dataclass(frozen=True)
class Bare:
    """A base as if nothing were grafted: its modules by path, which of them are its embedding and its head, its Hugging
    Face config, and its tokenizer where one was given. `original` gives a quantized layer's weight as it was before,
    where somebody has it at hand."""

    modules: Mapping[str, nn.Module]
    embedding: str | None
    head: str | None
    config: Any = None
    tokenizer: Any = None
    original: Original | None = None

    @cached_property
    def seen(self) -> SeenBase:
        """Its kinds and sizes, by which targets are chosen."""
        return seen_base(self.modules, self.embedding, self.head, self.config)


@dataclass(frozen=True)
class Preset:
    """An arm of `topwork sweep --preset methods`: the recipe's keys that it sets beside `adapter.method`, and its
    learning rate as a multiple of the recipe's, which is meant for LoRA."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0


@dataclass(frozen=True)
class Method(Generic[Config]):
    """One adapter method.

    config   the class of its options
    plan     which parts it puts at which modules of a base; raises AdapterError where they do not fit
    files    how its folders are written and read
    presets  what a sweep over methods tries of it, by name
    """

    config: type[Config]
    plan: Callable[[Bare, Config], Plan]
    files: Files[Config]
    presets: Mapping[str, Preset] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As recipes call it."""
        return str(self.config.model_fields["method"].default)
