"""Is the merged model still the one that was trained? The same real inputs through both, logits against logits."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from topwork.common.errors import DataError
from topwork.models.base import Base
from topwork.ops.batch import Batch, batch_of

TOKENS_PER_PASS = 2048
MOST_LOSS = 700.0
"""Above which its exponential is no float."""
KEPT_ROWS = 64
KEPT_BYTES = 256 << 20
"""fp32 logits held per model; where vocabulary and sequences are many, fewer than KEPT_ROWS of each are kept."""


@dataclass(frozen=True)
class Measurement:
    """fp32 logits [≤ KEPT_ROWS, V] of the last rows of each sequence, on the CPU; the perplexity of the tokens that
    these rows predict (None where they predict none); and the median pass's speed."""

    logits: list[Tensor]
    perplexity: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class Comparison:
    """How far two models' logits lie apart. Relative is to the largest logit; KL is of the first from the second, in
    nats per row; top-1 agreement is the share of rows whose likeliest token is the same."""

    largest_logit_difference: float
    largest_relative_difference: float
    largest_logprob_difference: float
    top1_agreement: float
    mean_kl: float


@dataclass(frozen=True)
class Verification(Comparison):
    """A merged model against what was trained, over `sequences` inputs. `adapter_kl` is of the bare base from base with
    adapter: how far the adapter takes it. `fold`, where the model was merged onto other weights than the adapter was
    trained on, is against those weights with the adapter beside them: how exact the merge itself is."""

    adapter_kl: float
    unmerged_perplexity: float | None
    merged_perplexity: float | None
    unmerged_tokens_per_second: float
    merged_tokens_per_second: float
    sequences: int
    fold: Comparison | None = None


def verify(
    before: Measurement, after: Measurement, adapter_kl: float, beside: Measurement | None = None
) -> Verification:
    """What measurements of the same inputs say, of base with adapter as it was trained and of the merged model;
    `beside` of the adapter on the weights that it was merged onto, where these are others."""
    return Verification(
        **vars(compare(before.logits, after.logits)),
        adapter_kl=adapter_kl,
        unmerged_perplexity=before.perplexity,
        merged_perplexity=after.perplexity,
        unmerged_tokens_per_second=before.tokens_per_second,
        merged_tokens_per_second=after.tokens_per_second,
        sequences=len(before.logits),
        fold=compare(beside.logits, after.logits) if beside is not None else None,
    )


@torch.no_grad()
def measure(base: Base, sequences: list[list[int]], adapter: str | None) -> Measurement:
    """Run sequences of token ids through `adapter` (None: the base as it is); the first pass runs once more before, to
    warm up. What is longer than the model's context is cut. Raises DataError where there is no sequence."""
    rows = _kept_rows(base, len(sequences))
    passes = list(_passes(base, sequences, adapter))
    _run(base, passes[0], rows)
    logits: list[Tensor] = []
    speeds = []
    for batch in passes:
        start = time.perf_counter()
        logits += _run(base, batch, rows)
        speeds.append(batch.cu_seqlens[-1] / (time.perf_counter() - start))
    cut = [sequence[: base.context_length] for sequence in sequences]
    return Measurement(logits, _perplexity(logits, cut), median(speeds))


def compare(before: list[Tensor], after: list[Tensor]) -> Comparison:
    """Compare logits [n, V], sequence by sequence. NaN anywhere makes the differences NaN."""
    sizes, logits, logprobs, agreed, kls = [], [], [], [], []
    for ours, theirs in zip(before, after, strict=True):
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        sizes.append(ours.abs().max())
        logits.append((ours - theirs).abs().max())
        logprobs.append((log_p - log_q).abs().max())
        agreed.append(ours.argmax(-1) == theirs.argmax(-1))
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64))
    size, logit, logprob = (float(torch.stack(values).max()) for values in (sizes, logits, logprobs))
    top1 = float(torch.cat(agreed).double().mean())
    return Comparison(logit, logit / size if size else 0.0, logprob, top1, float(torch.cat(kls).mean()))


def _perplexity(logits: list[Tensor], sequences: list[list[int]]) -> float | None:
    """exp of the mean loss of the tokens that the kept rows predict; a sequence's last row predicts none."""
    pairs = [(rows[:-1], torch.tensor(tokens[1 - len(rows) :])) for rows, tokens in zip(logits, sequences, strict=True)]
    losses = [nn.functional.cross_entropy(rows, tokens, reduction="none") for rows, tokens in pairs if len(rows)]
    return math.exp(min(float(torch.cat(losses).double().mean()), MOST_LOSS)) if losses else None


def _run(base: Base, batch: Batch, kept: int) -> list[Tensor]:
    """Each sequence's last logits; on the CPU, so that the work is done when this returns."""
    bounds = list(zip(batch.cu_seqlens, batch.cu_seqlens[1:]))
    chosen = [torch.arange(max(start, stop - kept), stop) for start, stop in bounds]
    logits = base.logits(batch, torch.cat(chosen).to(base.device)).cpu()
    return list(logits.split([len(rows) for rows in chosen]))


def _kept_rows(base: Base, sequences: int) -> int:
    if not sequences:
        raise DataError("there is no input to compare the merged model on; give at least one sequence of token ids")
    vocabulary = base.module.config.get_text_config().vocab_size
    return min(KEPT_ROWS, max(1, KEPT_BYTES // (4 * vocabulary * sequences)))


def _passes(base: Base, sequences: list[list[int]], adapter: str | None) -> Iterator[Batch]:
    """Sequences in their order, as many to a pass as fit TOKENS_PER_PASS (at least one)."""
    waiting: list[Tensor] = []
    for sequence in sequences:
        if not sequence:
            raise DataError("an input to compare the merged model on has no tokens; leave it out")
        tokens = torch.tensor(sequence[: base.context_length], dtype=torch.int64)
        if waiting and sum(map(len, waiting)) + len(tokens) > TOKENS_PER_PASS:
            yield batch_of(waiting, adapter).to(base.device)
            waiting = []
        waiting.append(tokens)
    if waiting:
        yield batch_of(waiting, adapter).to(base.device)
