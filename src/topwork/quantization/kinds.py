"""What kind of module a layer in memory is, dense or packed, and how large."""

import inspect

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from topwork.common.kinds import Kind, Matrix
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


def holds_experts(module: nn.Module) -> bool:
    """Whether it is transformers' module of many experts in one tensor each for their first and their last matrices,
    which states how these lie (`transformers/integrations/moe.py: use_experts_implementation`)."""
    stated = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    return all(hasattr(module, name) for name in stated) and not getattr(module, "has_post_expert_norm", False)


def first_of_experts(module: nn.Module) -> str:
    """What experts call their first matrices."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def matrices_of(module: nn.Module) -> tuple[Matrix, ...]:
    """The parameters of experts or of a router that rows are multiplied with, in their order; none of other modules."""
    held = dict(module.named_parameters(recurse=False))
    if holds_experts(module):
        names = (first_of_experts(module), "down_proj")
        tensors = [(name, held[name]) for name in held if name in names and held[name].dim() == 3]
        sides = [
            (name, *tensor.shape) if module.is_transposed else (name, *_turned(tensor)) for name, tensor in tensors
        ]
        return tuple(Matrix(*side) for side in sides) if len(sides) == len(names) else ()
    weight = held.get("weight")
    if weight is None or weight.dim() != 2 or kind_of(module) != "other" or not is_by_row(module):
        return ()
    return (Matrix("weight", 1, weight.shape[1], weight.shape[0]),)


def _turned(tensor: Tensor) -> tuple[int, int, int]:
    experts, outputs, inputs = tensor.shape
    return experts, inputs, outputs
