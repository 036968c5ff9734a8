"""The part of a model in memory that reads text: all of it, but in models that read pictures too."""

from torch import nn
from transformers import PreTrainedModel

from topwork.common.text_part import part_around
from topwork.quantization.kinds import kind_of


def text_path(model: PreTrainedModel) -> str:
    """Its path; empty where the model has no other part. The model may be a skeleton, or hold adapters."""
    if model.config.get_text_config() is model.config:
        return ""
    embedding = model.get_input_embeddings()
    named = dict(model.named_modules())
    path = next((path for path, module in named.items() if module is embedding), None)
    return part_around(path, (path for path, module in named.items() if kind_of(module) == "linear"))


def text_model(model: PreTrainedModel) -> nn.Module:
    """The module that holds its decoder layers, without the output head."""
    path = text_path(model)
    return model.get_submodule(path) if path else model.base_model
