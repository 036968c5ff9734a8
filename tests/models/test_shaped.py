"""Bases of a config's shape with random weights and fewer layers."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from reference.families import sequences, tiny_model
from topwork.models.shaped import shaped_base, with_layers
from topwork.ops.batch import batch_of
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import QuantizedLinear, packed_kinds

PLAIN = QuantizationConfig()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "opt", "phi3", "qwen3_moe", "smollm3"])
def test_a_base_of_any_family_has_the_modules_of_its_config_and_as_many_layers_as_asked_for(family: str) -> None:
    config = tiny_model(family).config
    base = shaped_base(config, 1, torch.float32, PLAIN)
    whole = {path for path, _ in tiny_model(family).named_modules()}
    assert {path for path, _ in base.module.named_modules()} == {path for path in whole if ".1" not in path}
    assert base.module.config.get_text_config().num_hidden_layers == 1
    assert config.get_text_config().num_hidden_layers == 2
    hidden = base.hidden(batch_of(sequences()))
    assert torch.isfinite(hidden).all()
    assert hidden.std() > 0


def test_lists_that_have_an_entry_for_each_layer_are_cut() -> None:
    config = tiny_model("gemma2").config
    assert with_layers(config, 1).layer_types == config.layer_types[:1]


def test_a_tied_head_is_the_embedding() -> None:
    config = tiny_model("llama", tie_word_embeddings=True).config
    module = shaped_base(config, 1, torch.bfloat16, PLAIN).module
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert module.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wanted", "kind"), [({"load_in_4bit": True}, "nf4"), ({"load_in_8bit": True, "head": "int8"}, "int8")]
)
def test_layers_are_packed_as_a_recipe_says(wanted: dict[str, object], kind: str) -> None:
    quantization = QuantizationConfig.model_validate(wanted)
    base = shaped_base(tiny_model("llama").config, 2, torch.float32, quantization)
    layers = [module for module in base.module.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14 + (quantization.head != "16bit")
    assert all(kind in name.lower() for name in packed_kinds(base.module))
    assert len({layer.weight.data_ptr() for layer in layers}) == len(layers)
    assert torch.isfinite(base.hidden(batch_of(sequences()))).all()


def test_transposed_layers_are_packed_turned() -> None:
    config = tiny_model("gpt2").config
    base = shaped_base(config, 1, torch.float32, QuantizationConfig(load_in_4bit=True))
    plain = shaped_base(config, 1, torch.float32, PLAIN).module
    for path, module in plain.named_modules():
        if isinstance(module, Conv1D):
            packed = base.module.get_submodule(path)
            assert isinstance(packed, QuantizedLinear)
            assert packed.turned
            assert packed.shape == tuple(reversed(module.weight.shape))
