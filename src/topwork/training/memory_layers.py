"""What a decoder layer takes of a pass, in bytes: kept until the pass has gone backward, and for a moment.

A fast layer (`models/fast.py`) of T tokens, in the base's type of e bytes, keeps

    e T (2 d + H D + 2 K D + H D + 2 f)    its two branches of the residual stream, q k v, the attention's output, gate
                                           and up
    4 T (H + 2)                            of each head a softmax's logarithm, of each norm a number
    e T R                                  what the A of low-rank terms make: R values of a token in all of its groups

and the last layer only the rows that are looked at, from its last attention projection on.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from topwork.models.structure import Module, Structure
from topwork.training.memory_held import rank
from topwork.training.memory_setup import Setup

INPUTS, OUTPUT, GATES, DOWN = "inputs", "output", "gates", "down"
GROUPS = {
    "q_proj": INPUTS, "k_proj": INPUTS, "v_proj": INPUTS, "qkv_proj": INPUTS, "o_proj": OUTPUT, "gate_proj": GATES,
    "up_proj": GATES, "gate_up_proj": GATES, "down_proj": DOWN,
}  # fmt: skip
"""A fast layer's linear layers by name: those with one input are one product."""
_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Need:
    """Bytes of a layer, or of all.

    saved     kept until the pass is over: on a CPU in the pass's own block
    heap      kept too, and taken from the C library (or torch's allocator)
    scratch   a function's own, the largest
    handoff   on its way from one function to the next, the largest
    passing   for a moment, from the C library: the largest
    """

    saved: int = 0
    heap: int = 0
    scratch: int = 0
    handoff: int = 0
    passing: int = 0

    def __add__(self, other: "Need") -> "Need":
        """Of one after the other."""
        return Need(
            self.saved + other.saved, self.heap + other.heap, max(self.scratch, other.scratch),
            max(self.handoff, other.handoff), max(self.passing, other.passing),
        )  # fmt: skip


def layer_number(path: str) -> int | None:
    """Of the decoder layer that a module lies in."""
    found = _NUMBER.search(path)
    return int(found[1]) if found else None


@lru_cache(maxsize=64)
def layer_modules(structure: Structure, number: int) -> tuple[Module, ...]:
    """A decoder layer's modules."""
    return tuple(module for module in structure.modules if layer_number(module.path) == number)


def ranks(setup: Setup, number: int, group: str) -> int:
    """The values a token that low-rank terms make in a group of a layer's linear layers: of several members the mean,
    since their rows share a pass."""
    modules = [m for m in layer_modules(setup.structure, number) if GROUPS.get(m.path.rpartition(".")[2]) == group]
    found = [sum(rank(member, module) for module in modules) for member in setup.members]
    return -(-sum(found) // max(1, len(found)))


def fast_layer(setup: Setup, number: int, tokens: int, rows: int) -> Need:
    """A layer of `tokens`, of which `rows` go on behind its attention."""
    s, e = setup.structure, setup.value_bytes
    d, q, kv, f = s.hidden, s.heads * s.head_dim, s.key_value_heads * s.head_dim, s.inner
    drops = any(member.adapter.dropout > 0 for member in setup.members)
    branch = e * d
    before = branch + e * (2 * q + 2 * kv + ranks(setup, number, INPUTS)) + 4 * s.heads + 4
    behind = (
        branch
        + e * (2 * f + ranks(setup, number, OUTPUT) + ranks(setup, number, GATES) + ranks(setup, number, DOWN))
        + 4
    )
    narrow = e == 2
    kept = tokens * before + rows * behind
    stream = 0 if narrow else 4 * d * (tokens + rows)
    scratch = rows * e * f * (2 + 2 * drops)
    handoff = e * max(rows * 2 * f, tokens * (q + 2 * kv), tokens * d)
    passing = tokens * (4 * d + e * (q + d))
    return Need(kept - (0 if narrow else branch * (tokens + rows)), stream, scratch, handoff, passing)


def plain_layer(setup: Setup, number: int, tokens: int) -> Need:
    """A layer of transformers' own modules."""
    s, e = setup.structure, setup.value_bytes
    q, kv = s.heads * s.head_dim, s.key_value_heads * s.head_dim
    drops = any(member.adapter.dropout > 0 for member in setup.members)
    inputs = (5 * s.hidden + q if drops else 2 * s.hidden) + s.inner
    kept = e * (2 * q + 2 * kv + 3 * s.inner + inputs) + 8 * s.hidden + 8
    return Need(0, tokens * kept, 0, 0, tokens * e * 4 * s.inner)


def total(needs: Iterable[Need]) -> Need:
    """Of layers one after the other."""
    found = Need()
    for need in needs:
        found = found + need
    return found
