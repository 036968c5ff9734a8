"""What decoder layers take of a pass, in bytes: kept until it has gone backward, and for a moment.

A fast layer (`models/fast.py`) of T tokens, in the base's type of e bytes, keeps

    e T (2 d + 2 H D + 2 K D + 2 f)    its two branches of the residual stream, q k v, the attention's output, gate, up
    4 T (H + 2)                        of each head a softmax's logarithm, of each norm a number
    e T R                              what the A of low-rank terms make: R values of a token in all of its groups

and more where heads are normalised, norms follow, or gains (DoRA, IA3) look at a product again. The last layer keeps
from its last attention projection on only the rows that are looked at. Other layers keep what autograd keeps of
transformers' own modules (`memory_plain.py`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from topwork.adapters.config import FullConfig, Ia3Config, LoraConfig
from topwork.models.structure import Module, Structure
from topwork.training.memory_held import rank
from topwork.training.memory_setup import Member, Setup

INPUTS, OUTPUT, GATES, DOWN = "inputs", "output", "gates", "down"
GROUPS = {
    "q_proj": INPUTS, "k_proj": INPUTS, "v_proj": INPUTS, "qkv_proj": INPUTS, "o_proj": OUTPUT, "gate_proj": GATES,
    "up_proj": GATES, "gate_up_proj": GATES, "down_proj": DOWN,
}  # fmt: skip
"""A fast layer's linear layers by name: those with one input are one product."""
BEFORE = ("input_layernorm",)
AFTER = ("post_feedforward_layernorm", "post_mlp_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Need:
    """Bytes of a layer, or of all.

    saved     kept until the pass is over: on a CPU in the pass's own block
    heap      kept too, and taken from the C library (or torch's allocator)
    scratch   a function's own, the largest
    handoff   on its way from one function to the next, the largest
    passing   for a moment while it goes backward, from the C library: the largest
    again     what of that a layer that is run again keeps
    """

    saved: int = 0
    heap: int = 0
    scratch: int = 0
    handoff: int = 0
    passing: int = 0
    again: int = 0

    def __add__(self, other: "Need") -> "Need":
        """Of one after the other."""
        return Need(
            self.saved + other.saved, self.heap + other.heap, max(self.scratch, other.scratch),
            max(self.handoff, other.handoff), max(self.passing, other.passing), max(self.again, other.again),
        )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A decoder layer by its number: its modules by name, and widths of a row (`q` and `kv` of all heads)."""

    setup: Setup
    number: int
    modules: dict[str, Module] = field(hash=False)

    @cached_property
    def widths(self) -> tuple[int, int, int, int]:
        """d, q, kv, f."""
        s = self.setup.structure
        return s.hidden, s.heads * s.head_dim, s.key_value_heads * s.head_dim, s.inner

    @cached_property
    def fast_attention(self) -> bool:
        """Whether its attention runs through `models/fast.py`."""
        there = {"self_attn.o_proj"} <= self.modules.keys() and any(f"self_attn.{n}" in self.modules for n in GROUPS)
        return self.setup.structure.fast or (self.experts and there and not self.modules["self_attn.o_proj"].bias)

    @cached_property
    def experts(self) -> bool:
        """Whether its MLP is many of them, held in one tensor."""
        return any(name.endswith(".experts") for name in self.modules)

    @cached_property
    def norm_follows(self) -> bool:
        """Whether attention and MLP are normalised before they go into the stream."""
        return any(name in self.modules for name in AFTER)

    @cached_property
    def norm_precedes(self) -> bool:
        """Whether both are given a norm of the stream."""
        return any(name in self.modules for name in BEFORE)

    @cached_property
    def heads_normed(self) -> int:
        """Numbers a token that norms of heads keep; 0 where there are none."""
        norms = [self.modules[f"self_attn.{name}"] for name in HEAD_NORMS if f"self_attn.{name}" in self.modules]
        s = self.setup.structure
        if len(norms) < len(HEAD_NORMS):
            return 0
        return s.heads + s.key_value_heads if norms[0].tensors[0] == s.head_dim else 2

    @cached_property
    def drops(self) -> bool:
        """Whether a member drops values on their way into its terms."""
        return any(member.adapter.dropout > 0 for member in self.setup.members)

    def group(self, name: str) -> list[Module]:
        """Its linear layers with one input."""
        return [module for path, module in self.modules.items() if GROUPS.get(path.rpartition(".")[2]) == name]

    def terms(self, *groups: str) -> int:
        """Values a token that low-rank terms make: of several members the mean, since their rows share a pass."""
        modules = [module for name in groups for module in self.group(name)]
        found = [sum(rank(member, module) for module in modules) for member in self.setup.members]
        return -(-sum(found) // max(1, len(found)))

    def gains(self, *groups: str) -> bool:
        """Whether somebody learns what a group's products are multiplied by."""
        paths = [module.path for name in groups for module in self.group(name)]
        return any(_scales(member, path) for member in self.setup.members for path in paths)


def layers_of(setup: Setup) -> list[Layer]:
    """The decoder layers, in order."""
    found: dict[int, dict[str, Module]] = {number: {} for number in range(setup.structure.layers)}
    for module in setup.structure.modules:
        number = layer_number(module.path)
        if number in found:
            found[number][module.path[_end(module.path) :]] = module
    return [Layer(setup, number, modules) for number, modules in found.items()]


def layer_number(path: str) -> int | None:
    """Of the decoder layer that a module lies in."""
    found = _NUMBER.search(path)
    return int(found[1]) if found else None


def _end(path: str) -> int:
    found = _NUMBER.search(path)
    return found.end() if found else 0


def _scales(member: Member, path: str) -> bool:
    adapter = member.adapter
    scales = (isinstance(adapter, LoraConfig) and adapter.use_dora) or isinstance(adapter, Ia3Config)
    return scales and path in member.sizes


def runs_modules(member: Member) -> bool:
    """Whether a member's parts run as modules, in fast layers too: copies of whole modules, DoRA with dropout."""
    return member.adapter.runs_plain or isinstance(member.adapter, FullConfig)


def fast_attention(layer: Layer, tokens: int, rows: int) -> Need:
    """The first half of a fast layer: of `tokens`, of which `rows` go on behind the attention."""
    (d, q, kv, _), e, h = layer.widths, layer.setup.value_bytes, layer.setup.structure.heads
    narrow, follows, drops = e == 2, layer.norm_follows, 1 + layer.drops
    saved = tokens * (e * (d * narrow + 2 * q + 2 * kv + layer.terms(INPUTS)) + 4 * (h + layer.norm_precedes))
    saved += tokens * 4 * layer.heads_normed
    keeps_product = follows or (layer.gains(OUTPUT) and q > d)
    saved += rows * e * (layer.terms(OUTPUT) + d * keeps_product) + 4 * rows * follows
    again = rows * e * d * (layer.gains(OUTPUT) and not keeps_product)
    scratch = max(tokens * e * d * 2 * drops if layer.norm_precedes else 0, rows * e * q * (drops - 1) * 2 + again)
    passing = tokens * e * (q + d) + (tokens * e * (q + kv) if layer.heads_normed else 0)
    return Need(saved, 0 if narrow else 4 * d * tokens, scratch, tokens * e * max(d, q + 2 * kv), passing)


def fast_mlp(layer: Layer, rows: int) -> Need:
    """The second half."""
    (d, _, _, f), e = layer.widths, layer.setup.value_bytes
    narrow, follows, drops = e == 2, layer.norm_follows, 1 + layer.drops
    keeps_product = follows or (layer.gains(DOWN) and f > d)
    saved = rows * (e * (d * narrow + 2 * f + layer.terms(GATES, DOWN) + d * keeps_product))
    saved += rows * 4 * (layer.norm_precedes + follows)
    scratch = rows * e * f * 2 * drops
    return Need(saved, 0 if narrow else 4 * d * rows, scratch, rows * e * max(d, 2 * f), rows * e * d)


def total(needs: Iterable[Need]) -> Need:
    """Of layers one after the other."""
    found = Need()
    for need in needs:
        found = found + need
    return found


def boundary_bytes(structure: Structure, value_bytes: int) -> int:
    """Of a token between two layers: fast ones hand on fp32."""
    return structure.hidden * (4 if structure.fast else value_bytes)
