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
from dataclasses import dataclass, field, replace
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
    handback  of gradients on their way back the largest, beside that
    passing   for a moment while it goes backward, from the C library: the largest
    again     what of that a layer that is run again keeps
    """

    saved: int = 0
    heap: int = 0
    scratch: int = 0
    handoff: int = 0
    passing: int = 0
    again: int = 0
    handback: int = 0

    def __add__(self, other: "Need") -> "Need":
        """Of one after the other."""
        return Need(
            self.saved + other.saved, self.heap + other.heap, max(self.scratch, other.scratch),
            max(self.handoff, other.handoff), max(self.passing, other.passing), max(self.again, other.again),
            max(self.handback, other.handback),
        )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A decoder layer by its number: its modules by name, and widths of a row (`q` and `kv` of all heads)."""

    setup: Setup
    number: int
    modules: dict[str, Module] = field(hash=False)

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """The same for layers that are made alike, of which one is looked at."""
        members = self.setup.members
        return tuple(
            (name, replace(module, path=""), *(member.sizes.get(module.path, ()) for member in members))
            for name, module in self.modules.items()
        )

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
    def joins(self) -> bool:
        """Whether weights of layers with one input are made one tensor (`models/joined.py`)."""
        gates = self.setup.structure.fast and len(self.group(GATES)) > 1
        return gates or (self.fast_attention and len(self.group(INPUTS)) > 1)

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
        """Values a token that low-rank terms make: of several members the most, whose rows may fill a pass."""
        modules = [module for name in groups for module in self.group(name)]
        found = [sum(rank(member, module) for module in modules) for member in self.setup.members]
        return max(found, default=0)

    def gains(self, *groups: str) -> bool:
        """Whether somebody learns what a group's products are multiplied by."""
        modules = [module for name in groups for module in self.group(name)]
        return any(_scales(member, module) for member in self.setup.members for module in modules)


def layers_of(setup: Setup) -> list[Layer]:
    """The decoder layers, in order."""
    if "layers" in setup.known:
        return list(setup.known["layers"])
    found: dict[int, dict[str, Module]] = {number: {} for number in range(setup.structure.layers)}
    for module in setup.structure.by_path.values():
        number = layer_number(module.path)
        if number in found:
            found[number][module.path[_end(module.path) :]] = module
    setup.known["layers"] = [Layer(setup, number, modules) for number, modules in found.items()]
    return list(setup.known["layers"])


def kinds_of(setup: Setup) -> list[int]:
    """For each layer a number, the same for those that are made alike: nearly all."""
    if "kinds" not in setup.known:
        numbers: dict[object, int] = {}
        setup.known["kinds"] = [numbers.setdefault(layer.kind, len(numbers)) for layer in layers_of(setup)]
    return list(setup.known["kinds"])


def layer_number(path: str) -> int | None:
    """Of the decoder layer that a module lies in."""
    found = _NUMBER.search(path)
    return int(found[1]) if found else None


def _end(path: str) -> int:
    found = _NUMBER.search(path)
    return found.end() if found else 0


def _scales(member: Member, module: Module) -> bool:
    """IA3 multiplies the inputs of a feedforward layer's last."""
    if isinstance(member.adapter, Ia3Config):
        return member.sizes.get(module.path) == (module.rows,)
    return isinstance(member.adapter, LoraConfig) and member.adapter.use_dora and module.path in member.sizes


def runs_modules(member: Member) -> bool:
    """Whether a member's parts run as modules, in fast layers too: copies of whole modules, DoRA with dropout."""
    whole = isinstance(member.adapter, FullConfig) or any(layer_number(path) is not None for path in member.whole)
    return member.adapter.runs_plain or whole


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
    scratch += tokens * e * layer.terms(INPUTS)
    back, passing = tokens * e * max(q, d), tokens * e * (q + kv) if layer.heads_normed else 0
    passing += (rows * e * d * follows) if narrow else tokens * e * (q + d)
    heap = 0 if narrow else 4 * d * tokens
    return Need(saved, heap, scratch, tokens * e * max(d, q + 2 * kv), passing, handback=back * narrow)


def fast_mlp(layer: Layer, rows: int, in_workspace: bool) -> Need:
    """The second half; `in_workspace`: the pass's own, which a layer that runs again and a GPU have not."""
    (d, _, _, f), e = layer.widths, layer.setup.value_bytes
    narrow, follows, drops = e == 2, layer.norm_follows, 1 + layer.drops
    keeps_product = follows or (layer.gains(DOWN) and f > d)
    saved = rows * (e * (d * narrow + 2 * f + layer.terms(GATES, DOWN) + d * keeps_product))
    saved += rows * 4 * (layer.norm_precedes + follows)
    slopes = max(layer.terms(GATES, DOWN), layer.terms(INPUTS, OUTPUT))  # of both halves, where they are one step
    scratch = rows * e * (f * 2 * drops + slopes)
    heap, passing = (0, rows * e * d * follows) if narrow else (4 * d * rows, rows * e * d)
    in_place = in_workspace and not layer.gains(GATES)  # the gradient takes the place of what it is one of
    on_its_way = 0 if in_place else 2 * f
    return Need(saved, heap, scratch, rows * e * max(d, on_its_way), passing, handback=rows * e * d * narrow)


def total(needs: Iterable[Need]) -> Need:
    """Of layers one after the other."""
    found = Need()
    for need in needs:
        found = found + need
    return found


def boundary_bytes(structure: Structure, value_bytes: int) -> int:
    """Of a token between two layers: fast ones hand on fp32."""
    return structure.hidden * (4 if structure.fast else value_bytes)


def given_bytes(structure: Structure, value_bytes: int, count: int) -> int:
    """Of a token, what the first `count` layers are given: embeddings, and what layers hand on."""
    return (count > 0) * structure.hidden * value_bytes + max(0, count - 1) * boundary_bytes(structure, value_bytes)
