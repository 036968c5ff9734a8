"""A model's parameters by the names that its files have for them: as transformers renames them while reading."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from topwork.common.errors import ModelError


class NotStoredError(ModelError):
    """A weight has no tensor of its own in a model's files: reading computes it out of others."""


@dataclass(frozen=True)
class StoredNames:
    """Where a model's parameters stand in its files.

    keys  a parameter's name in the model -> its key in the files, of those that are stored as they are
    made  names of the parameters that reading computes out of the files' tensors: experts joined, weights split
    """

    keys: dict[str, str]
    made: frozenset[str]

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
    for key in keys:
        name, targets = rename(key)
        if targets:
            made |= targets
        elif name in rename.own:
            found[name] = key
    return StoredNames(found, frozenset(made))


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
        converter = next(entry for entry in self.converters if pattern in entry.source_patterns)
        first = converter.target_patterns[0]
        return name, {name.replace(first, target) for target in converter.target_patterns}
