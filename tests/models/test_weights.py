"""Linear weights read one by one are those of the loaded model."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from data.family_tokenizers import build_tokenizer
from reference.families import tiny_model
from topwork.common.errors import ModelError
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.skeleton import skeleton
from topwork.models.source import Source
from topwork.models.weights import quantizable, stored_weights, weight_shape
from topwork.plan.footprint import footprint
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import packed_modules, weight_bytes


def stored(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    source = Source("tiny", str(folder), None)
    return dict(stored_weights(source, skeleton(model.config), dtype))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi3"])
@pytest.mark.parametrize("shard", ["30KB", "1GB"])
def test_they_equal_the_models(family: str, shard: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "30KB")
    read = stored(model, tmp_path)
    layers = quantizable(model)
    assert read.keys() == layers.keys()
    assert len(read) >= 8
    for path, layer in layers.items():
        weight = layer.weight.t() if family == "gpt2" else layer.weight
        assert read[path].shape == weight_shape(layer)
        assert torch.equal(read[path], weight)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral", "opt", "phi3"])
def test_they_are_what_the_loader_packs(family: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("smollm2")
    model = tiny_model(family, vocab_size=len(tokenizer))
    for written in (model, tokenizer):
        written.save_pretrained(tmp_path)
    config = ModelConfig(model_name_or_path=str(tmp_path), device="cpu")
    held = load_base(config, lambda _: None, QuantizationConfig(load_in_4bit=True)).module
    assert packed_modules(held).keys() == quantizable(skeleton(model.config)).keys()
    rows = {row.name: row.total_bytes for row in footprint(skeleton(model.config))}
    assert weight_bytes(held) == rows["NF4 + DQ"]


def test_the_head_is_left_out_and_the_type_is_as_asked(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    read = stored(model, tmp_path, torch.bfloat16)
    assert "lm_head" not in read
    assert {weight.dtype for weight in read.values()} == {torch.bfloat16}


def test_a_bare_models_checkpoint_lacks_the_prefix(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.base_model.save_pretrained(tmp_path)
    assert stored(model, tmp_path).keys() == quantizable(model).keys()


def test_a_layer_that_is_in_no_file_is_named(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"7 linear layers .*model\.layers\.1\.mlp\.down_proj"):
        stored(tiny_model("llama"), tmp_path)


def test_files_that_are_cut_short_or_missing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be read"):
        stored(model, tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match="no weights in safetensors"):
        stored(model, tmp_path)
