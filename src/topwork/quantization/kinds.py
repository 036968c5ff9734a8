"""What kind of module a layer in memory is, dense or packed, and how large."""

import inspect

from torch import nn
from transformers.pytorch_utils import Conv1D

from topwork.common.kinds import Kind
from topwork.quantization.linear import PackedModule, QuantizedEmbedding, QuantizedLinear

LINEAR = (nn.Linear, Conv1D, QuantizedLinear)
EMBEDDINGS = (nn.Embedding, QuantizedEmbedding)


def kind_of(module: nn.Module) -> Kind:
    """What kind of module it is."""
    if isinstance(module, LINEAR):
        return "linear"
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    return "norm" if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm") else "other"


def is_by_row(module: nn.Module) -> bool:
    """A leaf that is called with rows and nothing else, and does not mix them."""
    arguments = list(inspect.signature(module.forward).parameters.values())
    mixes = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not mixes and not list(module.children()) and len(arguments) == 1


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, (V, d) of an embedding; a Conv1D (gpt2) holds its weight transposed, a quantized one
    packed."""
    if isinstance(layer, EMBEDDINGS):
        return embedding_shape(layer)
    if isinstance(layer, QuantizedLinear):
        return layer.in_features, layer.out_features
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def embedding_shape(module: nn.Module) -> tuple[int, int]:
    """(V, d) of an embedding, or of the head tied to it."""
    rows, columns = module.shape if isinstance(module, PackedModule) else module.weight.shape  # type: ignore[misc]
    return int(rows), int(columns)
