"""Rows through the model's own modules, in plain torch: the truth beside `generation/native_runner.py`, and what runs
where that cannot.

**A row's logits depend on its own sequence alone, to the bit.** torch's products do depend on how many rows there are,
but not on a row's place among them or on the others (tests/generation/test_module_runner.py asks the machine at hand).
So every pass has exactly `pass_rows` rows: those behind the last are filled up with rows that write nowhere and nobody
reads. Attention goes row by row (`ops/paged_attention.py`). The head has its own number of rows.

What an adapter adds is computed for its own rows, and these must not depend on their number either. `ops/grouped.py`
promises that of its kernels; so adapters that consist of fused terms in fast layers stand in one pass, side by side and
with the bare base. Every other adapter (a saved module, a LoRA in a plain layer, all of them without a kernel) has its
passes for itself, and all their rows are its own.

Not so where tokens are routed to experts: an expert's product has as many rows as come to it, and these are other
sequences' too. Answers of such families are the same within rounding, not to the bit. On a GPU nothing of this was
measured.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from topwork.adapters.graft import adapted_layers
from topwork.adapters.methods.lora.embedding import TrainedTokens
from topwork.adapters.methods.virtual import VirtualTokens
from topwork.adapters.module import AdaptedLayer
from topwork.generation.passes import VIRTUAL, Rows
from topwork.generation.pool import KeyValuePool, layer_key
from topwork.models.base import Base
from topwork.models.fast import FastLayer
from topwork.models.held import held_for_inference
from topwork.models.virtual import virtual_tokens
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.batch import Batch, Segment
from topwork.ops.context import PassContext, Virtual
from topwork.ops.grouped import rows_stand_alone
from topwork.ops.host import sent
from topwork.ops.paged_attention import PagedRows, Span, attend_paged
from topwork.ops.projection import projection_of

PASS_ROWS = {"cpu": 32, "cuda": 256}
"""Rows of a pass, by device type: on a CPU so many take little longer than reading the weights; on a GPU a guess."""
HEAD_ROWS = {"cpu": 8, "cuda": 256}
"""Rows of one product with the head."""


@dataclass(frozen=True)
class Piece:
    """Rows of a sequence that go into one pass, and which of the wanted logits come after the last, if any."""

    rows: Rows
    wanted: int | None


class ModuleRunner:
    """Runs rows through `base.run`, over keys and values in the pool's blocks. `run` takes any number of rows, in as
    many passes as they need; `most_rows` fill one."""

    def __init__(self, base: Base, pool: KeyValuePool, pass_rows: int | None = None) -> None:
        self.base, self.pool = base, pool
        kind = base.device.type
        self.most_rows = pass_rows or PASS_ROWS.get(kind, PASS_ROWS["cuda"])
        self.head_rows = HEAD_ROWS.get(kind, HEAD_ROWS["cuda"])
        self._held = ExitStack()
        self._shares: dict[str | None, bool] = {}

    def begin(self) -> None:
        """Weights do not change from here to `end`: what depends on these alone is computed once."""
        self.end()
        self._held.enter_context(held_for_inference(self.base.module))

    def end(self) -> None:
        """Nothing runs: weights may change."""
        self._held.close()
        self._shares.clear()

    def forget(self, adapter: str) -> None:
        """It will not come again."""
        self._shares.pop(adapter, None)

    @torch.no_grad()
    def run(self, rows: Sequence[Rows]) -> Tensor:
        """Writes their keys and values to the pool; fp32 logits [n, V] of those that are wanted, in order. All rows of
        one adapter stand together. Raises RuntimeError where an adapter's dropout is on."""
        found: dict[int, Tensor] = {}
        for pieces in passes(rows, self.most_rows, self._may_share):
            wanted = [piece for piece in pieces if piece.wanted is not None]
            for piece, logits in zip(wanted, self._run(pieces)):
                assert piece.wanted is not None
                found[piece.wanted] = logits
        return torch.stack([found[number] for number in range(len(found))]) if found else torch.empty(0)

    def _may_share(self, adapter: str | None) -> bool:
        if adapter not in self._shares:
            self._shares[adapter] = shares_passes(self.base, adapter)
        return self._shares[adapter]

    def _run(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """One pass; the logits [V] that are wanted of it, in order."""
        batch, spans = filled_up(pieces, self.most_rows)
        paged = PagedRows(spans, self.base.device)
        context = PassContext(
            batch.to(self.base.device), virtual=self._virtual(pieces, spans), cache=_PoolCache(self.pool, paged)
        )
        hidden = self.base.run(context)
        wanted = [
            (self._head_adapter(piece.rows.adapter), span.start + span.count - 1)
            for piece, span in zip(pieces, spans)
            if piece.wanted is not None
        ]
        logits: dict[int, Tensor] = {}
        for adapter in dict.fromkeys(own for own, _ in wanted):
            numbers = [number for number, (own, _) in enumerate(wanted) if own == adapter]
            for first in range(0, len(numbers), self.head_rows):
                some = numbers[first : first + self.head_rows]
                logits.update(zip(some, self._logits(hidden, batch, adapter, [wanted[number][1] for number in some])))
        return [logits[number] for number in range(len(wanted))]

    def _logits(self, hidden: Tensor, batch: Batch, adapter: str | None, rows: list[int]) -> Tensor:
        """Of some rows, as many as the head takes at once or fewer; the last is repeated where there are fewer."""
        at = torch.tensor(rows + [rows[-1]] * (self.head_rows - len(rows)))
        one = replace(batch, segments=(Segment(0, self.head_rows, adapter),))
        given = hidden[sent(at, hidden.device)]
        return self.base.logits_of(one, given, torch.arange(self.head_rows))[: len(rows)]

    def _head_adapter(self, adapter: str | None) -> str | None:
        """The adapter, where it has a part of its own at the head."""
        head = self.base.head
        return adapter if isinstance(head, AdaptedLayer) and head.part(adapter) is not None else None

    def _virtual(self, pieces: Sequence[Piece], spans: Sequence[Span]) -> tuple[Virtual, ...]:
        """The learned tokens among the rows: of each piece those positions that it has."""
        found = []
        for piece, span in zip(pieces, spans):
            count = sum(token == VIRTUAL for token in piece.rows.tokens)
            if not count:
                continue
            whole = virtual_tokens(self.base.module.get_input_embeddings(), piece.rows.adapter)
            assert whole is not None
            own = slice(span.first, span.first + count)
            found.append(Virtual(
                count,
                None if whole.embeddings is None else whole.embeddings[own],
                tuple(table[:, own] for table in whole.keys_values),
                sent(torch.arange(span.start, span.start + count), self.base.device),
            ))  # fmt: skip
        return tuple(found)


@dataclass(frozen=True)
class _PoolCache:
    """Keys and values of earlier passes, as the model's attention asks for them."""

    pool: KeyValuePool
    rows: PagedRows

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks: Tensor | None
    ) -> Tensor:
        layer = self.pool.of(layer_key(module), k.shape[1], k.shape[2], k.dtype, k.device)
        return attend_paged(layer, q, k, v, self.rows, rule, sinks)


def passes(rows: Sequence[Rows], most: int, may_share: Callable[[str | None], bool]) -> Iterator[list[Piece]]:
    """Rows cut into passes of at most `most` rows, in which either all adapters may share or there is one."""
    pieces: list[Piece] = []
    room, wanted = most, 0
    for each in rows:
        first = 0
        while first < len(each.tokens):
            alone = (
                bool(pieces)
                and pieces[0].rows.adapter != each.adapter
                and not (may_share(pieces[0].rows.adapter) and may_share(each.adapter))
            )
            if not room or alone:
                yield pieces
                pieces, room = [], most
            stop = min(first + room, len(each.tokens))
            last = each.wanted and stop == len(each.tokens)
            own = replace(each, tokens=each.tokens[first:stop], first=each.first + first, wanted=last)
            pieces.append(Piece(own, wanted if last else None))
            room, wanted, first = room - (stop - first), wanted + last, stop
    if pieces:
        yield pieces


def filled_up(pieces: Sequence[Piece], count: int) -> tuple[Batch, tuple[Span, ...]]:
    """A batch of `count` rows, which the pieces' come first in, and where each piece is; the others belong to the last
    adapter."""
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    segments: list[Segment] = []
    for piece in pieces:
        rows, start = piece.rows, len(tokens)
        tokens += [0 if token == VIRTUAL else token for token in rows.tokens]
        positions += range(rows.first, rows.first + len(rows.tokens))
        spans.append(Span(start, len(rows.tokens), rows.first, rows.blocks))
        if segments and segments[-1].adapter == rows.adapter:
            start = segments.pop().start
        segments.append(Segment(start, len(tokens), rows.adapter))
    bounds = [0, *(span.start + span.count for span in spans)]
    if rest := count - len(tokens):
        tokens += [0] * rest
        positions += [0] * rest
        bounds.append(count)
        segments[-1] = replace(segments[-1], stop=count)
    return Batch(torch.tensor(tokens), torch.tensor(positions), tuple(bounds), tuple(segments)), tuple(spans)


def shares_passes(base: Base, adapter: str | None) -> bool:
    """Whether what an adapter adds to its rows depends neither on how many they are nor on the adapters beside them,
    nor changes what these get: it is fused terms in fast layers, multiplied by a kernel that promises as much, learned
    tokens, or a part at the head, which has products of its own."""
    if adapter is None:
        return True
    if not rows_stand_alone(torch.empty(0, dtype=base.module.dtype, device=base.device)):
        return False
    fast = [layer for layer in base.module.modules() if isinstance(layer, FastLayer)]
    widths = {id(module): len(group) for layer in fast for group in layer.linear_groups() for module in group}
    layers = [layer for layer in adapted_layers(base.module).values() if layer is not base.head]
    return all(_is_fused(layer, adapter, widths.get(id(layer))) for layer in layers)


def _is_fused(layer: AdaptedLayer, adapter: str, width: int | None) -> bool:
    """`width` linear layers are multiplied side by side where this one is; None where they are plain modules."""
    part = layer.part(adapter)
    if part is None or isinstance(part, VirtualTokens | TrainedTokens):
        return True
    if width is None or projection_of(layer.base_layer) is None:
        return False
    fused = part.fused_terms(0, 1, layer.base_layer)
    return fused is not None and (width == 1 or not fused.input_gains)
