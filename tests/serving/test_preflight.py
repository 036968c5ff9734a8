"""What vLLM is given: the same adapter in the plainest form, or a refusal by name; a packed base dense."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from reference.families import alone, logits, randomise, sequences, tiny_base, tiny_model
from reference.measure import LOGITS_APART, relative
from reference.quantized_by_others import write_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.foreign import read_foreign
from topwork.adapters.graft import Adapters, bare_base
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.common.errors import AdapterError
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.skeleton import skeleton
from topwork.ops.batch import batch_of
from topwork.quantization.config import QuantizationConfig
from topwork.serving.backends.preflight import Taken, allowed_rank, for_vllm
from topwork.serving.backends.vllm_base import hand_over
from topwork.serving.backends.vllm_config import VllmConfig, vllm_command

QUIET = pytest.mark.filterwarnings("ignore:Could not find a config file")


def written(folder: Path, family: str = "llama", values: Any = None, **config: Any) -> Tensor:
    """An adapter's folder; the logits that its base gives with it."""
    base = tiny_base(family, **(values or {}))
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**config))
    randomise(adapters, "a")
    write_adapter(folder, adapters, "a", BaseId("owner/base", None))
    return logits(base, batch_of(sequences(), "a"))


def bones(family: str = "llama", **values: Any) -> Bare:
    """A base without weights."""
    return bare_base(skeleton(tiny_model(family, **values).config))


def taken(folder: Path, bare: Bare, **how: Any) -> Taken:
    return for_vllm("mine", read_foreign(folder, "adapter 'mine'"), bare, **how)


CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8}, ()),
    "one rank for all, by pattern": (
        "llama", {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}, ()
    ),
    "half an alpha": ("llama", {"r": 4, "lora_alpha": 2.5}, ("a lora_alpha that is no whole number",)),
    "rsLoRA": ("llama", {"r": 3, "lora_alpha": 8, "use_rslora": True}, ("rsLoRA",)),
    "patterns": (
        "llama",
        {"r": 3, "rank_pattern": {"q_proj": 2, "up_proj": 9}, "alpha_pattern": {"v_proj": 3}},
        ("alphas by module", "unequal ranks"),
    ),
    "rsLoRA with patterns": (
        "llama",
        {"r": 3, "use_rslora": True, "rank_pattern": {r".*\.1\.mlp\.up_proj": 1}},
        ("rsLoRA", "unequal ranks"),
    ),
    "pissa, as we write it": ("llama", {"r": 2, "init_lora_weights": "pissa"}, ()),
    "head and embedding": (
        "llama",
        {"r": 3, "use_rslora": True, "target_modules": ["lm_head", "embed_tokens", "q_proj"]},
        ("rsLoRA",),
    ),
    "fused projections": ("phi3", {"r": 3, "use_rslora": True}, ("rsLoRA",)),
}  # fmt: skip


@QUIET
@pytest.mark.parametrize("name", CASES)
def test_what_vllm_reads_is_the_adapter(name: str, tmp_path: Path) -> None:
    """By PEFT's own reading of the folder, whose config has nothing that an older vLLM overlooks."""
    family, config, changes = CASES[name]
    expected = written(tmp_path / "ours", family, **config)
    found = taken(tmp_path / "ours", bones(family))
    found.write(tmp_path / "theirs")
    assert [told.startswith(change) for told, change in zip(found.changes, changes, strict=True)] == [True] * len(
        changes
    )
    theirs = PeftModel.from_pretrained(tiny_model(family), tmp_path / "theirs").eval()
    with torch.no_grad():
        assert relative(alone(theirs, sequences()), expected) < LOGITS_APART
    assert found.rank == found.config["r"] == max(t.shape[0] for key, t in found.tensors.items() if "_A" in key)
    for key in ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "use_dora"):
        assert not found.config.get(key)
    assert found.config["lora_alpha"] == found.rank


@pytest.mark.parametrize(
    ("family", "values", "config", "told"),
    [
        ("llama", {}, {"use_dora": True}, "DoRA: vLLM refuses it; merge it"),
        (
            "llama",
            {},
            {"modules_to_save": ["norm", "lm_head"]},
            r"whole modules \(modules_to_save\) \(lm_head, norm\): vLLM refuses them; merge it",
        ),
        ("llama", {}, {"trainable_token_indices": [3, 4]}, r"trained tokens .* \(2 of them\): vLLM refuses tensors"),
        ("llama", {}, {"method": "ia3"}, "IA3: vLLM knows LoRA alone; merge it"),
        ("gpt2", {}, {"method": "bitfit"}, "BitFit: vLLM knows LoRA alone; merge it"),
        ("llama", {}, {"method": "full"}, "full fine-tuning: vLLM knows LoRA alone"),
        (
            "llama",
            {},
            {"method": "prefix"},
            "prefix tuning: vLLM has no place for learned keys .*; serve it without vLLM",
        ),
        ("llama", {}, {"method": "prompt"}, "prompt tuning: vLLM has no place"),
        (
            "llama",
            {"tie_word_embeddings": True},
            {"target_modules": ["lm_head"]},
            r"tied \(lm_head\): vLLM has one module for both",
        ),
        ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}, r"tied \(model\.embed_tokens\)"),
    ],
)
def test_what_vllm_refuses_is_refused_by_name(
    family: str, values: dict[str, Any], config: dict[str, Any], told: str, tmp_path: Path
) -> None:
    written(tmp_path, family, values, **{"r": 2, **config} if "method" not in config else config)
    with pytest.raises(AdapterError, match=f"adapter 'mine' cannot be served by vLLM: .*{told}"):
        taken(tmp_path, bones(family, **values))


def test_pefts_beginnings_need_the_base(tmp_path: Path) -> None:
    written(tmp_path, r=4)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(AdapterError, match=r"it began with PiSSA or OLoRA in PEFT, .*topwork export"):
        taken(tmp_path, bones())


def test_another_shape_and_a_copy_of_the_base(tmp_path: Path) -> None:
    written(tmp_path, r=2, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    copied = {**tensors, "base_model.model.lm_head.base_layer.weight": torch.ones(99, 64)}
    save_file(copied, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"holds the base's own lm_head\.base_layer\.weight"):
        taken(tmp_path, bones())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"cannot be served by vLLM: .* of another shape"):
        taken(tmp_path, bones(hidden_size=32))


def test_ranks(tmp_path: Path) -> None:
    written(tmp_path, r=33)
    assert taken(tmp_path, bones()).rank == 33
    with pytest.raises(AdapterError, match=r"its rank 33 is over 32, which this vLLM was started for; .*max_lora_rank"):
        taken(tmp_path, bones(), most=32)
    pairs = {1: 1, 2: 8, 8: 8, 9: 16, 33: 64, 257: 320, 321: 512, 512: 512}
    assert {rank: allowed_rank([1, rank]) for rank in pairs} == pairs
    assert allowed_rank([4], 16) == 16
    with pytest.raises(AdapterError, match="rank 513 is over the largest that vLLM takes, 512; merge it"):
        allowed_rank([513])


def test_one_key_is_one_content(tmp_path: Path) -> None:
    keys = set()
    for number, config in enumerate(({"r": 2}, {"r": 2, "lora_alpha": 5}, {"r": 2, "target_modules": ["q_proj"]})):
        written(tmp_path / str(number), **config)
        keys |= {taken(tmp_path / str(number), bones()).key for _ in range(2)}
    assert len(keys) == 3


def test_the_command() -> None:
    config = VllmConfig(args=["--tensor-parallel-size", "2"], max_loras=4)
    found = vllm_command(config, "/base", "me", 1234, 32, {"one": Path("/a/b")}, ["--dtype", "bfloat16"])
    assert found[:3] == ["vllm", "serve", "/base"]
    options = dict(zip(found[3::1], found[4::1]))
    assert options["--served-model-name"] == "me"
    assert options["--host"] == "127.0.0.1"
    assert options["--port"] == "1234"
    assert options["--max-lora-rank"] == "32"
    assert options["--max-loras"] == "4"
    assert int(options["--max-cpu-loras"]) >= 4
    assert options["--lora-modules"] == "one=/a/b"
    assert options["--tensor-parallel-size"] == "2"
    assert "--enable-lora" in found
    assert found[-1] == "one=/a/b"  # it takes all that follow


def test_a_packed_base_is_handed_over_dense_and_written_once(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    model = ModelConfig(model_name_or_path=str(tmp_path / "base"), dtype="float32", device="cpu")
    wanted, said = QuantizationConfig(load_in_4bit=True), []
    found = hand_over(model, wanted, tmp_path / "work", said.append)
    packed = load_base(model, lambda _: None, wanted)
    assert found.id == BaseId(packed.name, packed.fingerprint)
    dense = AutoModelForCausalLM.from_pretrained(found.model, dtype=torch.float32).eval()
    assert not hasattr(dense.config, "quantization_config")
    with torch.no_grad():
        theirs = alone(dense, sequences())
        assert relative(theirs, logits(packed, batch_of(sequences()))) < LOGITS_APART
        original = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        assert relative(theirs, alone(original, sequences())) > 1e-3
    assert "writing it dequantized" in said[0]
    weights = next(Path(found.model).glob("*.safetensors"))
    before = weights.stat().st_mtime_ns
    assert hand_over(model, wanted, tmp_path / "work", said.append).id == found.id
    assert weights.stat().st_mtime_ns == before
    assert len(of_writing(said)) == 1
    weights.write_bytes(weights.read_bytes()[:-1])  # damaged: written anew
    hand_over(model, wanted, tmp_path / "work", said.append)
    assert len(of_writing(said)) == 2
    os.utime(next((tmp_path / "base").glob("*.safetensors")))  # another base, for all that anybody knows
    hand_over(model, wanted, tmp_path / "work", said.append)
    assert len(of_writing(said)) == 3


def of_writing(said: list[str]) -> list[str]:
    """The lines that say so, without those on what is being read."""
    return [line for line in said if "writing it dequantized" in line]


def test_a_dense_base_is_handed_over_as_it_lies(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    model = ModelConfig(model_name_or_path=str(tmp_path / "base"), dtype="bfloat16")
    found = hand_over(model, QuantizationConfig(), tmp_path / "work", print)
    assert found.model == str(tmp_path / "base")
    assert found.options == ["--dtype", "bfloat16"]
    assert not (tmp_path / "work").exists()
    assert found.skeleton.modules.keys() == bones().modules.keys() or found.skeleton.modules
