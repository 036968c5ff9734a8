"""A model that is not in memory: its tensors are those of the files, and what is written is read by others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from reference.families import tiny_model
from reference.quantized_by_others import write_base
from topwork.common.errors import ModelError, RunError
from topwork.merging.merge import dequantize
from topwork.models.config import ModelConfig
from topwork.models.fingerprint import fingerprint
from topwork.models.lazy import LazyTensor, in_type, open_lazily
from topwork.models.lazy_fingerprint import lazy_fingerprint
from topwork.models.lazy_writing import write_lazily, write_tensors
from topwork.models.load import load_base
from topwork.models.skeleton import skeleton
from topwork.models.source import Source
from topwork.models.stored_names import key_for, stored_names
from topwork.models.writing import write_model
from topwork.quantization.config import QuantizationConfig


def source(folder: Path) -> Source:
    return Source("tiny", str(folder), None)


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000, 1])
def test_what_is_written_is_read_by_safetensors_and_transformers(shard_bytes: int, tmp_path: Path) -> None:
    theirs = tiny_model("llama").bfloat16()
    theirs.generation_config.eos_token_id = [2, 5]
    theirs.save_pretrained(tmp_path / "base", max_shard_size="30kB")
    model = open_lazily(source(tmp_path / "base"))
    out = tmp_path / "out"
    out.mkdir()
    write_lazily(model, out, shard_bytes)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 40_000: 5, 1: len(model.tensors)}[shard_bytes]
    found = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert found.keys() == model.tensors.keys()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in found.items())
    with safe_open(files[0], framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    read = AutoModelForCausalLM.from_pretrained(out)
    assert read.dtype == torch.bfloat16
    assert read.generation_config.eos_token_id == [2, 5]
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in read.state_dict().items())
    if len(files) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == model.nbytes
        assert {out / name for name in index["weight_map"].values()} == set(files)


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_checkpoint_comes_dense(kind: str, family: str, tmp_path: Path) -> None:
    config = ModelConfig(model_name_or_path=str(write_base(tmp_path / "base", family)), dtype="bfloat16", device="cpu")
    base = load_base(config, lambda _: None, QuantizationConfig.model_validate({kind: True}))
    (tmp_path / "packed").mkdir()
    write_model(base, tmp_path / "packed")
    model = open_lazily(source(tmp_path / "packed"))
    dequantize(base.module)
    expected = base.module.state_dict()
    assert "quantization_config" not in model.config
    assert model.tensors.keys() == expected.keys() - {"lm_head.weight" for _ in "1" if family == "gpt2"}
    for key, promise in model.tensors.items():
        found = promise.fetch()
        assert (promise.shape, promise.dtype) == (tuple(found.shape), found.dtype)
        assert torch.equal(found, expected[key]), key


def test_another_kind_of_quantization_is_refused_by_name(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="quantized by gptq"):
        open_lazily(source(tmp_path))


def test_names_of_a_bare_models_files(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    opened = open_lazily(source(tmp_path))
    bare = skeleton(AutoConfig.from_pretrained(tmp_path))
    assert "embed_tokens.weight" in opened.tensors
    found = stored_names(bare, opened.tensors)
    assert found.keys["model.embed_tokens.weight"] == "embed_tokens.weight"
    assert found.keys.keys() == {name for name, _ in bare.named_parameters()}
    assert key_for(bare, "lm_head.weight", opened.tensors) == "lm_head.weight"


def test_experts_that_reading_joins_are_told_apart() -> None:
    bare = skeleton(tiny_model("mixtral").config)
    keys = [f"model.layers.0.block_sparse_moe.experts.{n}.w{m}.weight" for n in range(4) for m in (1, 2, 3)]
    found = stored_names(bare, [*keys, "model.norm.weight"])
    assert found.keys == {"model.norm.weight": "model.norm.weight"}
    assert found.made == {f"model.layers.0.mlp.experts.{kind}_proj" for kind in ("gate_up", "down")}


def test_types_are_those_of_reading(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    bare = skeleton(AutoConfig.from_pretrained(tmp_path), dtype=torch.float16)
    model = in_type(open_lazily(source(tmp_path)), bare, torch.float16)
    assert {tensor.dtype for tensor in model.tensors.values()} == {torch.float16}
    assert {tensor.fetch().dtype for tensor in model.tensors.values()} == {torch.float16}
    assert model.config["dtype"] == "float16"


@pytest.mark.parametrize(("family", "stored"), [("llama", "float32"), ("gpt2", "float16"), ("gemma2", "bfloat16")])
def test_the_fingerprint_is_that_of_the_loaded_model(family: str, stored: str, tmp_path: Path) -> None:
    tiny_model(family).to(getattr(torch, stored)).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        bare = skeleton(AutoConfig.from_pretrained(tmp_path), dtype=dtype)
        expected = fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        assert lazy_fingerprint(in_type(open_lazily(source(tmp_path)), bare, dtype), bare) == expected


def test_a_tensor_that_is_not_as_promised_is_an_error(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = open_lazily(source(tmp_path / "base"))
    wrong = LazyTensor((3,), torch.float32, lambda: torch.zeros(4))
    with pytest.raises(RunError, match=r"norm came as torch.float32 \(4,\), and torch.float32 \(3,\) was promised"):
        write_lazily(replace(model, tensors={"norm": wrong}), tmp_path)


def test_what_was_cast_twice_is_written_as_the_first_type_has_it(tmp_path: Path) -> None:
    """A training in bf16 on an fp32 file, merged in fp32: the file's own digits were never trained on."""
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    bare = skeleton(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    trained = in_type(open_lazily(source(folder)), bare, torch.bfloat16)
    wide = {key: tensor.to(torch.float32) for key, tensor in trained.tensors.items()}
    write_tensors(tmp_path / "wide.safetensors", wide)
    theirs, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "wide.safetensors")
    assert any(not torch.equal(written[key], theirs[key]) for key in theirs)
    assert all(torch.equal(written[key], theirs[key].to(torch.bfloat16).float()) for key in theirs)
