"""Training as PEFT and transformers do it: sequences padded into a batch, an attention mask, labels of -100."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PaddedBatch:
    """[S, L] each; `labels` are -100 where nothing is learned."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def padded(sequences: Sequence[Tensor], prompt_tokens: Sequence[int]) -> PaddedBatch:
    """Right-padded; the first `prompt_tokens` of each sequence are not learned."""
    shape = (len(sequences), max(map(len, sequences)))
    ids, mask, labels = (torch.full(shape, fill, dtype=torch.int64) for fill in (0, 0, -100))
    for row, (sequence, prompt) in enumerate(zip(sequences, prompt_tokens)):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        labels[row, prompt : len(sequence)] = sequence[prompt:]
    return PaddedBatch(ids, mask, labels)


def summed_loss(model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, int]:
    """(sum of the labels' negative log-likelihoods, their count)."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total, int((labels != -100).sum())


def train(model: nn.Module, steps: Sequence[PaddedBatch], rates: Sequence[float], max_grad_norm: float) -> list[float]:
    """One AdamW step per batch on whatever asks for a gradient; the losses per learned token."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    losses = []
    for batch, rate in zip(steps, rates, strict=True):
        total, count = summed_loss(model, batch)
        (total / count).backward()
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
    return losses
