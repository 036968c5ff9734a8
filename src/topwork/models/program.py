"""A base as C can run it in one call a pass (`models/steps.py`): what generation does token after token.

A base has a plan if all of its layers are fast in every part (`models/fast.py`), its embedding, last norm and head are
what they look like, and a short pass by the plan gives what the model itself gives. Everything else runs on the model's
own modules. A plan knows nothing of adapters but places: linear layers and norms where a part of one may stand.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from topwork.models.base import Base
from topwork.models.fast import FastLayer
from topwork.models.layer_parts import Norm, own
from topwork.models.recognise import norm_of
from topwork.models.text_part import text_model
from topwork.ops import decode as c
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.batch import batch_of
from topwork.ops.context import running
from topwork.ops.self_attention import Heads
from topwork.quantization.linear import QuantizedLinear

TABLE_POSITIONS = 2048
"""For so many positions more tables of angles are made at a time."""
BY_LENGTH = {"dynamic", "longrope"}
"""Rotary embeddings whose angles depend on how long a text is, and not on the position alone."""


@dataclass(frozen=True)
class Linears:
    """Linear layers with one input: their weights, and the place of the first."""

    weights: tuple[c.Weight, ...]
    place: int

    @property
    def outputs(self) -> int:
        """All of them together."""
        return sum(weight.n for weight in self.weights)


@dataclass(frozen=True)
class PlacedNorm:
    """A norm's weight [d] in fp32 as C reads it, and its place."""

    weight: int
    eps: float
    unit_offset: bool
    place: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """A decoder layer. `kind` is which table of angles it turns by, None for none."""

    number: int
    attention: nn.Module
    heads: Heads
    rule: AttentionRule
    qkv: Linears
    out: Linears
    gate_up: Linears
    down: Linears
    before_attention: PlacedNorm | None
    after_attention: PlacedNorm | None
    before_mlp: PlacedNorm | None
    after_mlp: PlacedNorm | None
    query_norm: PlacedNorm | None
    key_norm: PlacedNorm | None
    across_heads: bool
    activation: int
    multiplier: float
    sinks: int | None
    kind: int | None


@dataclass(eq=False)
class Plan:
    """A base's steps as they are before there are buffers.

    places    the base's own module -> its place; `count` of them
    scale     what embeddings are multiplied by, in their own type
    """

    dtype: torch.dtype
    width: int
    layers: tuple[LayerPlan, ...]
    last_norm: PlacedNorm
    head: Linears
    places: dict[nn.Module, int]
    scale: float
    angles: "Angles"
    kept: c.Kept
    stamps: tuple[int, ...] = field(repr=False)
    tried: bool | None = None
    """Whether a pass by it gave what the model gives; None before anyone looked."""

    @property
    def count(self) -> int:
        """Places."""
        return len(self.places)

    @property
    def inputs(self) -> int:
        """Of the widest weight."""
        groups = [(layer.qkv, layer.out, layer.gate_up, layer.down) for layer in self.layers]
        return max(weight.k for group in groups for linears in group for weight in linears.weights)


Table = tuple[Tensor, Tensor]
"""cos and sin [positions, R] in fp32."""


class Angles:
    """The tables of each kind of layer, for as many positions as were asked for."""

    def __init__(self, make: Callable[[int], list[Table]]) -> None:
        self._make = make
        self._positions = 0
        self._tables: list[Table] = []

    def upto(self, positions: int) -> tuple[int, list[Table]]:
        """Tables for so many positions at least, and for how many they are. They are replaced, never written again."""
        if positions > self._positions:
            count = -(-positions // TABLE_POSITIONS) * TABLE_POSITIONS
            self._tables = self._make(count)
            self._positions = count  # last: where there is no memory for tables, C must not read beyond the old ones
        return self._positions, self._tables


_PLANS: "WeakKeyDictionary[nn.Module, Plan | None]" = WeakKeyDictionary()


def plan_of(base: Base) -> Plan | None:
    """The base's plan, made once and again where its weights are other tensors; None where it has none."""
    if not c.is_there(base.module.dtype, base.device):
        return None
    known = _PLANS.get(base.module)
    if base.module in _PLANS and (known is None or known.stamps == _stamps(base.module)):
        return known
    _PLANS[base.module] = found = _Planner(base).plan()
    return found


def _stamps(model: nn.Module) -> tuple[int, ...]:
    """Where the base's weights are."""
    return tuple(p.data_ptr() for name, p in model.named_parameters() if ".adapters." not in name)


class _Cannot(Exception):
    """This base has no plan."""


class _Planner:
    """Looks at a base."""

    def __init__(self, base: Base) -> None:
        self.base, self.dtype = base, base.module.dtype
        self.kept = c.Kept()
        self.places: dict[nn.Module, int] = {}

    def plan(self) -> Plan | None:
        try:
            return self._plan()
        except _Cannot:
            return None

    @torch.no_grad()
    def _plan(self) -> Plan:
        base, model = self.base, text_model(self.base.module)
        layers = [module for module in model.modules() if isinstance(module, FastLayer)]
        stack = getattr(model, "layers", None)
        if not layers or not isinstance(stack, nn.ModuleList) or list(stack) != layers:
            raise _Cannot
        if any(layer.plain_parts for layer in layers) or _rope_kinds(base.module.config) & BY_LENGTH:
            raise _Cannot
        seen = _called(base, layers, torch.arange(8))
        tables: list[Table] = []
        kinds: list[int | None] = []
        for given in seen:
            if given[1] is None:
                kinds.append(None)
                continue
            same = [at for at, table in enumerate(tables) if all(map(torch.equal, table, given[1]))]
            kinds.append(same[0] if same else len(tables))
            tables += [] if same else [given[1]]
        members = [kinds.index(kind) for kind in range(len(tables))]
        plans = tuple(self._layer(number, layer, kind) for number, (layer, kind) in enumerate(zip(layers, kinds)))
        last = self._norm(getattr(model, "norm", None), None)
        head = self._linears([own(base.head)])
        if last is None:
            raise _Cannot
        return Plan(
            self.dtype, int(seen[0][0].shape[-1]), plans, last, head, self.places, self._scale(seen[0][0]),
            Angles(lambda count: _angles(base, layers, members, count)), self.kept, _stamps(base.module),
        )  # fmt: skip

    def _scale(self, first: Tensor) -> float:
        """What stands between the embedding and the first layer."""
        config, width = self.base.module.config.get_text_config(), first.shape[-1]
        embedding = own(self.base.module.get_input_embeddings())
        embedded: Tensor = embedding(torch.arange(3, 11) % config.vocab_size)
        for scale in (1.0, math.sqrt(width), getattr(config, "embedding_multiplier", None)):
            if scale is not None and torch.equal(scaled(embedded, scale).float(), first[0].float()):
                return float(scale)
        raise _Cannot

    def _layer(self, number: int, layer: FastLayer, kind: int | None) -> LayerPlan:
        part, mlp_part, wiring = layer.attention_part, layer.mlp_part, layer.wiring
        attention, mlp = own(layer.self_attn), own(layer.mlp)
        if part is None or mlp_part is None:
            raise _Cannot
        norms = [self._norm(getattr(attention, name), norm) for name, norm in part.norms.items()] or [None, None]
        sizes = {own(getattr(attention, name)).get_parameter("weight").numel() for name in part.norms}
        named = {
            name: self._norm(getattr(layer, at), layer.norms.get(at)) if at else None
            for name, at in vars(wiring).items()
        }
        sinks = getattr(attention, part.sinks) if part.sinks else None
        return LayerPlan(
            number, attention, part.heads, part.rule,
            self._linears([own(attention.get_submodule(name)) for name in part.inputs]),
            self._linears([own(attention.get_submodule("o_proj"))]),
            self._linears([own(mlp.get_submodule(name)) for name in mlp_part.inputs]),
            self._linears([own(mlp.get_submodule("down_proj"))]),
            **named, query_norm=norms[0], key_norm=norms[1], across_heads=bool(sizes - {part.heads.size}),
            activation=c.ACTIVATIONS.index(mlp_part.activation), multiplier=layer.multiplier,
            sinks=self.kept.fp32(sinks), kind=kind if part.rotary else None,
        )  # fmt: skip

    def _linears(self, modules: Sequence[nn.Module]) -> Linears:
        weights, place = [], len(self.places)
        for module in modules:
            if type(module) is nn.Linear:
                weight = c.weight_of(module.weight, module.bias, self.dtype, self.kept)
            elif isinstance(module, QuantizedLinear):
                weight = c.weight_of(module.packed, module.bias, self.dtype, self.kept)
            else:
                weight = None
            if weight is None:
                raise _Cannot
            weights.append(weight)
            self.places[module] = len(self.places)
        return Linears(tuple(weights), place)

    def _norm(self, module: nn.Module | None, norm: Norm | None) -> PlacedNorm | None:
        """One that was recognised, or is now."""
        if module is None:
            raise _Cannot
        norm = norm or norm_of(own(module))
        if norm is None or not norm.is_still(own(module)) or getattr(own(module), "bias", None) is not None:
            raise _Cannot
        weight = self.kept.fp32(own(module).weight)  # type: ignore[arg-type]
        assert weight is not None
        self.places[own(module)] = len(self.places)
        return PlacedNorm(weight, norm.eps, norm.unit_offset, self.places[own(module)])


def scaled(embedded: Tensor, scale: float) -> Tensor:
    """Embeddings times what the family multiplies them by."""
    return embedded if scale == 1.0 else embedded * torch.tensor(scale, dtype=embedded.dtype)


def _rope_kinds(config: Any) -> set[str]:
    """All kinds of rotary embedding that a config names, however deep."""
    found: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            found.update(str(value[key]) for key in ("rope_type", "type") if isinstance(value.get(key), str))
            for inner in value.values():
                visit(inner)

    visit(config.get_text_config().to_dict())
    return found


def _called(
    base: Base, layers: Sequence[FastLayer], positions: Tensor
) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
    """What each layer is given, hidden states and angles [T, R], in a pass in which layers do nothing."""
    seen: list[tuple[Tensor, tuple[Tensor, Tensor] | None]] = []

    def note(hidden_states: Tensor, position_embeddings: Any = None, **_: Any) -> Tensor:
        turns = None if position_embeddings is None else (position_embeddings[0][0], position_embeddings[1][0])
        seen.append((hidden_states, turns))
        return hidden_states

    vocabulary = base.module.config.get_text_config().vocab_size
    batch = batch_of([torch.arange(3, 3 + len(positions)) % vocabulary])
    with torch.no_grad(), _in_place_of(layers, note), running(batch):
        base.module.base_model(input_ids=batch.tokens[None], position_ids=positions[None], use_cache=False)
    if len(seen) != len(layers):
        raise _Cannot
    return seen


def _angles(base: Base, layers: Sequence[FastLayer], members: Sequence[int], count: int) -> list[Table]:
    seen = _called(base, layers, torch.arange(count))
    turns = [seen[member][1] for member in members]
    return [(cos.float().contiguous(), sin.float().contiguous()) for cos, sin in filter(None, turns)]


@contextmanager
def _in_place_of(layers: Sequence[FastLayer], forward: Callable[..., Tensor]) -> Iterator[None]:
    for layer in layers:
        layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
