"""The chances of a next token by transformers' own processors, in float64 and with full sorts."""

from collections import Counter

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from topwork.generation.sampling import Row


def chances(logits: Tensor, row: Row) -> Tensor:
    """float64 [V] of logits [V]; what may not come has 0."""
    scores, sampling = logits.double()[None], row.sampling
    said = torch.tensor([[*row.prompt, *row.answer]])
    if sampling.repetition_penalty != 1 and said.numel():
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(said, scores)
    for token, count in Counter(row.answer).items():
        scores[0, token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    for token, added in sampling.bias:
        scores[0, token] += added
    for token in range(scores.shape[1]):
        if row.allowed is not None and not (int(row.allowed[token // 32]) >> (token % 32)) & 1:
            scores[0, token] = -torch.inf
    scores[0, list(row.banned)] = -torch.inf
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(scores[0].argmax(), scores.shape[1]).double()
    for warper in (
        TemperatureLogitsWarper(float(sampling.temperature)),
        MinPLogitsWarper(sampling.min_p),
        TopKLogitsWarper(sampling.top_k or scores.shape[1]),
        TopPLogitsWarper(sampling.top_p),
    ):
        scores = warper(said, scores)
    return torch.softmax(scores[0], -1)
