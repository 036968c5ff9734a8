"""A model's config by any of its names, and what is said of one that has no sizes, without transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from topwork.common.errors import ModelError
from topwork.models.config import ModelConfig
from topwork.models.config_files import find_config, shape_names, shape_values
from topwork.models.structure import Structure
from topwork.models.structures.build import structure_from
from topwork.models.tokenizer import usable_length
from topwork.plan.base import structure_named

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, **values: Any) -> Structure:
    """The structure of a config.json with llama's values but for these; None leaves one out."""
    given = {key: value for key, value in {**LLAMA, **values}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(given), "utf-8")
    return structure_named(ModelConfig(model_name_or_path=str(folder)))


def test_a_folder_a_file_and_a_shape(folder: Path) -> None:
    found = written(folder)
    assert structure_named(ModelConfig(model_name_or_path=str(folder / "config.json"))) == found
    assert structure_named(ModelConfig(model_name_or_path="config.json")) == found
    assert find_config("llama-3-8b").shipped
    assert find_config("smollm2-135m").values() == shape_values("smollm2-135m")
    assert find_config("Qwen/Qwen3-8B").values()["num_hidden_layers"] == 36


@pytest.mark.parametrize(
    "names",
    [["hidden_size"], ["num_hidden_layers", "vocab_size"], ["intermediate_size"], ["num_attention_heads"]],
)
def test_a_config_without_sizes(folder: Path, names: list[str]) -> None:
    with pytest.raises(ModelError, match=f"'llama' model says nothing of {', '.join(names)}, without which"):
        written(folder, **dict.fromkeys(names))


@pytest.mark.parametrize("value", [0, -3, "64", 1.5, True, [8]])
@pytest.mark.parametrize("name", ["hidden_size", "num_key_value_heads", "max_position_embeddings"])
def test_sizes_that_are_none(folder: Path, name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"has {name}: .*, expected a positive whole number"):
        written(folder, **{name: value})


def test_other_configs_that_are_none(folder: Path) -> None:
    with pytest.raises(ModelError, match="hidden_size 32, which is no multiple of its 5 attention heads"):
        written(folder, num_attention_heads=5)
    with pytest.raises(ModelError, match="has 1,000,000,000 layers"):
        written(folder, num_hidden_layers=10**9)
    with pytest.raises(ModelError, match=r"has model_type: \['llama'\], expected a name"):
        written(folder, model_type=["llama"])
    with pytest.raises(ModelError, match=r"its model_type is 'lama', which .* lacks .*did you mean 'llama'"):
        written(folder, model_type="lama")
    with pytest.raises(ModelError, match="expected int, got str"):
        written(folder, model_type="gptj", vocab_size="abc")
    with pytest.raises(ModelError, match="no causal language model can be built from this 'gptj' config"):
        written(folder, model_type="gptj", vocab_size=-8)
    with pytest.raises(ModelError, match="no causal language model can be built from this 'persimmon' config"):
        written(folder, model_type="persimmon", pad_token_id=1000)
    with pytest.raises(ModelError, match="has 4 attention heads, which is no multiple of its 3 key/value heads"):
        written(folder, num_key_value_heads=3)
    unread = "cannot be read as a config.json"
    for text, told in (("[]", "holds no config"), ("{", unread), ("[" * 100_000, unread)):
        (folder / "config.json").write_text(text, "utf-8")
        with pytest.raises(ModelError, match=told):
            structure_named(ModelConfig(model_name_or_path=str(folder)))


def test_names_that_lead_nowhere(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model 'llama-3-8'.*did you mean 'llama-3-8b'"):
        find_config("llama-3-8")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_config(str(folder))


def test_a_family_that_stands_in_no_table_is_built_and_that_is_told(folder: Path) -> None:
    values = AutoConfig.for_model("gptj", n_embd=32, n_layer=2, n_head=4, vocab_size=97, rotary_dim=4).to_dict()
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    told: list[str] = []
    found = structure_named(ModelConfig(model_name_or_path=str(folder)), told.append)
    assert (found.family, found.layers, found.hidden, found.fast) == ("gptj", 2, 32, False)
    assert found.by_path["transformer.h.1.attn.q_proj"].weights == 32 * 32
    assert told == ["gptj: a config alone does not tell its modules, so transformers builds them"]


def test_what_is_laid_out_otherwise_is_built(folder: Path) -> None:
    values = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 97}
    assert structure_from(values) is not None
    assert structure_from({**values, "add_cross_attention": True}) is None
    found = written(folder, **values, add_cross_attention=True)
    assert "transformer.h.0.crossattention" in found.by_path


@pytest.mark.parametrize("rope", ["rope_scaling", "rope_parameters"])
def test_positions_that_change_in_a_long_sequence(rope: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    long = {rope: {"rope_type": "longrope", "rope_theta": 10000.0, **factors}}
    sizes = {**LLAMA, "model_type": "phi3", "max_position_embeddings": 4096, "original_max_position_embeddings": 128}
    for changes in ({}, long):
        found = structure_from({**sizes, **changes})
        given = {key: value for key, value in {**sizes, **changes}.items() if key != "model_type"}
        assert found is not None
        assert found.context_length == usable_length(AutoConfig.for_model("phi3", **given))
    assert found.context_length == 128


@pytest.mark.parametrize("name", shape_names())
def test_a_shipped_shapes_context(name: str) -> None:
    values = dict(shape_values(name))
    found = structure_from(values)
    assert found is not None
    assert found.context_length == usable_length(AutoConfig.for_model(values.pop("model_type"), **values))
