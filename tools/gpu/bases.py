"""Bases with random weights, made where they are wanted, and rows of random tokens with the lengths of real ones."""

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from random_base import drawn
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from topwork.data.examples import Example
from topwork.models.base import Base
from topwork.models.load import as_base
from topwork.models.quantized import pack
from topwork.models.skeleton import skeleton
from topwork.models.weights import quantizable, weight_shape
from topwork.plan.built import config_of
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import QuantizedLinear

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip
NF4 = QuantizationConfig(load_in_4bit=True)
MEDIAN, SPREAD, SHORTEST, LONGEST = 300, 0.8, 32, 1024
"""Chats' tokens are spread as exp(normal(log MEDIAN, SPREAD)), cut to the bounds: most are short, some very long.
1,024 is where TRL cuts rows unless it is told otherwise."""


def shaped(name: str, tiny: bool, dtype: torch.dtype = torch.bfloat16) -> PretrainedConfig:
    """A shipped shape's config, or the same family in very small."""
    config = config_of(name)
    for key, value in TINY.items() if tiny else ():
        setattr(config, key, value)
    config.dtype = dtype
    return config


def random_model(config: PretrainedConfig, device: torch.device, seed: int = 0, nf4: bool = False) -> PreTrainedModel:
    """A model whose weights are drawn on `device` one by one, and packed as they are drawn where that is asked for, so
    that no more than one of them is dense beside the model."""
    model = skeleton(copy.deepcopy(config)).eval()
    generator = torch.Generator(device).manual_seed(seed)
    packed = quantizable(model) if nf4 else {}
    for path, layer in packed.items():
        weight = drawn(path, layer.weight, generator).to(config.dtype)  # type: ignore[arg-type]
        new = QuantizedLinear(*reversed(weight_shape(layer)), layer.bias).hold(pack(weight, NF4, path))  # type: ignore[arg-type]
        model.set_submodule(path, new.train(False))
    made: dict[int, nn.Parameter] = {}
    for module_path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:  # tied weights stay one
                value = drawn(f"{module_path}.{name}", parameter, generator).to(config.dtype)
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            setattr(module, name, made[id(parameter)])
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary tables
            model.set_submodule(path, type(module)(config=model.config).to(device))
    left = [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{left[0]} and {len(left) - 1} more of the model were not made")
    return model


def random_base(config: PretrainedConfig, device: torch.device, seed: int = 0, nf4: bool = False) -> Base:
    """The same as a frozen base, without a tokenizer."""
    return based(random_model(config, device, seed, nf4))


def based(model: PreTrainedModel) -> Base:
    """A model where it is to stay as a frozen base, without a tokenizer."""
    return as_base(model, None, "random", print, identity="random")  # type: ignore[arg-type]


def chat_lengths(count: int, seed: int, tiny: bool) -> list[int]:
    """Tokens of so many chats."""
    drawn_lengths = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SPREAD, count).clip(SHORTEST, LONGEST)
    return [min(5, max(3, int(length) // 64)) if tiny else int(length) for length in drawn_lengths]


def rows_of(lengths: Sequence[int], vocabulary: int, seed: int, learned: float = 0.5) -> list[Example]:
    """Rows of random tokens, of which a share at the end is learned."""
    random = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        weights = np.zeros(length, dtype=np.float32)
        weights[max(1, length - round(learned * length)) :] = 1
        rows.append(Example(random.integers(3, vocabulary, length, dtype=np.int32), weights, f"row {number}"))
    return rows


def learned_lengths(rows: Sequence[Example]) -> list[tuple[int, int]]:
    """Each row's tokens, and how many of them are learned."""
    return [(len(row.tokens), int(row.weights.sum())) for row in rows]
