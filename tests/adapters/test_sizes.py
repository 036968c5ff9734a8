"""What an adapter trains, told by a base's config alone: against PEFT's own count, and against what is grafted."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, PreTrainedModel

from adapters.toy import ToyConfig
from models.test_structures import tiny_values
from reference.families import tiny_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, bare_base, plan_adapter
from topwork.adapters.methods.places import ia3_targets
from topwork.adapters.sizes import SIZES, tensor_sizes, trained_sizes
from topwork.common.errors import AdapterError
from topwork.models.config_files import shape_names
from topwork.models.skeleton import skeleton
from topwork.models.structure import Structure
from topwork.models.structures.build import structure_from
from topwork.models.structures.table import FAMILIES
from topwork.plan.count import targets_of

SETS = ("q,v", "q,k,v,o", "mlp", "all-linear")
OTHER_BIASES = {"gemma3": 32, "gpt_oss": 8}
"""Of the convolution that takes a picture apart, and of routers, which are no linear layers."""
NO_PREFIX, NO_IA3 = {"deepseek_v3"}, {"mixtral", "qwen3_moe", "gpt_oss", "olmoe", "deepseek_v3"}
"""Families that are refused by name: keys and values that are not of one shape, and no last layer of an MLP."""


def tiny_structure(family: str, **values: Any) -> Structure:
    structure = structure_from({**tiny_values(family), **values})
    assert structure is not None
    return structure


def tiny_skeleton(family: str) -> PreTrainedModel:
    values = tiny_values(family)
    return skeleton(AutoConfig.for_model(values.pop("model_type"), **values))


def by_peft(bare: PreTrainedModel, config: PeftConfig) -> tuple[int, int]:
    """(trainable, all) as PEFT counts them."""
    with torch.device("meta"):
        model = get_peft_model(copy.deepcopy(bare), config)
    trainable, everything = model.get_nb_trainable_parameters()
    return trainable, everything


def loras(base: Structure) -> dict[str, dict[str, Any]]:
    """Options that PEFT and we call alike."""
    embedding = str(base.embedding).rpartition(".")[2]
    sets = {name: targets for name in SETS if (targets := targets_of(base, name))}
    attention = sets["q,k,v,o"]
    return {
        **{f"targets {name}": {"target_modules": targets} for name, targets in sets.items()},
        "dora": {"use_dora": True, "target_modules": attention},
        "rslora": {"use_rslora": True, "target_modules": attention, "rank_pattern": {attention[0]: 2}},
        "one layer": {"target_modules": attention, "layers_to_transform": [1]},
        "saved": {"target_modules": attention, "modules_to_save": ["lm_head", embedding]},
        "an embedding": {"target_modules": [embedding]},
        "tokens": {"target_modules": attention, "trainable_token_indices": [1, 5]},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_and_its_kin_train_what_peft_trains(family: str) -> None:
    base, bare = tiny_structure(family), tiny_skeleton(family)
    for name, options in loras(base).items():
        trained = sum(trained_sizes(base, AdapterConfig(r=3, **options)).values())
        theirs = by_peft(bare, LoraConfig(task_type="CAUSAL_LM", r=3, **options))
        assert (trained, trained + base.parameters) == theirs, name


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_beside_lora_are_those_that_peft_trains(family: str) -> None:
    """They are the base's own there, and no more of them; ours are others."""
    base, bare = tiny_structure(family), tiny_skeleton(family)
    names = targets_of(base, "q,k,v,o")
    for options in ({"bias": "all", "lora_bias": True}, {"bias": "lora_only", "use_dora": True}):
        trained = sum(trained_sizes(base, AdapterConfig(r=3, target_modules=names, **options)).values())
        theirs = by_peft(bare, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=names, **options))
        more = OTHER_BIASES.get(family, 0) if options["bias"] == "all" else 0
        assert trained == theirs[0] - more, options


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_methods_train_what_peft_trains(family: str) -> None:
    base, bare = tiny_structure(family), tiny_skeleton(family)
    wanted: list[tuple[AdapterConfig, PeftConfig]] = [
        (
            AdapterConfig(method="prompt", num_virtual_tokens=5),
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        )
    ]
    if family not in NO_PREFIX:
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        wanted.append((AdapterConfig(method="prefix", num_virtual_tokens=5), prefix))
    if family not in NO_IA3:
        config = AdapterConfig(method="ia3")
        targets = ia3_targets(base, config)  # type: ignore[arg-type]
        last = [path for path, scales_inputs in targets.items() if scales_inputs]
        theirs = IA3Config(task_type="CAUSAL_LM", target_modules=list(targets), feedforward_modules=last)
        wanted.append((config, theirs))
    for ours, theirs in wanted:
        trained = sum(trained_sizes(base, ours).values())
        assert (trained, trained + base.parameters) == by_peft(bare, theirs), ours.method


@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_does_not_have(family: str) -> None:
    """Full fine-tuning trains every parameter, BitFit every bias; or both bases refuse in the same words."""
    base, bare = tiny_structure(family), tiny_skeleton(family)
    biases = {name: p.numel() for name, p in bare.named_parameters() if name.endswith(".bias")}
    held = {name.rpartition(".")[0] for name in biases} - {p for p, m in base.by_path.items() if m.kind == "other"}
    assert_same(base, bare, AdapterConfig(method="full"), base.parameters)
    assert_same(base, bare, AdapterConfig(method="bitfit"), sum(biases[f"{path}.bias"] for path in held))


def assert_same(base: Structure, bare: PreTrainedModel, config: AdapterConfig, expected: int | None = None) -> None:
    planned, refused = answer(lambda: {path: part.trained for path, part in plan_adapter(bare, config).items()})
    assert answer(lambda: trained_sizes(base, config)) == (planned, refused)
    assert refused or expected is None or sum(planned.values()) == expected


def answer(ask: Callable[[], dict[str, int]]) -> tuple[dict[str, int], str]:
    """What is told, or in which words it is refused."""
    try:
        return ask(), ""
    except AdapterError as error:
        return {}, str(error)


GRAFTED: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "patterns": {"r": 3, "rank_pattern": {"c_attn": 2, r"h\.1\.mlp\.c_proj": 5}, "exclude_modules": ["c_fc"]},
    "dora": {"r": 3, "use_dora": True, "modules_to_save": ["ln_f"]},
    "embedding": {"r": 3, "target_modules": ["wte", "c_fc"]},
    "tokens": {"r": 3, "target_modules": ["c_fc"], "trainable_token_indices": [4, 2, 9]},
    "pissa": {"r": 3, "init_lora_weights": "pissa"},
    "vera": {"method": "vera", "r": 5, "modules_to_save": ["ln_f"]},
    "loha": {"method": "loha", "r": 3},
    "lokr": {"method": "lokr", "r": 2, "decompose_both": True},
    "lokr, whole": {"method": "lokr", "r": 8, "target_modules": ["c_attn"], "layers_to_transform": [1]},
    "oft": {"method": "oft", "r": 7},
    "oft, shared": {"method": "oft", "oft_block_size": 8, "block_share": True},
    "ia3": {"method": "ia3"},
    "ia3, names": {"method": "ia3", "target_modules": ["c_fc", "attn.c_proj"], "feedforward_modules": ["c_fc"]},
    "prefix": {"method": "prefix", "num_virtual_tokens": 4},
    "prompt": {"method": "prompt", "num_virtual_tokens": 4},
    "bitfit": {"method": "bitfit"},
    "bitfit, names": {"method": "bitfit", "target_modules": ["ln_1", "c_fc"], "layers_to_transform": [0]},
    "full": {"method": "full"},
    "full, but some": {"method": "full", "exclude_modules": ["ln_1", "lm_head"]},
}


@pytest.mark.parametrize("name", GRAFTED)
def test_every_tensor_that_is_grafted(name: str) -> None:
    model, config = tiny_model("gpt2"), AdapterConfig(**GRAFTED[name])
    sizes = tensor_sizes(tiny_structure("gpt2"), config)
    assert {path: sum(own) for path, own in sizes.items()} == {
        path: planned.trained for path, planned in plan_adapter(model, config).items()
    }
    adapters = Adapters(model)
    adapters.add("a", config)
    grafted = [parameter.numel() for parameter in adapters.parameters("a").values()]
    assert sorted(size for own in sizes.values() for size in own) == sorted(grafted)


REFUSED: dict[str, dict[str, Any]] = {
    "no such name": {"target_modules": ["q_prj"]},
    "no linear layer": {"target_modules": ["norm"]},
    "no such layer": {"target_modules": ["q_proj"], "layers_to_transform": [9]},
    "an idle pattern": {"rank_pattern": {"q_prj": 3}},
    "a rank without directions": {"r": 4096, "init_lora_weights": "pissa"},
    "nothing to save": {"modules_to_save": ["lm_haed"]},
    "attention saved": {"target_modules": ["lm_head"], "modules_to_save": ["self_attn"]},
    "saved and chosen": {"modules_to_save": ["q_proj", "mlp"], "target_modules": ["q_proj", "up_proj"]},
    "no such token": {"trainable_token_indices": [9999]},
    "a token twice": {"trainable_token_indices": [3, 3]},
    "tokens and their embedding": {"target_modules": ["embed_tokens"], "trainable_token_indices": [3]},
    "an embedding's lengths": {"target_modules": ["embed_tokens"], "use_dora": True},
    "no biases": {"method": "bitfit"},
    "idle feedforward modules": {"method": "ia3", "feedforward_modules": ["fc9"]},
    "nothing left": {"method": "full", "exclude_modules": r".*"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_told_in_the_same_words(name: str) -> None:
    base, config = tiny_structure("llama"), AdapterConfig(**REFUSED[name])
    with pytest.raises(AdapterError):
        trained_sizes(base, config)
    assert_same(base, tiny_skeleton("llama"), config)


def test_a_tied_head_has_nothing_of_its_own() -> None:
    base = tiny_structure("llama", tie_word_embeddings=True)
    assert base.tied
    tokens = AdapterConfig(target_modules=["q_proj"], trainable_token_indices=[3, 50])
    assert trained_sizes(base, tokens)["lm_head"] == 0
    assert sum(trained_sizes(base, AdapterConfig(method="full")).values()) == base.parameters


def test_every_method_and_no_other() -> None:
    from topwork.adapters.methods.table import METHODS

    assert SIZES.keys() == METHODS.keys()
    with pytest.raises(AdapterError, match="how much method toy trains is not known here"):
        trained_sizes(tiny_structure("llama"), ToyConfig())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_memory_is_seen_as_its_config_tells(family: str) -> None:
    told, seen = tiny_structure(family), bare_base(tiny_skeleton(family)).seen
    fields = ("kind", "bias", "tensors", "attends", "by_row")
    assert {path: [getattr(module, field) for field in fields] for path, module in seen.by_path.items()} == {
        path: [getattr(module, field) for field in fields] for path, module in told.by_path.items()
    }
    sized = [path for path, module in told.by_path.items() if module.kind in ("linear", "embedding")]
    for path in sized:
        ours, theirs = told.by_path[path], seen.by_path[path]
        assert (ours.rows, ours.columns) == (theirs.rows, theirs.columns)
    assert (seen.embedding, seen.head, seen.tied) == (told.embedding, told.head, told.tied)


WITHOUT_TORCH = """
import sys
from topwork.adapters.config import AdapterConfig
from topwork.adapters.sizes import trained_sizes
from topwork.models.config import ModelConfig
from topwork.plan.base import structure_named
from topwork.run.count import count

methods = [dict(r=4), dict(method="ia3"), dict(method="prefix"), dict(method="prompt"), dict(method="full")]
for name in sys.argv[1:]:
    base = structure_named(ModelConfig(model_name_or_path=name))
    for options in methods:
        assert trained_sizes(base, AdapterConfig(**options))
    assert count(name, ranks=[4]).table
loaded = {"torch", "transformers", "datasets"} & sys.modules.keys()
assert not loaded, loaded
"""


def test_shipped_shapes_are_counted_without_torch() -> None:
    run = [sys.executable, "-c", WITHOUT_TORCH, *shape_names()]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
