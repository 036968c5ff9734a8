"""What a fast layer is made of, as `models/recognise.py` finds it: names of modules, and what they do."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from topwork.ops.attention_reference import AttentionRule
from topwork.ops.self_attention import HeadNorm, Heads, SelfAttention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu,
}  # fmt: skip


@dataclass(frozen=True)
class Wiring:
    """The norms of a layer: before and after its attention, before and after its MLP."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None

    @property
    def children(self) -> frozenset[str]:
        """The modules that a layer wired so consists of."""
        norms = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return frozenset({"self_attn", "mlp", *filter(None, norms)})


@dataclass(frozen=True)
class Norm:
    """An RMS norm that was recognised, by what it does; `kind` is its class, which an adapter around it changes."""

    kind: type
    eps: float
    unit_offset: bool

    def is_still(self, module: nn.Module) -> bool:
        """No adapter has put a module of its own there, and it is frozen."""
        return type(module) is self.kind and not module.weight.requires_grad


@dataclass(frozen=True)
class AttentionPart:
    """How a layer's attention is made: its input projections, how they are divided into heads, what is asked of
    attention, and by name what else it has."""

    inputs: tuple[str, ...]
    heads: Heads
    rule: AttentionRule
    rotary: bool
    norms: dict[str, Norm]
    sinks: str | None

    def fits(self, attention: nn.Module) -> bool:
        """Whether its modules are still what they were: an adapter may have put its own in their places."""
        there = all(hasattr(attention, name) for name in (*self.inputs, "o_proj", *self.norms))
        return there and all(norm.is_still(bare(getattr(attention, name))) for name, norm in self.norms.items())

    def how(self, attention: nn.Module, restores: bool) -> SelfAttention:
        """With the weights that are there now."""
        norms = [
            HeadNorm(bare(getattr(attention, name)).weight, norm.eps, norm.unit_offset)  # type: ignore[arg-type]
            for name, norm in self.norms.items()
        ]
        sinks = getattr(attention, self.sinks) if self.sinks else None
        return SelfAttention(self.heads, self.rule, (norms[0], norms[1]) if norms else None, sinks, restores)


@dataclass(frozen=True)
class MlpPart:
    """How a gated MLP is made."""

    inputs: tuple[str, ...]
    activation: str


def own(module: nn.Module) -> nn.Module:
    """The base's own module, whatever adapter stands around it."""
    found: nn.Module = getattr(module, "base_layer", module)
    return found


def bare(module: nn.Module) -> nn.Module:
    """The base's own module, where an adapter stands around it and no token of this pass goes through that."""
    tell = getattr(module, "idle_base", None)
    base = tell() if tell is not None else None
    return module if base is None else base
