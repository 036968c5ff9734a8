"""A model's parameters by the names that its files have for them: as transformers renames them while reading."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from topwork.common.errors import ModelError


class NotStoredError(ModelError):
    """A weight has no tensor of its own in a model's files: reading computes it out of others."""


class Piece(NamedTuple):
    """A tensor of the files that stands in a larger one: as its matrix number `expert`, among the `parts` that lie
    under one another in each as number `part`."""

    key: str
    expert: int
    part: int
    parts: int


@dataclass(frozen=True)
class StoredNames:
    """Where a model's parameters stand in its files.

    keys    a parameter's name in the model -> its key in the files, of those that are stored as they are
    made    names of the parameters that reading computes out of the files' tensors: experts joined, weights split
    pieces  of those, what is made by putting pieces side by side, as experts are
    """

    keys: dict[str, str]
    made: frozenset[str]
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)

    def key(self, name: str, model: str) -> str:
        """A parameter's key. Raises NotStoredError, which calls the model by name."""
        if name in self.keys:
            return self.keys[name]
        why = ", which reading computes out of others" if name in self.made else "; is the download finished?"
        raise NotStoredError(f"{model} holds no tensor for {name}{why}")


def stored_names(skeleton: PreTrainedModel, keys: Iterable[str]) -> StoredNames:
    """Which of the files' `keys` are which of the model's parameters and buffers. Files of a bare model, whose names
    lack the prefix, and of older namings are understood as transformers understands them."""
    rename = _Renaming(skeleton)
    found: dict[str, str] = {}
    made: set[str] = set()
    pieces: dict[str, list[Piece]] = {}
    for key in keys:
        name, targets = rename(key)
        if targets:
            made |= targets
            piece = rename.piece(key)
            if piece is not None:
                pieces.setdefault(name, []).append(piece)
        elif name in rename.own:
            found[name] = key
    return StoredNames(found, frozenset(made), {name: tuple(sorted(own)) for name, own in pieces.items()})


def key_for(skeleton: PreTrainedModel, name: str, keys: Iterable[str]) -> str:
    """The key under which a parameter that the files lack is to be stored beside these, so that it is found again."""
    rename = _Renaming(skeleton)
    beginnings = ["", *dict.fromkeys(f"{key.partition('.')[0]}." for key in keys)]
    candidates = [beginning + name for beginning in beginnings]
    return next((key for key in candidates if rename(key) == (name, set())), name)


def parameter_types(skeleton: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The types of a model's floating-point tensors when it is read in `dtype`, which its skeleton was made in: some
    families keep a few in fp32."""
    plan = skeleton._get_dtype_plan(dtype)
    types = {}
    for name, tensor in skeleton.state_dict().items():
        if tensor.is_floating_point():
            kept = next((kind for part, kind in plan.items() if re.search(part.replace("*", ".*"), name)), None)
            types[name] = kept or tensor.dtype
    return types


class _Renaming:
    """transformers' own, for one model."""

    def __init__(self, skeleton: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(skeleton)
        self.prefix = skeleton.base_model_prefix
        self.own: dict[str, Tensor] = skeleton.state_dict()
        self.renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]

    def __call__(self, key: str) -> tuple[str, set[str]]:
        """The name, or the names of all that is made of it."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.own)
        if name not in self.own and key in self.own:  # transformers: it should not have been renamed
            name, pattern = rename_source_key(key, [], [], self.prefix, self.own)
        if pattern is None:
            return name, set()
        converter = self._converter(pattern)
        first = converter.target_patterns[0]
        return name, {name.replace(first, target) for target in converter.target_patterns}

    def piece(self, key: str) -> Piece | None:
        """Where a key's tensor stands in what is made of it; None where that is not put together of whole pieces: each
        expert's in its place, and gate above up (transformers: MergeModulelist of dim 0, Concatenate of dim 1)."""
        _, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.own)
        if pattern is None:
            return None
        converter = self._converter(pattern)
        merge, *rest = converter.operations
        stacks = type(merge) is MergeModulelist and merge.dim == 0
        joins = all(type(one) is Concatenate and one.dim == 1 for one in rest) and len(rest) <= 1
        number = re.search(r"\.experts\.(\d+)\.", key)
        if not stacks or not joins or number is None or len(converter.target_patterns) != 1:
            return None
        parts = len(converter.source_patterns)
        if parts > 1 and not rest:
            return None
        return Piece(key, int(number[1]), converter.source_patterns.index(pattern), parts)

    def _converter(self, pattern: str) -> WeightConverter:
        return next(entry for entry in self.converters if pattern in entry.source_patterns)
