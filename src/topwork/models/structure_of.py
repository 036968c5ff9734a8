"""A base's structure from its modules: for every model that transformers can build, at the price of importing it."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from topwork.models.structure import Module, Structure
from topwork.models.structures.values import Values, widths
from topwork.models.text_part import text_model, text_path
from topwork.quantization.kinds import embedding_shape, features, is_by_row, kind_of, matrices_of


def structure_of(model: PreTrainedModel, fast: bool) -> Structure:
    """Of a model or its skeleton (`models/skeleton.py`), bare and unquantized. Whether its layers are made fast is not
    seen in a skeleton, so it is told."""
    text = model.config.get_text_config()
    values = {**text.to_dict(), "dtype": text.dtype or model.config.dtype}
    paths = {id(module): path for path, module in model.named_modules()}
    head = model.get_output_embeddings()
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in text_model(model).modules())
    return Structure(
        **widths(Values(str(text.model_type), values, {})),
        modules=_modules(model),
        embedding=paths.get(id(model.get_input_embeddings())),
        head=paths.get(id(head)) if head is not None else None,
        fast=fast,
        checkpointable=layers,
        config=values,
        text=text_path(model),
    )


def _modules(model: PreTrainedModel) -> tuple[Module, ...]:
    seen: set[int] = set()
    named = [(path, module) for path, module in model.named_modules() if path]
    attentions = [path for path, module in named if hasattr(module, "layer_idx")]
    found = []
    for path, module in named:
        attends = any(other == path or other.startswith(path + ".") for other in attentions)
        found.append(_module(path, module, attends, seen))
    return tuple(found)


def _module(path: str, module: nn.Module, attends: bool, seen: set[int]) -> Module:
    held = list(module.parameters(recurse=False))
    own = [parameter for parameter in held if id(parameter) not in seen]
    seen.update(map(id, own))
    kind = kind_of(module)
    rows, columns = 0, 0
    if kind == "linear":
        columns, rows = features(module)
    elif kind == "embedding":
        rows, columns = embedding_shape(module)
    return Module(
        path, kind, rows, columns, sum(parameter.numel() for parameter in own),
        kind in ("linear", "norm") and isinstance(getattr(module, "bias", None), nn.Parameter),
        tuple(parameter.numel() for parameter in held), attends, bool(held) and is_by_row(module),
        matrices_of(module),
    )  # fmt: skip
