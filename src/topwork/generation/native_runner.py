"""Runs passes in C: all layers in one call, a batch of any adapters (`models/program.py`, `generation/compiled.py`)."""

import ctypes
from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from topwork.adapters.graft import adapted_layers
from topwork.adapters.module import AdaptedLayer
from topwork.generation.compiled import CompiledAdapter, compiled, prefix_rows
from topwork.generation.passes import VIRTUAL, Rows
from topwork.generation.pool import KeyValuePool, layer_key
from topwork.models.base import Base
from topwork.models.program import LayerPlan, Plan, plan_of, scaled
from topwork.models.steps import Buffers, head_steps, layer_steps
from topwork.models.virtual import virtual_tokens
from topwork.ops import decode as c
from topwork.ops.batch import Batch, Segment, batch_of
from topwork.ops.context import running
from topwork.ops.paged import write_blocks

MOST_ROWS = 512
"""Of a pass: enough that products are bound by arithmetic, few enough that what a layer makes stays in the cache."""


def native_runner(base: Base, pool: KeyValuePool, frozen: Container[str] = ()) -> "NativeRunner | None":
    """A runner for this base; None where it has no plan. `frozen`: adapters whose weights never change."""
    plan = plan_of(base)
    if plan is None or not _is_right(base, plan):
        return None
    return NativeRunner(base, plan, pool, frozen)


TRIED = 8
"""Tokens of the pass that a plan is tried with."""
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""How far its logits may be from the model's own, relative to these: rounding makes 1e-6 and mostly 0.02 of it, but up
to 0.15 in modules that have a few large hidden values to round."""


@torch.no_grad()
def _is_right(base: Base, plan: Plan) -> bool:
    """Whether a short pass by the plan gives what the model gives; found out once."""
    if plan.tried is None:
        text = [977 * number % plan.head.outputs for number in range(1, 1 + TRIED)]
        found = NativeRunner(base, plan, KeyValuePool(1), rows=TRIED).run([Rows(text, 0, [0], None, True)])
        expected = base.logits(batch_of([torch.tensor(text)]), torch.tensor([TRIED - 1]))
        plan.tried = bool((found - expected).norm() <= CLOSE[plan.dtype] * expected.norm())
    return plan.tried


@dataclass(frozen=True)
class _Laid:
    """Rows as they lie in a pass: which of them is the first, and where the sequence's tokens begin in it."""

    rows: Rows
    start: int
    tokens: Sequence[int]
    first: int

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


class NativeRunner:
    """A base's plan with buffers, and its adapters compiled."""

    def __init__(
        self, base: Base, plan: Plan, pool: KeyValuePool, frozen: Container[str] = (), rows: int = MOST_ROWS
    ) -> None:
        self.base, self.plan, self.frozen, self.most_rows = base, plan, frozen, rows
        self._pool = pool
        self._embedding = base.module.get_input_embeddings()
        self.compiled: dict[str, CompiledAdapter | None] = {}
        self._told = torch.empty(0, plan.head.outputs)
        self._most_threads = torch.get_num_threads()
        self._prepare(rank=16)

    def begin(self) -> None:
        """Weights do not change from here to `end`."""
        self._embedding = self.base.module.get_input_embeddings()
        if self._where != self._pool_addresses():
            self._bind()

    def end(self) -> None:
        """Forget what was compiled of weights that may change."""
        self.compiled = {name: found for name, found in self.compiled.items() if name in self.frozen}

    def forget(self, adapter: str) -> None:
        """It will not come again."""
        self.compiled.pop(adapter, None)

    def can_run(self, adapter: str | None) -> bool:
        """Whether all of its parts are such as C knows."""
        return adapter is None or self._adapter(adapter) is not None

    @torch.no_grad()
    def run(self, rows: Sequence[Rows]) -> Tensor:
        """Writes keys and values to the pool; fp32 logits [n, V] of the rows that are wanted, until it runs again."""
        laid, at = [], 0
        for name in {each.adapter for each in rows} - {None}:  # which may take other buffers
            assert name is not None
            if self._adapter(name) is None:
                raise ValueError(f"adapter {name!r} cannot be run here; ask can_run")
        for each in rows:
            skipped = self._write_prefix(each)
            laid.append(_Laid(each, at, each.tokens[skipped:], each.first + skipped))
            at = laid[-1].stop
        if at > self.most_rows:  # C would write beyond the buffers
            raise ValueError(f"a pass of {at} rows, where {self.most_rows} at most are expected")
        if at:
            self._reach(max(each.first + len(each.tokens) for each in laid))
            self._embed(laid, at)
            segments = self._segments([(each.rows.adapter, each.start, each.stop) for each in laid])
            c.run_steps(self._steps, self._pass(at, segments, laid), self.plan.dtype)
        return self._logits(laid)

    def _pass(self, rows: int, segments: "_Segments", laid: Sequence[_Laid] = ()) -> c.Pass:
        blocks = [array("i", each.rows.blocks) for each in laid]
        runs = (c.Run * max(1, len(laid)))()
        run_of = array("i")
        for number, (each, own) in enumerate(zip(laid, blocks)):
            runs[number] = c.Run(each.start, each.stop, each.first, own.buffer_info()[0])
            run_of.extend([number] * len(each.tokens))
        self._alive = (segments, blocks, runs, run_of)  # C is given their addresses
        return c.Pass(
            rows=rows, segments=len(segments.array), runs=len(laid), segment=c.address_of(segments.array),
            run=c.address_of(runs), run_of=run_of.buffer_info()[0], terms=segments.terms,
            input_gains=segments.input_gains, scratch=self._scratch.data_ptr(),
            scratch_each=self._scratch.shape[1], threads=min(self._most_threads, torch.get_num_threads()),
        )  # fmt: skip

    def _segments(self, spans: Sequence[tuple[str | None, int, int]]) -> "_Segments":
        """Neighbours of one adapter together; nothing of no rows."""
        found, terms, input_gains = [], False, False
        for name, members in groupby((span for span in spans if span[2] > span[1]), key=lambda span: span[0]):
            of_one = list(members)
            adapter = None if name is None else self._adapter(name)
            address = None if adapter is None else adapter.address
            found.append(c.Segment(of_one[0][1], of_one[-1][2], address))
            terms |= adapter is not None and adapter.rank > 0
            input_gains |= adapter is not None and adapter.input_gains
        return _Segments(c.array_of(found or [c.Segment(0, 0, None)]), terms, input_gains)

    def _embed(self, laid: Sequence[_Laid], count: int) -> None:
        """The stream begins as the tokens' embeddings, or learned ones."""
        tokens = torch.tensor([max(token, 0) for each in laid for token in each.tokens], dtype=torch.int64)
        embedding, stream = self._embedding, self._buffers.of("stream", self.plan.width, torch.float32)
        if not isinstance(embedding, AdaptedLayer):
            x = embedding(tokens)
        else:
            x = self._adapted_embeddings(embedding, laid, tokens)
        stream[:count] = scaled(x, self.plan.scale)

    def _adapted_embeddings(self, embedding: AdaptedLayer, laid: Sequence[_Laid], tokens: Tensor) -> Tensor:
        parts = []
        for each in laid:
            own, name = tokens[each.start : each.stop], each.rows.adapter
            if name is None or embedding.part(name) is None:
                parts.append(embedding.base_layer(own))
                continue
            adapter = self._adapter(name)
            pieces = own.split(1) if adapter is not None and adapter.embeds_by_row else (own,)
            for piece in pieces if len(own) else ():
                batch = Batch(piece, piece, (0, len(piece)), (Segment(0, len(piece), name),))
                with running(batch):
                    parts.append(embedding(piece))
            virtual = virtual_tokens(embedding, name)
            if virtual is not None and virtual.embeddings is not None and each.first < virtual.count and len(own):
                learned = virtual.embeddings[each.first : each.first + len(own)].to(parts[-1].dtype)
                parts[-1] = torch.cat([learned, parts[-1][len(learned) :]])
        return torch.cat(parts)

    def _write_prefix(self, rows: Rows) -> int:
        """Learned keys and values go where the tokens that they stand for would have theirs; how many of the rows are
        such tokens, which are not run."""
        if rows.adapter is None or not rows.tokens or rows.tokens[0] != VIRTUAL:
            return 0
        virtual = virtual_tokens(self._embedding, rows.adapter)
        if virtual is None or not virtual.keys_values:
            return 0
        count = prefix_rows(rows.tokens, VIRTUAL)
        at = slice(rows.first, rows.first + count)
        for layer in self.plan.layers:
            keys, values = virtual.keys_values[layer.number]
            write_blocks(self._of(layer), keys[at], values[at], rows.blocks, rows.first)
        return count

    def _logits(self, laid: Sequence[_Laid]) -> Tensor:
        wanted = [each for each in laid if each.rows.wanted]
        plan, buffers = self.plan, self._buffers
        if not wanted:
            return torch.empty(0, plan.head.outputs)
        ends = torch.tensor([each.stop - 1 for each in wanted])
        asked = buffers.of("asked", plan.width)
        asked[: len(wanted)] = buffers.of("hidden", plan.width)[ends]
        if len(self._told) < len(wanted):
            self._told = torch.empty(len(wanted), plan.head.outputs)
        logits = self._told[: len(wanted)]
        steps = c.array_of(head_steps(plan, buffers, logits))
        segments = self._segments([(each.rows.adapter, at, at + 1) for at, each in enumerate(wanted)])
        c.run_steps(steps, self._pass(len(wanted), segments), plan.dtype)
        for row, each in enumerate(wanted):
            adapter = None if each.rows.adapter is None else self._adapter(each.rows.adapter)
            if adapter is not None and adapter.after_head is not None:
                adapter.after_head(asked[row : row + 1], logits[row : row + 1])
        return self.base.logit_rule(logits)

    def _adapter(self, name: str) -> CompiledAdapter | None:
        if name not in self.compiled:
            layers = adapted_layers(self.base.module)  # some of which it may be the first to adapt
            self._embedding = self.base.module.get_input_embeddings()
            found = self.compiled[name] = compiled(self.plan, layers, name)
            if found is not None and found.rank > self._buffers.rank:
                self._prepare(found.rank)
        return self.compiled[name]

    def _prepare(self, rank: int) -> None:
        """Buffers and steps for adapters of this rank."""
        plan = self.plan
        rank = -(-rank // 16) * 16
        self._buffers = Buffers(plan, self.most_rows, rank)
        self._bind()
        size = max(layer.heads.size for layer in plan.layers)
        each = c.scratch_floats(self.most_rows, plan.inputs, rank, size)
        self._scratch = torch.zeros(self._most_threads, each)

    def _bind(self) -> None:
        """Steps for where the pool's keys and values are now."""
        self._where = self._pool_addresses()
        self._steps = c.array_of(layer_steps(self.plan, self._buffers, self._of))
        self._reached = 0

    def _pool_addresses(self) -> list[int]:
        return [tensor.data_ptr() for layer in self.plan.layers for tensor in self._of(layer)]

    def _of(self, layer: LayerPlan) -> tuple[Tensor, Tensor]:
        return self._pool.of(
            layer_key(layer.attention), layer.heads.keys, layer.heads.size, self.plan.dtype, self.base.device
        )

    def _reach(self, positions: int) -> None:
        """Tables of angles for so many positions. They are the plan's, and other runners may ask for longer ones."""
        if positions <= self._reached:
            return
        self._reached, self._tables = self.plan.angles.upto(positions)
        turning = iter([layer.kind for layer in self.plan.layers])
        for step in self._steps:
            if step.op == c.HEADS and (kind := next(turning)) is not None:
                cos, sin = self._tables[kind]
                step.cos, step.sin, step.turned = cos.data_ptr(), sin.data_ptr(), cos.shape[1]


@dataclass(frozen=True)
class _Segments:
    array: "ctypes.Array[c.Segment]"
    terms: bool
    input_gains: bool
