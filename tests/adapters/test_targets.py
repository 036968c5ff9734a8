"""Which modules are chosen: as PEFT chooses them, and an error with near names where it would stay silent."""

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from reference.families import tiny_base, tiny_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, adapted_layers
from topwork.adapters.seen import seen_base
from topwork.adapters.targets import find_targets
from topwork.common.errors import AdapterError

CHOICES: dict[str, dict[str, Any]] = {
    "all linear layers": {"target_modules": "all-linear"},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "all but a regular expression": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "names": {"target_modules": ["q_proj", "up_proj"]},
    "endings": {"target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]},
    "whole paths": {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q|down)_proj"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "a list of layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "a layers pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "no layer at all means all": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "whole paths are asked for no layer": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"],
        "layers_to_transform": [0],
    },
    "a head": {"target_modules": ["q_proj", "lm_head"]},
    "a saved head": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "a saved block": {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 3}},
    "the first pattern that matches": {"target_modules": "all-linear", "rank_pattern": {"mlp.*": 2, "up_proj": 5}},
    "alphas": {"target_modules": "all-linear", "alpha_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 10}},
}


def chosen_here(family: str, choice: dict[str, Any], **values: Any) -> dict[str, tuple[int, float]]:
    """path -> (rank, scaling)."""
    model = tiny_base(family, **values).module
    Adapters(model).add("a", AdapterConfig(**{"r": 8, "lora_alpha": 16, **choice}))
    return {
        path: (layer.adapters["a"].lora_A.shape[0], layer.adapters["a"].scaling)
        for path, layer in adapted_layers(model).items()
        if hasattr(layer.adapters["a"], "lora_A")
    }


def chosen_by_peft(family: str, choice: dict[str, Any], **values: Any) -> dict[str, tuple[int, float]]:
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **choice})
    model = get_peft_model(tiny_model(family, **values), config).base_model.model
    return {
        path: (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


@pytest.mark.parametrize("name", CHOICES)
def test_the_same_modules_as_peft(name: str) -> None:
    here = chosen_here("llama", CHOICES[name], num_hidden_layers=3)
    assert here
    assert here == chosen_by_peft("llama", CHOICES[name], num_hidden_layers=3)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "phi", "cohere", "gpt_oss", "gemma3_text"])
def test_all_linear_in_other_families(family: str) -> None:
    choice = {"target_modules": "all-linear"}
    assert chosen_here(family, choice) == chosen_by_peft(family, choice)


def test_experts_in_one_tensor_are_left_out() -> None:
    """Mixtral's experts are no linear layers in transformers; PEFT alone has a way into them."""
    chosen = chosen_here("mixtral", {"target_modules": "all-linear"})
    assert chosen.keys() == {f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"}


def refused(family: str = "llama", **choice: Any) -> str:
    with pytest.raises(AdapterError) as error:
        Adapters(tiny_base(family).module).add("a", AdapterConfig(**choice))
    return str(error.value)


def test_a_target_that_matches_nothing_is_told_with_near_names() -> None:
    told = refused(target_modules=["q_prj"])
    assert "target_modules ['q_prj'] matches no module" in told
    assert "did you mean 'q_proj'" in told
    assert "down_proj, gate_proj, k_proj" in told
    assert "all-linear" in told


def test_one_name_of_many_that_matches_nothing_is_not_overlooked() -> None:
    told = refused(target_modules=["q_proj", "c_attn", "v_porj"])
    assert "'c_attn'" in told
    told = refused(target_modules=["q_proj", "v_porj"])
    assert "'v_porj', which matches no module; did you mean 'v_proj'" in told


def test_a_regular_expression_must_match_the_whole_path() -> None:
    assert ".*q_prj' matches no module" in refused(target_modules=r".*q_prj")
    assert "is no regular expression" in refused(target_modules="*.q_proj")


def test_a_target_that_is_no_linear_layer() -> None:
    told = refused(target_modules=["q_proj", "input_layernorm"])
    assert "'model.layers.0.input_layernorm', which is a norm" in told
    assert "modules_to_save" in told


def test_nothing_left() -> None:
    assert "left none of them" in refused(target_modules=["q_proj"], exclude_modules=["self_attn.q_proj"])
    assert "left none of them" in refused(target_modules=["q_proj"], layers_to_transform=[7])
    assert "left none of them" in refused(target_modules=["lm_head"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_an_idle_pattern_is_refused(field: str) -> None:
    told = refused(target_modules=["q_proj", "v_proj"], **{field: {"q_proj": 2, "qq_proj": 4}})
    assert f"{field} has 'qq_proj', which matches no target module; did you mean 'q_proj'" in told
    assert "matches no target module" in refused(target_modules=["q_proj"], **{field: {"v_proj": 2}})


def test_modules_to_save_that_match_nothing_or_too_much() -> None:
    told = refused(modules_to_save=["lm_haed"])
    assert "modules_to_save names 'lm_haed', which matches no module; did you mean 'lm_head'" in told
    told = refused(target_modules=["q_proj"], modules_to_save=["proj"])
    assert "modules_to_save chooses model.layers.0.self_attn.q_proj" in told
    told = refused(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"])
    assert "one module can't be both" in told


def test_a_base_without_linear_layers() -> None:
    with pytest.raises(AdapterError, match="matched 0 modules"):
        find_targets(seen_base({}, None, None, None), AdapterConfig())


@pytest.mark.parametrize("name", ["self_attn", "layers.0"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_mixes_tokens_cannot_be_saved_whole(family: str, name: str) -> None:
    """Each adapter's copy sees its own rows alone, and attention is no function of a row."""
    adapters = Adapters(tiny_base(family).module)
    with pytest.raises(AdapterError, match=r"mixes tokens.*name the modules in it \(.*mlp|o_proj"):
        adapters.add("a", AdapterConfig(target_modules=["lm_head"], modules_to_save=[name]))
    assert not adapted_layers(adapters.model)
