"""Merging: merged = unmerged, = PEFT's merge_and_unload, and the written folder loads with plain transformers."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from reference.families import VOCABULARY, alone, randomise, sequences, tiny_base, tiny_model
from reference.measure import furthest
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, adapted_layers
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.common.errors import AdapterError, RunError
from topwork.merging.merge import merge, save_merged
from topwork.models import writing
from topwork.models.base import Base
from topwork.ops.batch import batch_of

CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama rsLoRA": ("llama", {}, {"use_rslora": True}),
    "llama patterns": (
        "llama",
        {},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
            "alpha_pattern": {"k_proj": 64.0},
            "exclude_modules": ["v_proj"],
        },
    ),
    "llama lm_head and norm saved": ("llama", {}, {"modules_to_save": ["lm_head", "model.norm"]}),
    "llama head adapted": ("llama", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "gpt2": ("gpt2", {}, {}),
    "gpt2 head saved": ("gpt2", {}, {"target_modules": ["c_attn", "mlp.c_proj"], "modules_to_save": ["lm_head"]}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2 tied, head saved": ("qwen2", {"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}),
    "qwen2 tied, embedding saved": ("qwen2", {"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
    "qwen2 tied, both saved": (
        "qwen2",
        {"tie_word_embeddings": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "qwen2 tied, head adapted": (
        "qwen2",
        {"tie_word_embeddings": True},
        {"target_modules": ["o_proj", "lm_head"]},
    ),
    "gemma2": ("gemma2", {}, {}),
    "gemma2 head saved": ("gemma2", {}, {"modules_to_save": ["lm_head"], "target_modules": ["down_proj"]}),
}  # fmt: skip
EXPECTED_UNTIED = {name for name in CONFIGS if "tied, " in name} | {"gpt2 head saved", "gemma2 head saved"}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w2")
    made.chat_template = "{{ messages[0]['content'] }}"
    made.name_or_path = "/somewhere/on/this/machine"
    return made


def trained(case: str) -> tuple[Base, Adapters]:
    """A base with an adapter whose B is not zero."""
    family, values, fields = CONFIGS[case]
    base = tiny_base(family, **values)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, lora_alpha=8, **fields))
    randomise(adapters, "a")
    return base, adapters


@torch.no_grad()
def logits(base: Base, adapter: str | None) -> torch.Tensor:
    batch = batch_of(sequences(), adapter)
    return base.logits(batch, torch.arange(len(batch.tokens)))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert furthest(found, expected) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("case", CONFIGS)
def test_merged_is_unmerged_and_its_folder_too(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base, adapters = trained(case)
    base = replace(base, tokenizer=tokenizer)
    bare, expected = logits(base, None), logits(base, "a")
    assert furthest(bare, expected) > 1e-2 * float(expected.abs().max()), "the adapter changes nothing"
    merge(base, adapters, "a")
    assert not adapted_layers(base.module)
    assert not adapters.configs
    assert not any(parameter.requires_grad for parameter in base.module.parameters())
    assert_close(logits(base, None), expected)
    save_merged(base, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        assert_close(alone(reloaded, sequences()).float(), expected)
    assert reloaded.config.tie_word_embeddings == (base.module.config.tie_word_embeddings)
    tied = reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    if case in EXPECTED_UNTIED:
        assert not tied
        assert reloaded.config.tie_word_embeddings is False
    else:
        assert tied == (case in ("gpt2", "qwen2 tied", "gemma2"))


@pytest.mark.parametrize("case", sorted(CONFIGS.keys() - {"qwen2 tied, head adapted"}))
def test_merged_weights_are_those_of_peft(case: str, tmp_path: Path) -> None:
    base, adapters = trained(case)
    write_adapter(tmp_path, adapters, "a", BaseId("tiny"))
    family, values, _ = CONFIGS[case]
    theirs = PeftModel.from_pretrained(tiny_model(family, **values), str(tmp_path)).merge_and_unload()
    merge(base, adapters, "a")
    ours, expected = base.module.state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-7, msg=lambda told, key=key: f"{key}: {told}")


def test_a_tied_embedding_stays_when_the_head_is_adapted() -> None:
    base, adapters = trained("qwen2 tied, head adapted")
    before = base.module.get_input_embeddings().weight.clone()
    merge(base, adapters, "a")
    assert torch.equal(base.module.get_input_embeddings().weight, before)
    assert not torch.equal(base.module.get_output_embeddings().weight, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_the_sum_is_rounded_once(family: str) -> None:
    base = tiny_base(family, torch.bfloat16)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, modules_to_save=["lm_head"]))
    randomise(adapters, "a")
    path, layer = next(
        (p, layer) for p, layer in adapted_layers(base.module).items() if p.endswith(("q_proj", "c_attn"))
    )
    delta = layer.adapters["a"].delta().detach()
    exact = layer.weight.double() + (delta.t() if family == "gpt2" else delta).double()
    merge(base, adapters, "a")
    found = base.module.get_submodule(path).weight
    assert {parameter.dtype for parameter in base.module.parameters()} == {torch.bfloat16}
    assert furthest(found, exact) <= 2**-8 * float(exact.abs().max())
    assert torch.equal(found, exact.float().bfloat16())


def test_the_folder_is_ordinary_and_tells_nothing_of_this_machine(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base, adapters = trained("llama")
    tokenizer.save_pretrained(tmp_path / "loaded")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "loaded")
    base = replace(base, tokenizer=tokenizer)
    base.module.config._name_or_path = "/somewhere/on/this/machine"
    base.module.config._model_name_or_path = "A title from a GGUF file"
    base.module.generation_config.eos_token_id = [2, 5]
    merge(base, adapters, "a")
    save_merged(base, tmp_path / "out", TEMPLATE)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    written = {name: (tmp_path / "out" / name).read_text() for name in files if name.endswith((".json", ".jinja"))}
    for text in written.values():
        assert not re.search("topwork_flat|somewhere|name_or_path|attn_implementation|is_local|local_files", text)
    assert json.loads(written["config.json"])["architectures"] == ["LlamaForCausalLM"]
    assert json.loads(written["generation_config.json"])["eos_token_id"] == [2, 5]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    assert tokenizer.chat_template != TEMPLATE, "the base's own tokenizer was changed"
    assert base.module.config._attn_implementation == "topwork_flat", "the base runs no longer on flat batches"


def test_without_a_template_the_tokenizers_own_is_kept(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base, adapters = trained("llama")
    merge(base, adapters, "a")
    save_merged(replace(base, tokenizer=tokenizer), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0]['content'] }}"


def test_a_folder_that_holds_something_is_refused_unless_replaced(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base, adapters = trained("llama")
    base = replace(base, tokenizer=tokenizer)
    merge(base, adapters, "a")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(RunError, match="exists already"):
        save_merged(base, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    save_merged(base, out, replace=True)
    assert (out / "model.safetensors").is_file()
    assert not (out / "mine.txt").exists()


def test_a_failing_write_leaves_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = trained("llama")
    base = replace(base, tokenizer=tokenizer)
    merge(base, adapters, "a")

    def full(path: Path, added: object) -> None:
        assert (path.parent / "model.safetensors").is_file(), "the failure was to come after the weights"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_clean_file", full)
    with pytest.raises(RunError, match="full"):
        save_merged(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_base_with_adapters_is_not_saved(tmp_path: Path) -> None:
    base, _ = trained("llama")
    with pytest.raises(AdapterError, match="still carry adapters"):
        save_merged(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _second_adapter(base: Base, adapters: Adapters) -> None:
    adapters.add("b", AdapterConfig(r=2))


def _packed_weight(base: Base, adapters: Adapters) -> None:
    layer = list(adapted_layers(base.module).values())[-1]
    layer.base_layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "name", "told"),
    [
        (_second_adapter, "a", "would change the base under 'b'"),
        (_packed_weight, "a", "holds its weight as int8"),
        (lambda *_: None, "c", "no adapter 'c'"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_nothing_changed(
    spoil: Callable[[Base, Adapters], None], name: str, told: str
) -> None:
    base, adapters = trained("llama")
    spoil(base, adapters)
    before = copy.deepcopy(base.module.state_dict())
    with pytest.raises(AdapterError, match=told):
        merge(base, adapters, name)
    after = base.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_an_adapter_with_nan_is_told() -> None:
    base, adapters = trained("llama")
    with torch.no_grad():
        next(iter(adapters.parameters("a").values()))[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        merge(base, adapters, "a")
