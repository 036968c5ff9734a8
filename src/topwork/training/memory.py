"""What training takes of memory, part by part and moment by moment: the one model of it, by which runs are planned and
which `topwork plan` prints. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from topwork.adapters.config import AdapterConfig
from topwork.models.structure import Structure
from topwork.quantization.config import QuantizationConfig

Part = Literal[
    "weights", "constants", "adapter", "gradients", "optimizer", "activations", "logits", "scratch", "allocator",
    "process",
]  # fmt: skip


@dataclass(frozen=True)
class Member:
    """An adapter that is trained: its options, its optimizer, and how many values each of its trained tensors has."""

    adapter: AdapterConfig
    optim: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Setup:
    """What is trained on what: the base as it will be held (`dtype` is bfloat16, float16 or float32; `auto` resolved),
    and the members that train together. `device` is cpu or cuda."""

    structure: Structure
    dtype: str
    quantization: QuantizationConfig
    members: tuple[Member, ...]
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class PassShape:
    """A pass: its tokens, how many of them are learned (these alone meet the head), and its longest sequence."""

    tokens: int
    learned_tokens: int
    longest: int


@dataclass(frozen=True)
class Usage:
    """Bytes by part at one moment: "loading", "forward", "loss", "backward", "update", "saving"."""

    moment: str
    parts: Mapping[Part, int]

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(self.parts.values())


def moments(setup: Setup, shape: PassShape, checkpointed_layers: int = 0) -> list[Usage]:
    """What is held at each moment of a run, in its order."""
    raise NotImplementedError


def peak(setup: Setup, shape: PassShape, checkpointed_layers: int = 0) -> Usage:
    """The moment that takes most."""
    return max(moments(setup, shape, checkpointed_layers), key=lambda usage: usage.bytes)
