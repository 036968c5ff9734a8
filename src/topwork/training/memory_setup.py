"""What planning memory speaks of: what is trained on what, a pass, and what is held at a moment. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from topwork.adapters.config import AdapterConfig, FullConfig
from topwork.models.structure import Structure
from topwork.quantization.config import QuantizationConfig

Part = Literal[
    "weights", "constants", "adapter", "gradients", "optimizer", "activations", "logits", "scratch", "allocator",
    "process",
]  # fmt: skip


@dataclass(frozen=True)
class Member:
    """An adapter that is trained: its options, its optimizer, and how many values each of its tensors has, by the path
    of the module where it stands (`adapters/sizes.py`)."""

    adapter: AdapterConfig
    optim: str
    sizes: Mapping[str, tuple[int, ...]]

    @cached_property
    def values(self) -> int:
        """All that it trains."""
        return sum(map(sum, self.sizes.values()))

    @cached_property
    def whole(self) -> frozenset[str]:
        """Modules that it trains as copies of their own."""
        if isinstance(self.adapter, FullConfig):
            return frozenset(self.sizes)
        names = self.adapter.saved_modules
        return frozenset(path for path in self.sizes if any(f".{path}".endswith(f".{name}") for name in names))


@dataclass(frozen=True)
class Setup:
    """What is trained on what: the base as it will be held (`dtype` is bfloat16, float16 or float32; `auto` resolved),
    and the members that train together. `device` is cpu or cuda.

    process_bytes    what the process takes beside all that is told here, where somebody measured it; None for what
                     `memory_process.py` knows
    tokenizer_bytes  of the tokenizer's file, where it is at hand
    known            what was reckoned of it once, whatever the pass
    """

    structure: Structure
    dtype: str
    quantization: QuantizationConfig
    members: tuple[Member, ...]
    device: Literal["cpu", "cuda"] = "cpu"
    process_bytes: int | None = None
    tokenizer_bytes: int | None = None
    known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def value_bytes(self) -> int:
        """Of a value in the base's type."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class PassShape:
    """A pass: its tokens, how many of them are learned (these alone meet the head), and its longest sequence; `alone`
    where a step is known to have no other, so that no gradients stand there yet."""

    tokens: int
    learned_tokens: int
    longest: int
    alone: bool = False


@dataclass(frozen=True)
class Usage:
    """Bytes by part at one moment: "loading", "forward", "loss", "backward", "update", "saving"."""

    moment: str
    parts: Mapping[Part, int]

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(self.parts.values())
