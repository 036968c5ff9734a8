"""A base as a list of steps that C runs in one call a pass (`ops/decode.py`): what generation does token after token.

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
from topwork.models.fast import FastLayer, Norm, own
from topwork.models.recognise import norm_of
from topwork.ops import decode as c
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.batch import batch_of
from topwork.ops.context import running
from topwork.ops.native.load import KINDS
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
        base, model = self.base, self.base.module.base_model
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


@dataclass
class Buffers:
    """What a pass of at most `rows` rows writes; `rank` is the largest of any adapter's that may run."""

    plan: Plan
    rows: int
    rank: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[int, Any] = field(default_factory=dict)
    """As C reads them, by the place of the first."""

    def of(self, name: str, width: int, dtype: torch.dtype | None = None, times: int = 1) -> Tensor:
        """[times * rows, width], made when it is first asked for."""
        if name not in self.tensors or self.tensors[name].shape != (times * self.rows, width):
            self.tensors[name] = torch.zeros(times * self.rows, width, dtype=dtype or self.plan.dtype)
        return self.tensors[name]

    def weights_of(self, linears: Linears) -> Any:
        """An array of them, made once: C is given its address, and steps are made again with every pass."""
        if linears.place not in self.weights:
            self.weights[linears.place] = c.array_of(linears.weights)
        return self.weights[linears.place]


Blocks = Callable[[LayerPlan], tuple[Tensor, Tensor]]
"""A layer's keys and values in the pool."""


def layer_steps(plan: Plan, buffers: Buffers, blocks: Blocks) -> "list[c.Step]":
    """From the stream to the hidden states after the last norm, in `hidden`."""
    steps: list[c.Step] = []
    for layer in plan.layers:
        steps += _layer_steps(plan, layer, buffers, blocks(layer), first=not steps)
    last = plan.layers[-1]
    steps.append(_branch(plan, buffers, "hidden", plan.last_norm, last.multiplier, True, unrounded=True))
    return steps


def head_steps(plan: Plan, buffers: Buffers, logits: Tensor) -> "list[c.Step]":
    """From the wanted rows' hidden states, in `asked`, to their products with the head [rows, V] in fp32."""
    return _products(plan, buffers, plan.head, buffers.of("asked", plan.width), logits, KINDS[torch.float32])


def _layer_steps(
    plan: Plan, layer: LayerPlan, buffers: Buffers, pool: tuple[Tensor, Tensor], first: bool
) -> "list[c.Step]":
    heads, width = layer.heads, plan.width
    qkv = buffers.of("qkv", heads.width)
    seen, y = buffers.of("seen", heads.queries * heads.size), buffers.of("y", width)
    both, hidden = buffers.of("gate_up", layer.gate_up.outputs), buffers.of("gated", layer.gate_up.outputs // 2)
    attend = _attend(layer, pool)
    steps = [_branch(plan, buffers, "n", layer.before_attention, layer.multiplier, not first)]
    steps += _products(plan, buffers, layer.qkv, buffers.of("n", width), qkv)
    made = c.Step(op=c.HEADS, out=qkv.data_ptr(), out_by=heads.width, attend=attend, across_heads=layer.across_heads)
    if layer.query_norm is not None and layer.key_norm is not None:
        made.query_norm, made.key_norm = layer.query_norm.weight, layer.key_norm.weight
        made.eps, made.unit_offset = layer.query_norm.eps, layer.query_norm.unit_offset
    steps.append(made)
    steps.append(
        c.Step(
            op=c.ATTEND, in_=qkv.data_ptr(), in_by=heads.width, out=seen.data_ptr(), out_by=seen.shape[1], attend=attend
        )
    )
    steps += _products(plan, buffers, layer.out, seen, y)
    steps += _norm_steps(y, layer.after_attention)
    steps.append(_branch(plan, buffers, "n", layer.before_mlp, layer.multiplier, True))
    steps += _products(plan, buffers, layer.gate_up, buffers.of("n", width), both)
    steps.append(
        c.Step(
            op=c.GATED, in_=both.data_ptr(), in_by=both.shape[1], out=hidden.data_ptr(), out_by=hidden.shape[1],
            width=hidden.shape[1], activation=layer.activation,
        )
    )  # fmt: skip
    steps += _products(plan, buffers, layer.down, hidden, y)
    return steps + _norm_steps(y, layer.after_mlp)


def _attend(layer: LayerPlan, pool: tuple[Tensor, Tensor]) -> c.Attend:
    rule, heads = layer.rule, layer.heads
    return c.Attend(
        keys=pool[0].data_ptr(), values=pool[1].data_ptr(), heads=heads.keys, size=heads.size,
        group=heads.queries // heads.keys, scale=rule.scale, softcap=rule.softcap or 0.0, window=rule.window or 0,
        sinks=layer.sinks,
    )  # fmt: skip


def _branch(
    plan: Plan, buffers: Buffers, out: str, norm: PlacedNorm | None, multiplier: float, adds: bool,
    unrounded: bool = False,
) -> c.Step:  # fmt: skip
    stream, y = buffers.of("stream", plan.width, torch.float32), buffers.of("y", plan.width)
    step = c.Step(
        op=c.BRANCH, out=buffers.of(out, plan.width).data_ptr(), out_by=plan.width, width=plan.width,
        stream=stream.data_ptr(), multiplier=multiplier, unrounded=unrounded,
    )  # fmt: skip
    if adds:
        step.in_, step.in_by = y.data_ptr(), plan.width
    return _with_norm(step, norm)


def _with_norm(step: c.Step, norm: PlacedNorm | None) -> c.Step:
    if norm is not None:
        step.norm, step.eps, step.unit_offset, step.place = norm.weight, norm.eps, norm.unit_offset, norm.place
    return step


def _norm_steps(y: Tensor, norm: PlacedNorm | None) -> "list[c.Step]":
    if norm is None:
        return []
    return [_with_norm(c.Step(op=c.NORM, out=y.data_ptr(), out_by=y.shape[1], width=y.shape[1]), norm)]


def _products(
    plan: Plan, buffers: Buffers, linears: Linears, given: Tensor, out: Tensor, out_kind: int | None = None
) -> "list[c.Step]":
    """What adapters multiply their inputs by, where a layer stands alone; their inner products; the outputs."""
    inner = buffers.of("inner", buffers.rank, times=3)
    common: dict[str, Any] = {
        "in_": given.data_ptr(), "in_by": given.shape[1], "place": linears.place, "count": len(linears.weights),
        "weights": c.address_of(buffers.weights_of(linears)), "inner": inner.data_ptr(), "inner_by": inner.shape[1],
        "inner_apart": buffers.rows * inner.shape[1],
    }  # fmt: skip
    steps = []
    if len(linears.weights) == 1:
        scale = c.Step(op=c.SCALE, out=given.data_ptr(), out_by=given.shape[1], width=given.shape[1])
        scale.place = linears.place
        steps.append(scale)
    kind = KINDS[plan.dtype] if out_kind is None else out_kind
    made = c.Step(op=c.PRODUCTS, out=out.data_ptr(), out_by=out.shape[1], out_kind=kind, **common)
    return [*steps, c.Step(op=c.INNER, **common), made]
