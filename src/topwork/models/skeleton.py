"""A model's modules and shapes without its weights."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from topwork.common.errors import ModelError
from topwork.models.auto import auto_class

_UNBUILDABLE = (
    ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, ImportError, AssertionError, AttributeError
)  # fmt: skip
"""What transformers' and torch's classes raise for sizes that they cannot be built of."""


def skeleton(
    config: PretrainedConfig, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a config on the meta device: every module and shape, no memory. With `dtype` its parameters have the
    types that they have in a model read in this type (some families keep a few in fp32). Raises ModelError."""
    typed = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **typed)
    except ModelError:
        raise
    except _UNBUILDABLE as error:
        raise ModelError(
            f"no causal language model can be built from this {config.model_type!r} config: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """transformers goes on with every class that it has."""
    return str(error).strip().partition("\n")[0]
