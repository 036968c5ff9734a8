"""A whole model that is not in memory: its tensors are fetched one at a time, when they are asked for.

Merging and exporting work on this, so that they need the memory of one tensor, whatever the model's size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topwork.models.source import Source


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's shape and type, and how to get it: `fetch` gives memory of the caller's own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class LazyModel:
    """A model as its files have it.

    name         what people call it
    fingerprint  of the base's weights before anything was merged, where it is known
    config       config.json's values
    tensors      by the names that a Hugging Face checkpoint has, in the files' order; dense ones
    generation   generation_config.json's values, or none
    folder       where the other files lie (tokenizer, code of the model's own), where there is a folder
    """

    name: str
    fingerprint: str | None
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    generation: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def open_lazily(source: Source) -> LazyModel:
    """The model of a folder or a Hub id, no weight read. A packed checkpoint's tensors come dense, in the type that
    its config names. Raises ModelError."""
    raise NotImplementedError
