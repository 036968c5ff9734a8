"""A base's structure from its config alone against the same from transformers' modules, family by family."""

import dataclasses
from typing import Any

import pytest
from transformers import AutoConfig

from reference.families import OWN, SIZES
from topwork.models.config_files import shape_names, shape_values
from topwork.models.probe import PROVEN
from topwork.models.skeleton import skeleton
from topwork.models.structure import Structure
from topwork.models.structure_of import structure_of
from topwork.models.structures.build import structure_from
from topwork.models.structures.table import FAMILIES

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
    return structure_of(model, fast=FAMILIES[values["model_type"]].fast)


def tiny_values(family: str) -> dict[str, Any]:
    known = AutoConfig.for_model(family).to_dict()
    fitting = {key: value for key, value in SIZES.items() if key in known}
    return {"model_type": family, **fitting, **OWN.get(family, {})}


def assert_same(found: Structure | None, expected: Structure) -> None:
    assert found is not None
    for ours, theirs in zip(found.modules, expected.modules):
        assert ours == theirs
    for field in dataclasses.fields(Structure):
        if field.compare:
            assert getattr(found, field.name) == getattr(expected, field.name), field.name


def test_every_family_that_is_proven_or_probed_stands_in_the_table() -> None:
    assert {*PROVEN, *OWN} - REFUSED <= FAMILIES.keys()
    assert {shape_values(name)["model_type"] for name in shape_names()} <= FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model(family: str) -> None:
    values = tiny_values(family)
    assert_same(structure_from(values), built(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_the_class_gives(family: str) -> None:
    """Every default of the table: the config states the sizes alone that it has to state."""
    known = AutoConfig.for_model(family).to_dict()
    values = {"model_type": family, **{key: value for key, value in STATED.items() if key in known}}
    assert_same(structure_from(values), built(values))


@pytest.mark.parametrize("name", shape_names())
def test_a_shipped_shape(name: str) -> None:
    values = dict(shape_values(name))
    assert_same(structure_from(values), built(values))
