"""A model's linear weights one by one, from its files, without the model."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from topwork.common.errors import ModelError
from topwork.common.os_errors import why
from topwork.common.text_part import reads_text
from topwork.models.shards import promised, weight_files
from topwork.models.skeleton import skeleton
from topwork.models.source import Source
from topwork.models.stored_names import stored_names
from topwork.models.text_part import text_path


def quantizable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What quantization packs, by path: every linear layer but the output head, and but what reads pictures, which text
    never meets and a merged model shall have as it was. The model may be a skeleton."""
    head, text = model.get_output_embeddings(), text_path(model)
    return {
        path: module
        for path, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and module is not head
        and reads_text(path, text, None)
    }


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; a Conv1D holds its weight the other way round."""
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def stored_weights(source: Source, model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(path, weight [out, in]) of every layer that quantization packs, file by file, one in memory at a time.

    `model` is the skeleton that says which they are; None as `dtype` keeps the files' type. Raises ModelError for files
    that are not there or not whole, and for layers that are in none of them, before anything is read.
    """
    layers = quantizable(model)
    try:
        weights = promised(weight_files(source.folder, source.revision))
    except OSError as error:
        raise ModelError(f"{source.name} has no weights in safetensors that can be read: {why(error)}") from error
    paths = _paths_by_key(layers, weights, model)
    missing = sorted(layers.keys() - paths.values())
    if missing:
        raise ModelError(
            f"{source.name} holds no weight of {len(missing)} linear layers of its config (first {missing[0]}); is the "
            "download finished, and are its tensors named as transformers writes them?"
        )
    for key, promise in weights.items():
        if key in paths:
            layer = layers[paths[key]]
            weight = promise[...]
            yield paths[key], _as_rows(weight if dtype is None else weight.to(dtype), layer)


def original_weight(source: Source, model: PreTrainedModel) -> Callable[[str], Tensor]:
    """A function that reads one layer's weight [out, in] by its path, as it was before it was quantized on the way in.

    `model` is the quantized one. The function raises ModelError where the files hold no such weight in 16 or 32 bits: a
    checkpoint that was written quantized, or a GGUF file.
    """

    def read(path: str) -> Tensor:
        names = (f"{path}.weight", f"{path.removeprefix(model.base_model_prefix + '.')}.weight")
        try:
            weights = promised(weight_files(source.folder, source.revision))
        except OSError as error:
            raise ModelError(f"{source.name} has no weights in safetensors that can be read: {why(error)}") from error
        key = next((name for name in names if name in weights), None) or _renamed(model, weights).get(f"{path}.weight")
        weight = None if key is None else weights[key][...]
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ModelError(
                f"{source.name} holds no weight of {path} in 16 or 32 bits, as LoftQ asks for; give the checkpoint "
                "from before it was quantized, and let it be quantized as it is read"
            )
        layer = model.get_submodule(path)
        return weight.t().contiguous() if getattr(getattr(layer, "base_layer", layer), "turned", False) else weight

    return read


def _as_rows(weight: Tensor, layer: nn.Module) -> Tensor:
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight


def _paths_by_key(layers: dict[str, nn.Module], held: Mapping[str, Any], model: PreTrainedModel) -> dict[str, str]:
    """The layers' paths by the names of their weights in the files."""
    names = stored_names(model, held).keys
    return {names[f"{path}.weight"]: path for path in layers if f"{path}.weight" in names}


def _renamed(model: PreTrainedModel, held: Mapping[str, Any]) -> dict[str, str]:
    """The files' keys by the names in a model that adapters may stand in, where transformers reads them by other
    names."""
    return stored_names(skeleton(model.config), held).keys
