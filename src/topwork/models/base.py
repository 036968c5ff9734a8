"""The frozen base: one loaded model, run over flat batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topwork.common.errors import ModelError
from topwork.models.source import Source
from topwork.models.virtual import virtual_tokens, with_virtual_tokens
from topwork.ops.batch import Batch, Segment
from topwork.ops.context import PassContext, running
from topwork.ops.host import sent
from topwork.ops.logprobs import Head, LogitRule, dense_head, log_probabilities
from topwork.ops.workspace import Workspace
from topwork.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class Base:
    """A model whose own weights never change, with its tokenizer.

    `name` is what people call it and what adapters record; `fingerprint` tells its weights from another's.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    context_length: int
    logit_rule: LogitRule
    source: Source | None = field(default=None, kw_only=True, repr=False, compare=False)
    """Where it was read from; None for one that was made in memory."""
    workspace: Workspace | None = field(default_factory=Workspace, kw_only=True, repr=False, compare=False)
    """What training passes share, one after the other."""
    new_tokens: tuple[str, ...] = field(default=(), kw_only=True)
    """What the tokenizer got beside its own."""
    vocabulary_size: int | None = field(default=None, kw_only=True)
    """The rows of embedding and head where they grew; None where they are as the weights have them."""

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.module.device

    @property
    def head(self) -> nn.Module:
        """The output head, adapted or not."""
        return self.module.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        """For how many tokens there are rows."""
        return int(self.module.config.get_text_config().vocab_size)

    def virtual_tokens(self, adapter: str | None) -> int:
        """How many of the context's positions an adapter takes for itself in every sequence."""
        found = virtual_tokens(self.module.get_input_embeddings(), adapter)
        return found.count if found is not None else 0

    def pass_over(self, batch: Batch) -> PassContext:
        """A pass over a batch as it runs, with its adapters' virtual tokens in it; whoever keeps keys and values
        between passes (`generation/engine.py`) needs to know it.

        Raises ModelError where a sequence and its virtual tokens are longer than the context.
        """
        context = with_virtual_tokens(self.module.get_input_embeddings(), batch)
        assert context.batch is not None
        if context.given_rows is not None and context.batch.longest > self.context_length:
            raise ModelError(
                f"a sequence with its virtual tokens has {context.batch.longest} tokens, and the context of "
                f"{self.name} is {self.context_length}; lower data.max_length or adapter.num_virtual_tokens"
            )
        return context

    def text(self, tokens: list[int]) -> str:
        """What token ids say, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states [T, d] after the last norm."""
        context = self.pass_over(batch)
        if context.given_rows is not None and context.batch is not None and context.batch.output_positions is None:
            given = [slice(segment.start, segment.stop) for segment in batch.segments]
            context = replace(context, batch=context.batch.looked_at(context.given_rows, given))
        return self.run(context)

    def run(self, context: PassContext) -> Tensor:
        """The hidden states [T, d] of a pass after the last norm."""
        assert context.batch is not None
        with context.active():
            positions = context.batch.positions[None]
            out = self.module.base_model(**self._given(context), position_ids=positions, use_cache=False)
        return context.back(out.last_hidden_state[0].to(self.module.dtype))

    def hidden_rows(self, batch: Batch, rows: Tensor, by_segment: Sequence[slice] | None = None) -> Tensor:
        """Hidden states [n, d] of some rows [n] of the batch, which rise; the last layer computes only these where it
        can (what is before its attention, for all). `by_segment`: which of them are each segment's, if it is known."""
        found = self.hidden(batch.looked_at(rows, by_segment))
        return found if len(found) == len(rows) else found.index_select(0, rows)

    def log_probabilities(self, batch: Batch, gradient: Tensor | None = None) -> Tensor:
        """fp32 log-probabilities [N] of the batch's targets, with `gradient` as in `ops.logprobs`."""
        by_segment = batch.by_label()
        rows = self.hidden_rows(batch, batch.labels.positions, by_segment)
        if (head := _head_alone(self.head)) is not None:
            return log_probabilities(rows, head, batch.labels.targets, self.logit_rule, gradient)
        parts = [
            log_probabilities(
                rows[at],
                Head(self.vocabulary, self._head_of(batch, adapter, batch.labels.positions[at])),
                batch.labels.targets[at],
                self.logit_rule,
            )
            for adapter, at in _by_adapter(batch, by_segment)
        ]
        return torch.cat(parts) if parts else rows.float().sum(-1)

    def logits(self, batch: Batch, rows: Tensor) -> Tensor:
        """fp32 logits [n, V] of some rows [n] of the batch, which rise; told on the host they cost no wait."""
        return self.logits_of(batch, self.hidden(batch), rows)

    def logits_of(self, batch: Batch, hidden: Tensor, rows: Tensor) -> Tensor:
        """The same from hidden states [T, d] that are already at hand."""
        there = sent(rows, hidden.device)
        parts = [
            self.logit_rule(self._head_of(batch, adapter, there[at])(hidden[there[at]], 0))
            for adapter, at in _by_adapter(batch, batch.by_segment(rows))
        ]
        return torch.cat(parts)

    def _given(self, context: PassContext) -> dict[str, Tensor]:
        """What the model reads: tokens, or their embeddings where some of these are learned."""
        assert context.batch is not None
        learned = [(virtual, e) for virtual in context.virtual if (e := virtual.embeddings) is not None]
        if not learned:
            return {"input_ids": context.batch.tokens[None]}
        x = self.module.get_input_embeddings()(context.batch.tokens[None])[0]
        for virtual, embeddings in learned:
            x = virtual.over(x, embeddings)
        return {"inputs_embeds": x[None]}

    def _head_of(self, batch: Batch, adapter: str | None, rows: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The head for some rows [n] of one adapter, in chunks of any size; a backward pass may call it again later."""
        seeds = None if batch.dropout_seeds is None else batch.dropout_seeds[rows]

        def head(hidden: Tensor, first: int) -> Tensor:
            own = None if seeds is None else seeds[first : first + len(hidden)]
            chunk = replace(batch, segments=(Segment(0, len(hidden), adapter),), dropout_seeds=own)
            with running(chunk):
                return self.head(hidden)

        return head


def _head_alone(head: nn.Module) -> Head | None:
    """The head where no adapter is on it, dense or packed."""
    if type(head) is nn.Linear:
        return dense_head(head.weight, head.bias)
    if type(head) is QuantizedLinear and (head.bias is None or not head.bias.requires_grad):
        return Head(head.out_features, lambda rows, _: head(rows), head.input_gradient, head.products_into)
    return None


def _by_adapter(batch: Batch, by_segment: Sequence[slice]) -> list[tuple[str | None, slice]]:
    """For each segment that has some rows its adapter and these."""
    return [(segment.adapter, part) for segment, part in zip(batch.segments, by_segment) if part.stop > part.start]
