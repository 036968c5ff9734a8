"""The weights that a quantized training multiplied, without the model: packed and made dense again, one at a time."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from topwork.models.lazy import LazyModel, LazyTensor
from topwork.models.quantized import chosen_layers, pack, pack_head
from topwork.models.stored_names import stored_names
from topwork.ops.packed import Packed
from topwork.quantization.config import QuantizationConfig


def as_trained(model: LazyModel, bare: PreTrainedModel, wanted: QuantizationConfig) -> LazyModel:
    """A model of which every weight that `load_base` would pack is what its packed form stands for, in its own type.

    `model` is in the type of the training, `bare` its skeleton. Raises ModelError for options that do not fit it, and
    NotStoredError where a packed weight has no tensor of its own in the files.
    """
    names = stored_names(bare, model.tensors)
    changed = {}
    for path in chosen_layers(bare, wanted) if wanted.active else ():
        name = f"{path}.weight"
        turned = isinstance(bare.get_submodule(path), Conv1D)
        key = names.key(name, model.name)
        changed[key] = _through(model.tensors[key], lambda weight, name=name: pack(weight, wanted, name), turned)  # type: ignore[misc]
    if wanted.head != "16bit":
        for key in _head_keys(bare, names.keys):
            changed[key] = _through(model.tensors[key], lambda weight: pack_head(weight, wanted.head), turned=False)
    return replace(model, tensors=model.tensors | changed)


def _through(tensor: LazyTensor, packed: Callable[[Tensor], Packed], turned: bool) -> LazyTensor:
    """A tensor there and back; a Conv1D's is packed as [out, in]."""

    @torch.no_grad()
    def fetch() -> Tensor:
        weight = tensor.fetch()
        dense = packed(weight.t() if turned else weight).dense().to(tensor.dtype)
        return dense.t().contiguous() if turned else dense

    return LazyTensor(tensor.shape, tensor.dtype, fetch)


def _head_keys(bare: PreTrainedModel, keys: dict[str, str]) -> list[str]:
    """Where the head's weight stands: under its own name, or a tied embedding's, or both."""
    head = bare.get_output_embeddings().get_parameter("weight")
    named = [name for name, parameter in bare.named_parameters(remove_duplicate=False) if parameter is head]
    return [keys[name] for name in named if name in keys]
