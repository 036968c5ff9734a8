"""What does not go together is refused by name, and what is asked for wrongly too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.adapters_of import changes, write_one
from reference.families import tiny_base
from topwork.adapters.graft import bare_base
from topwork.common.errors import AdapterError, RequestError
from topwork.merging.changes import Changes
from topwork.merging.combine.driver import Combined, combine_changes
from topwork.merging.combine.request import settings_for
from topwork.merging.combine.table import WAYS


def sources(place: Path, *options: dict[str, Any]) -> list[Changes]:
    base = tiny_base()
    return [changes(write_one(place / f"s{at}", base, each, at), base) for at, each in enumerate(options)]


def combined(found: list[Changes], method: str = "cat", **options: Any) -> Combined:
    wanted = settings_for(method, [source.label for source in found], **options)
    return combine_changes(found, wanted, bare_base(tiny_base().module))


def test_a_module_in_one_that_is_whole(tmp_path: Path) -> None:
    found = sources(
        tmp_path, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, {"target_modules": ["up_proj"]}
    )
    with pytest.raises(AdapterError, match=r"s0 trained model\.layers\.0\.mlp whole and s1 changes .*up_proj in it"):
        combined(found)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tokens_rows_beside_a_change_of_all_rows(target: str, tmp_path: Path) -> None:
    base = tiny_base("qwen2", tie_word_embeddings=True)
    options = ({"target_modules": ["q_proj"], "trainable_token_indices": [5]}, {"target_modules": [target]})
    found = [changes(write_one(tmp_path / f"s{at}", base, each, at), base) for at, each in enumerate(options)]
    with pytest.raises(AdapterError, match=rf"s0 trained some tokens' rows .* and s1 changes all of .*{target}"):
        combine_changes(found, settings_for("cat", ["s0", "s1"]), bare_base(base.module))


@pytest.mark.parametrize("method", [name for name, way in WAYS.items() if way.meets])
def test_nothing_in_common(method: str, tmp_path: Path) -> None:
    found = sources(tmp_path, {"target_modules": ["q_proj"]}, {"target_modules": ["o_proj"]})
    with pytest.raises(AdapterError, match=rf"s0 changes q_proj; s1 changes o_proj\), and {method} compares"):
        combined(found, method)
    assert len(combined(found).deltas) == 4


def test_a_rank_that_no_module_has(tmp_path: Path) -> None:
    found = sources(tmp_path, {"r": 2, "target_modules": ["q_proj", "k_proj"]})
    with pytest.raises(RequestError, match="--rank 65 is over 64"):
        combined(found, rank=65)
    whole = combined(found, rank=64)
    assert whole.rank == 64
    assert max(delta.rank for delta in whole.deltas.values()) == 2


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    [source] = sources(tmp_path, {"r": 2, "target_modules": ["q_proj"]})
    file = tmp_path / "s0" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = max(tensors)
    tensors[key][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=rf"s0 holds NaN or infinite values \(1 tensors, first {key[17:]}\)"):
        changes(tmp_path / "s0", tiny_base())
    with pytest.raises(RequestError, match=r"the combined change of .* is not finite"):
        combined([source], weights=[1e300])


@pytest.mark.parametrize(
    ("method", "count", "options", "told"),
    [
        ("tise", 2, {}, "--method tise is not known; .*did you mean 'ties'"),
        ("cat", 2, {"weights": [1.0]}, "--weights gives 1 numbers for 2 adapters"),
        ("cat", 2, {"weights": [0.0, 0.0]}, "--weights are all zero"),
        ("cat", 1, {"weights": [float("nan")]}, "every number has to be finite"),
        ("cat", 2, {"density": [0.5]}, "--density says nothing to --method cat; .*ties"),
        ("cat", 2, {"seed": 3}, "--seed says nothing to --method cat; .*dare, dare-ties, della"),
        ("ties", 2, {"density": [1.5]}, "--density 1.5: .*over 0 and at most at 1"),
        ("ties", 2, {"density": [0.0]}, "--density 0: "),
        ("ties", 2, {"density": [0.5, 0.5, 0.5]}, "--density gives 3 numbers for 2 adapters"),
        ("ties", 2, {"ties_weights": "pefft"}, "--ties-weights pefft: .*did you mean 'peft'"),
        ("breadcrumbs", 2, {"gamma": 1.0}, "--gamma 1: "),
        ("slerp", 3, {}, "slerp goes between 2 adapters, and 3 were given"),
        ("slerp", 1, {}, "slerp goes between 2 adapters, and 1 were given"),
        ("linear", 2, {"weights": [1.0, -1.0]}, "--weights 1,-1 sum to zero, and linear divides by the sum"),
        ("slerp", 2, {"weights": [1.0, -1.0]}, "--weights 1,-1: slerp goes from the first source"),
        ("slerp", 2, {"weights": [2.0, -1.0]}, "--weights 2,-1: slerp goes from the first source"),
        ("cat", 0, {}, "no adapter was given"),
        ("cat", 2, {"rank": 0}, "--rank 0"),
    ],
)
def test_requests(method: str, count: int, options: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        settings_for(method, [f"s{at}" for at in range(count)], **options)
