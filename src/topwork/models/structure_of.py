"""A base's structure from its modules: for every model that transformers can build, at the price of importing it."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from topwork.models.structure import Module, Structure
from topwork.models.weights import weight_shape


def structure_of(model: PreTrainedModel, fast: bool) -> Structure:
    """Of a model or its skeleton (`models/skeleton.py`), bare and unquantized. Whether its layers are made fast is not
    seen in a skeleton, so it is told."""
    text = model.config.get_text_config()
    seen: set[int] = set()
    modules = tuple(_module(path, module, seen) for path, module in model.named_modules() if path)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    return Structure(
        family=str(text.model_type),
        modules=modules,
        embedding=paths.get(id(embedding)),
        head=paths.get(id(head)) if head is not None else None,
        layers=int(text.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        key_value_heads=_value(text, heads, "num_key_value_heads"),
        head_dim=_value(text, hidden // heads, "head_dim"),
        inner=_inner(text, hidden),
        vocabulary=int(text.vocab_size),
        context_length=_value(text, 1 << 30, "max_position_embeddings", "n_positions", "max_sequence_length"),
        dtype=str(getattr(text, "dtype", None) or "float32").removeprefix("torch."),
        fast=fast,
        checkpointable=layers,
        config=text.to_dict(),
    )


def _module(path: str, module: nn.Module, seen: set[int]) -> Module:
    own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
    seen.update(map(id, own))
    parameters = sum(parameter.numel() for parameter in own)
    if isinstance(module, nn.Linear | Conv1D):
        rows, columns = weight_shape(module)
        return Module(path, "linear", rows, columns, parameters, module.bias is not None)
    if isinstance(module, nn.Embedding):
        return Module(path, "embedding", module.num_embeddings, module.embedding_dim, parameters)
    return Module(path, "other", parameters=parameters)


def _inner(text: PreTrainedConfig, hidden: int) -> int:
    width = _value(text, 4 * hidden, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim")
    return width * _value(text, 1, "num_experts_per_tok")


def _value(text: PreTrainedConfig, default: int, *names: str) -> int:
    """The first of these that the config has."""
    found = next((value for name in names if (value := getattr(text, name, None)) is not None), default)
    return int(found)
