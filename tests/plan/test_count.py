"""Counts of parameters: published figures, and PEFT's own count on tiny models of several families."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import AdapterError, ModelError, RequestError
from topwork.models import config_files
from topwork.models.config import ModelConfig
from topwork.models.config_files import shape_names
from topwork.models.skeleton import skeleton
from topwork.models.structure import Structure
from topwork.models.structures.build import structure_from
from topwork.plan.base import structure_named
from topwork.plan.built import config_of, count_built
from topwork.plan.count import count_adapter, count_table
from topwork.run.count import count

PUBLISHED = {
    "gemma-2-2b": 2_614_341_888,
    "gemma3-270m": 268_098_176,
    "gpt2": 124_439_808,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "phi-3-mini": 3_821_079_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "gemma2": SMALL,
    "phi3": SMALL,
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


def tiny(family: str) -> Structure:
    structure = structure_from({"model_type": family, **FAMILIES[family]})
    assert structure is not None
    return structure


def named(name: str) -> Structure:
    return structure_named(ModelConfig(model_name_or_path=name))


def peft_count(family: str, config: AdapterConfig) -> tuple[int, int]:
    """(trainable, all) as PEFT counts them."""
    fields = config.model_dump(exclude={"method"}, exclude_none=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields)).get_nb_trainable_parameters()


def test_llama_3_8b() -> None:
    model = named("llama-3-8b")
    table = {row.target_set: row.count for row in count_table(model, ranks=(16,))}
    assert {name: count.trainable for name, count in table.items()} == {
        "q,v": 6_815_744,
        "q,k,v,o": 13_631_488,
        "all-linear": 41_943_040,
    }
    assert all(count.frozen == 8_030_261_248 for count in table.values())
    whole = table["all-linear"]
    assert whole.total == 8_030_261_248 + 41_943_040
    assert whole.share == pytest.approx(41_943_040 / 8_072_204_288)
    assert {part.name: (part.modules, part.trainable) for part in whole.by_module}["q_proj"] == (32, 32 * 16 * 8192)
    assert sum(part.trainable for part in whole.by_module) == whole.trainable


def test_smollm2_counts_its_tied_embedding_once() -> None:
    count = count_adapter(named("smollm2-135m"), AdapterConfig(r=16))
    assert (count.frozen, count.trainable) == (134_515_008, 4_884_480)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_size(name: str) -> None:
    assert named(name).parameters == PUBLISHED[name]


def test_every_shape_is_a_model_with_a_table() -> None:
    for name in shape_names():
        assert {row.target_set for row in count_table(named(name), ranks=(4,))} >= {"q,k,v,o", "all-linear"}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_agrees_with_peft(family: str) -> None:
    config = AdapterConfig(r=5)
    count = count_adapter(tiny(family), config)
    assert (count.trainable, count.total) == peft_count(family, config)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        (
            "llama",
            {
                "target_modules": ["q_proj", "k_proj", "down_proj"],
                "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 9},
                "layers_to_transform": [0, 1],
            },
        ),
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj", "v_proj"]}),
        ("qwen2", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]}),
        ("gemma2", {"modules_to_save": ["input_layernorm"], "exclude_modules": ["k_proj"]}),
        ("phi3", {"target_modules": r".*\.1\.self_attn\.(qkv|o)_proj", "use_rslora": True}),
        ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"], "rank_pattern": {"c_fc": 2}, "modules_to_save": ["ln_f"]}),
    ],
)
def test_patterns_and_saved_modules_agree_with_peft(family: str, fields: dict[str, Any]) -> None:
    config = AdapterConfig(r=4, **fields)
    count = count_adapter(tiny(family), config)
    assert (count.trainable, count.total) == peft_count(family, config)


def test_counts_are_what_the_grafted_adapter_trains_and_ignore_it_afterwards() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **FAMILIES["qwen2"]))
    config = AdapterConfig(r=3, modules_to_save=["lm_head"])
    before = count_built(model, config)
    adapters = Adapters(model)
    adapters.add("first", config)
    assert before.trainable == sum(parameter.numel() for parameter in adapters.parameters("first").values())
    assert count_built(model, config) == before == count_adapter(tiny("qwen2"), config)


def test_a_set_that_the_family_lacks_is_left_out() -> None:
    rows = {row.target_set: row for row in count_table(tiny("gpt2"), ranks=(2,), target_sets=("q,v", "q,k,v,o", "mlp"))}
    assert sorted(rows) == ["mlp", "q,k,v,o"]
    assert rows["q,k,v,o"].target_modules == ("attn.c_attn", "attn.c_proj")
    assert rows["mlp"].target_modules == ("mlp.c_fc", "mlp.c_proj")


def test_the_table_has_six_ranks_and_refuses_an_unknown_set() -> None:
    rows = count_table(tiny("llama"), target_sets=("q,v",))
    assert [row.r for row in rows] == [4, 8, 16, 32, 64, 128]
    assert [row.count.trainable for row in rows] == [r * rows[0].count.trainable // 4 for r in (4, 8, 16, 32, 64, 128)]
    with pytest.raises(ValueError, match="unknown target set 'q,k'"):
        count_table(tiny("llama"), target_sets=("q,k",))


def test_targets_that_match_nothing_are_an_error() -> None:
    with pytest.raises(AdapterError, match="did you mean 'q_proj'"):
        count_adapter(tiny("llama"), AdapterConfig(target_modules=["q_prj"]))


@pytest.mark.parametrize("as_file", [True, False])
def test_a_config_is_enough(tmp_path: Path, as_file: bool) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SMALL}))
    model = skeleton(config_of(str(path if as_file else tmp_path)))
    counted = count_adapter(named(str(path if as_file else tmp_path)), AdapterConfig())
    assert counted.frozen == sum(p.numel() for p in model.parameters())
    assert counted == count_built(model, AdapterConfig())


def test_a_hub_id_that_is_not_cached_is_found_among_the_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config_files, "ask_hub", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    assert config_of("HuggingFaceTB/SmolLM2-135M-Instruct").num_hidden_layers == 30
    assert config_of("smollm2-135m").num_hidden_layers == 30


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"did you mean 'llama-3-8b'"):
        config_of("llama-3-8")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        config_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(ModelError, match="does not hold a model config"):
        config_of(str(tmp_path))
    with pytest.raises(ModelError, match="no causal language model"):
        skeleton(AutoConfig.for_model("clip"))


@pytest.mark.parametrize("rank", [0, -4])
def test_ranks_that_there_are_not(rank: int) -> None:
    with pytest.raises(RequestError, match=f"--rank is {rank}; expected a positive whole number"):
        count("llama-3-8b", ranks=(8, rank))
