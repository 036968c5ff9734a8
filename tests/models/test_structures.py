"""A base's structure from its config alone against the same from transformers' modules, family by family."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.activations import ACT2FN

from reference import families
from reference.families import OWN, PICTURES, tiny_base
from topwork.common.errors import ModelError
from topwork.models.config_files import shape_names, shape_values
from topwork.models.layer_parts import ACTIVATIONS
from topwork.models.proven import PROVEN
from topwork.models.recognise import is_fast
from topwork.models.skeleton import skeleton
from topwork.models.structure import Structure
from topwork.models.structure_of import structure_of
from topwork.models.structures.build import FAST_ACTIVATIONS, structure_from
from topwork.models.structures.table import FAMILIES, TEXT_PARTS, WRAPPERS

REFUSED = {"lfm2", "mamba", "qwen3_next"}
"""Of reference/families.py, but no base that can be trained."""

STATED = {
    "vocab_size": 211, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 32, "intermediate_size": 96,
    "n_embd": 256, "n_layer": 2, "n_head": 32, "ffn_dim": 96, "pad_token_id": None,
}  # fmt: skip


def built(values: dict[str, Any]) -> Structure:
    """Through transformers."""
    given = dict(values)
    model = skeleton(AutoConfig.for_model(given.pop("model_type"), **given))
    return structure_of(model, fast=_runs_fast(values["model_type"]))


def _runs_fast(family: str) -> bool:
    return FAMILIES[family].fast if family in FAMILIES else True  # all text parts here do


def tiny_values(family: str) -> dict[str, Any]:
    return {"model_type": family, **families.tiny_values(family)}


def assert_same(found: Structure | None, expected: Structure) -> None:
    assert found is not None
    for ours, theirs in zip(found.modules, expected.modules):
        assert ours == theirs
    for field in dataclasses.fields(Structure):
        if field.compare:
            assert getattr(found, field.name) == getattr(expected, field.name), field.name


def test_every_family_that_is_proven_or_probed_stands_in_the_table() -> None:
    assert {*PROVEN, *OWN} - REFUSED <= FAMILIES.keys() | TEXT_PARTS.keys()
    assert PICTURES.keys() == WRAPPERS.keys()
    assert {shape_values(name)["model_type"] for name in shape_names()} <= FAMILIES.keys()


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
def test_a_tiny_model(family: str) -> None:
    values = tiny_values(family)
    assert_same(structure_from(values), built(values))


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
def test_what_a_config_leaves_out_is_what_the_class_gives(family: str) -> None:
    """Every default of the table: the config states the sizes alone that it has to state."""
    known = AutoConfig.for_model(family).to_dict()
    stated = {key: value for key, value in STATED.items() if key in known}
    if family in WRAPPERS:
        layers = "depth" if family.startswith("qwen") else "num_hidden_layers"
        stated = {"text_config": {"hidden_size": 256, "num_hidden_layers": 2}, "vision_config": {layers: 1}}
        if family == "qwen2_5_vl":
            stated["vision_config"] |= {"fullatt_block_indexes": [0]}
    values = {"model_type": family, **stated}
    assert_same(structure_from(values), built(values))


@pytest.mark.parametrize("name", shape_names())
def test_a_shipped_shape(name: str) -> None:
    values = dict(shape_values(name))
    assert_same(structure_from(values), built(values))


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": None, "head_dim": None}),
    ("llama", {"head_dim": 24, "torch_dtype": "bfloat16"}),
    ("qwen2", {"num_key_value_heads": None, "dtype": "float16"}),
    ("qwen3", {"attention_bias": True, "head_dim": 32}),
    ("gemma2", {"tie_word_embeddings": False}),
    ("gemma3_text", {"attention_bias": True}),
    ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    ("qwen2_moe", {"mlp_only_layers": [0], "shared_expert_intermediate_size": 40}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("gpt_oss", {"attention_bias": False}),
    ("deepseek_v3", {"q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 0}),
    ("gpt2", {"n_inner": None, "tie_word_embeddings": False}),
    ("gpt2", {"n_inner": 40}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("opt", {"_remove_final_layer_norm": True, "word_embed_proj_dim": None}),
    ("phi", {"qk_layernorm": True, "tie_word_embeddings": True}),
    ("bloom", {"hidden_size": 32, "n_embed": 64}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"multi_query": False, "parallel_attn": False, "ffn_hidden_size": 96, "alibi": False}),
    ("gemma3", {"tie_word_embeddings": False}),
    ("mistral3", {"tie_word_embeddings": False, "spatial_merge_size": 1, "multimodal_projector_bias": True}),
    ("llava", {"vision_feature_layer": [-2, -1], "multimodal_projector_bias": False}),
    ("llava", {"text_config": {"model_type": "qwen2", **families.tiny_values("qwen2")}}),
    ("llava", {"text_config": {"model_type": "llama", "tie_word_embeddings": True}, "dtype": "float16"}),
    ("qwen2_vl", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_what_a_family_may_have(family: str, changes: dict[str, Any]) -> None:
    values = {**tiny_values(family), **changes}
    assert_same(structure_from(values), built(values))


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
def test_which_families_run_fast(family: str) -> None:
    found = structure_from(tiny_values(family))
    assert found is not None
    try:
        base = tiny_base(family)
    except ModelError:
        assert not found.fast  # refused, so never run
    else:
        assert found.fast == is_fast(base.module)


def test_other_activations_are_not_fast() -> None:
    x = torch.linspace(-6, 6, 101)
    known = {name for name in ACT2FN if any(map(partial(same_values, name, x), ACTIVATIONS.values()))}
    assert known - {"gelu_10"} == FAST_ACTIVATIONS  # that one is cut off further out
    assert not structure_from({**tiny_values("llama"), "hidden_act": "relu"}).fast  # type: ignore[union-attr]
    assert not is_fast(tiny_base(hidden_act="relu").module)


def same_values(name: str, x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    try:
        return torch.allclose(ACT2FN[name](x), function(x))
    except TypeError:  # xIELU wants its parameters' type
        return False


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_an_older_config_that_holds_the_text_parts_values_itself(family: str) -> None:
    values = tiny_values(family)
    flat = {**values.pop("text_config"), **values}
    assert_same(structure_from(flat), built(flat))


def test_what_stands_in_no_table_is_left_to_a_skeleton() -> None:
    values = tiny_values("llava")
    assert structure_from({**values, "vision_config": {"model_type": "siglip_vision_model"}}) is None
    assert structure_from({**values, "text_config": {"model_type": "mistral"}}) is None, "its sizes are its class's"
    with pytest.raises(ModelError, match="says nothing of text_config"):
        structure_from({"model_type": "gemma3"})


@pytest.mark.parametrize("family", WRAPPERS)
def test_text_goes_through_its_part_alone(family: str) -> None:
    found = structure_from(tiny_values(family))
    assert found is not None
    assert found.text == "model.language_model"
    assert found.checkpointable == found.layers == 2
    assert any(module.kind == "linear" for module in found.beside.values())
    assert not any(path.startswith("model.language_model.") for path in found.beside)
    assert len(found.by_path) + len(found.beside) == len(found.modules)
