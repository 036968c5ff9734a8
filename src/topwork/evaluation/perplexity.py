"""Perplexity of plain text: exp of the mean loss over windows that know nothing of each other."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from topwork.common.errors import DataError
from topwork.common.os_errors import why
from topwork.models.base import Base
from topwork.ops.batch import Batch, Labels, batch_of

WINDOW = 256
AT_ONCE = 8
"""Windows in one pass."""


def read_windows(base: Base, path: Path, count: int) -> list[Tensor]:
    """The first `count` windows of 256 tokens (fewer for a shorter context) of a text file, or as many as it fills.

    Raises DataError for a file that cannot be read as text, and for one that does not fill a single window.
    """
    if count < 1:
        raise DataError(f"{count} windows were asked for, expected 1 or more")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({why(error)}); give a plain text file") from error
    length = min(WINDOW, base.context_length)
    tokens = torch.tensor(base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(tokens) < length:
        raise DataError(f"{path} has {len(tokens)} tokens, expected {length} or more to fill a window; give more text")
    return list(tokens[: len(tokens) // length * length].view(-1, length)[:count].to(base.device))


@torch.no_grad()
def window_losses(base: Base, windows: Sequence[Tensor]) -> list[float]:
    """Each window's mean loss in nats, over every token but its first."""
    losses: list[float] = []
    for start in range(0, len(windows), AT_ONCE):
        part = windows[start : start + AT_ONCE]
        logprobs = base.log_probabilities(_learned(part)).double()
        losses += [-float(own.mean()) for own in logprobs.split([len(window) - 1 for window in part])]
    return losses


def _learned(windows: Sequence[Tensor]) -> Batch:
    batch = batch_of(list(windows))
    rows = torch.cat([torch.arange(start, stop - 1) for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:])])
    rows = rows.to(batch.tokens.device)
    ones = torch.ones(len(rows), device=rows.device)
    return replace(batch, labels=Labels(rows, batch.tokens[rows + 1], ones))
