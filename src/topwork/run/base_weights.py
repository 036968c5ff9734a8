"""A base's parameters by name, for what reads few of them: nothing is opened before the first is asked for."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from topwork.common.errors import AdapterError, ModelError
from topwork.merging.stream import Stored
from topwork.models.lazy import open_lazily
from topwork.models.load import load_base
from topwork.models.source import find_source
from topwork.quantization.linear import PackedModule
from topwork.run.given import Given


def base_weights(given: Given, skeleton: PreTrainedModel, log: Callable[[str], None]) -> Callable[[str], Tensor]:
    """(`model.norm.weight`) -> its values in fp32: those that the adapter was trained on, so a QLoRA run's are what its
    packed weights stand for. `skeleton` is the base's.

    What it gives raises AdapterError where the base is not to be found.
    """

    @cache
    def opened() -> Callable[[str], Tensor]:
        try:
            return _held(given, log) if given.quantization.active else _stored(given, skeleton, log)
        except ModelError as error:
            raise AdapterError(
                f"{given.place} is more than products of factors (DoRA, IA3, whole modules or tokens' rows), and what "
                f"it changes needs its base's weights: {error}. Name a base that is here with --model"
            ) from error

    return lambda name: opened()(name)


def _stored(given: Given, skeleton: PreTrainedModel, log: Callable[[str], None]) -> Callable[[str], Tensor]:
    stored = Stored(open_lazily(find_source(given.model, log)), skeleton)
    return lambda name: stored.lazy(name).fetch().float()


def _held(given: Given, log: Callable[[str], None]) -> Callable[[str], Tensor]:
    """Packed as training packed it, which takes the whole base."""
    base = load_base(given.model, log, given.quantization)

    def read(name: str) -> Tensor:
        path, _, key = name.rpartition(".")
        module = base.module.get_submodule(path)
        if isinstance(module, PackedModule):
            module = module.dense(torch.float32)
        return module.get_parameter(key).detach().float()

    return read
