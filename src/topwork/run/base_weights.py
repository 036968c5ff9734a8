"""A base's parameters by name, for what reads few of them: one tensor at a time, and nothing is opened before the first
is asked for."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from topwork.common.errors import AdapterError, ModelError
from topwork.merging.stream import Stored
from topwork.models.lazy import in_type, open_lazily
from topwork.models.lazy_packed import as_trained
from topwork.models.load import DTYPES
from topwork.models.skeleton import skeleton
from topwork.models.source import find_source
from topwork.models.tokenizer import load_config
from topwork.run.given import Given

Log = Callable[[str], None]


def base_weights(given: Given, log: Log) -> Callable[[str], Tensor]:
    """(`model.norm.weight`) -> its values in fp32: those that the adapter was trained on, so in the type of its
    training, and a QLoRA run's are what its packed weights stand for.

    What it gives raises AdapterError where the base is not to be found, or holds the parameter in another form.
    """

    @cache
    def opened() -> Stored:
        try:
            return _opened(given, log)
        except ModelError as error:
            raise AdapterError(
                f"{given.place} is more than products of factors (DoRA, IA3, whole modules or tokens' rows), and what "
                f"it changes needs its base's weights: {error}. Name a base that is here with --model"
            ) from error

    return lambda name: opened().lazy(name).fetch().float()


def _opened(given: Given, log: Log) -> Stored:
    source, remote = find_source(given.model, log), given.model.trust_remote_code
    config: Any = load_config(source, remote)
    vars(config).pop("quantization_config", None)
    kind = DTYPES[given.model.dtype]
    if not isinstance(kind, torch.dtype):
        kind = config.dtype or config.get_text_config().dtype or torch.float32
    bare = skeleton(config, remote, kind)
    held = in_type(open_lazily(source, kind, remote), bare, kind)
    return Stored(as_trained(held, bare, given.quantization), bare)
