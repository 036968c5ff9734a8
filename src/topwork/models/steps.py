"""A plan's steps over buffers: what `models/program.py` found out about a base, as C runs it (`ops/decode.py`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from topwork.models.program import LayerPlan, Linears, PlacedNorm, Plan
from topwork.ops import decode as c
from topwork.ops.native.load import KINDS


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
