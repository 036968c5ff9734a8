"""A base of a config's shape in memory, with random weights and as many layers as are wanted: speed and memory do not
ask what a model has learned."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from topwork.common.devices import let_gpu_memory_grow, limit_kernel_caches
from topwork.common.errors import ModelError
from topwork.models.auto import auto_class
from topwork.models.base import Base
from topwork.models.load import as_base
from topwork.models.quantized import chosen_layers, pack, quantize_head
from topwork.models.weights import weight_shape
from topwork.ops.packed import Packed
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import QuantizedLinear

STD = 0.02
DRAWN = 1 << 20
"""Values that are drawn; a tensor holds them again and again, which its products do not notice."""


def shaped_base(
    config: PretrainedConfig,
    layers: int,
    dtype: torch.dtype,
    quantization: QuantizationConfig,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """The first `layers` layers of a config's model between its embedding and its head, held as a recipe says; it has
    no tokenizer. Raises ModelError where no model can be built of the config."""
    limit_kernel_caches()
    let_gpu_memory_grow()
    model = _filled(with_layers(config, layers), dtype, trust_remote_code)
    if quantization.active:
        _quantize(model, quantization)
        if quantization.head != "16bit":
            quantize_head(model, quantization.head)
    if device is not None:
        model = model.to(device)  # type: ignore[arg-type]
    nobody: Any = None
    return as_base(model, nobody, "a base of random weights", lambda _: None, identity="random")


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same with fewer layers: lists that have an entry for each are cut."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    before = int(text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return cut


def _filled(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with no_init_weights():
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"no causal language model can be built from this {config.model_type!r} config: {error}"
        ) from error
    model.tie_weights()
    drawn = torch.empty(DRAWN).normal_(0.0, STD, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                _repeat(drawn, parameter)
    return model


def _repeat(drawn: Tensor, parameter: nn.Parameter) -> None:
    flat = parameter.detach().view(-1)
    for part in flat.split(len(drawn)):
        part.copy_(drawn[: len(part)])


def _quantize(model: PreTrainedModel, wanted: QuantizationConfig) -> None:
    """Layers of one shape hold the same codes, each its own copy."""
    packed: dict[tuple[int, int], Packed] = {}
    for path in chosen_layers(model, wanted):
        old: Any = model.get_submodule(path)
        shape = weight_shape(old)
        if shape not in packed:
            weight = old.weight.detach()
            packed[shape] = pack(weight.t().contiguous() if isinstance(old, Conv1D) else weight, wanted, path)
        new = QuantizedLinear(shape[1], shape[0], old.bias).hold(copy.deepcopy(packed[shape]))
        new.turned = isinstance(old, Conv1D)
        model.set_submodule(path, new.train(False))
