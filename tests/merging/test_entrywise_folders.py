"""Entrywise methods from PEFT folders to a PEFT folder: ΔW as PEFT reads it, against the definitions on ΔW of the
sources as PEFT reads them; and what must not change a result."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from reference import entrywise as reference
from reference.measure import relative
from run.tiny import write_model
from topwork.common.errors import RequestError
from topwork.merging.combine import driver, entrywise, masks
from topwork.merging.combine.truncate import truncated
from topwork.run.combine import combine

SOURCES: dict[str, dict[str, Any]] = {
    "plain": {"r": 2, "lora_alpha": 3},
    "rslora": {"r": 3, "lora_alpha": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {"r": 2, "lora_alpha": 4, "rank_pattern": {"k_proj": 4}, "alpha_pattern": {"1.mlp.down_proj": 9}},
}  # fmt: skip
ORDERS = (("patterns", "rslora", "plain"), ("rslora", "patterns", "plain"))
FULL = 32
"""The hidden size: no module's rank is larger, so nothing is left out."""
STORED = 8 * 2.0**-24 * FULL**0.5
"""ΔW in fp32, as it is combined, and as PEFT multiplies the stored factors of 32 columns."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three adapters of it, which PEFT wrote."""
    place = tmp_path_factory.mktemp("combine")
    write_model(place / "base")
    for name, options in SOURCES.items():
        torch.manual_seed(len(name))
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False,
            **{"target_modules": ["q_proj", "k_proj", "down_proj"]} | options,
        )  # fmt: skip
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(place / "base"), config).save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def read(place: Path) -> Callable[[Path], dict[str, Tensor]]:
    """ΔW of every module that a folder adapts, as PEFT multiplies it, in fp64."""

    def deltas(folder: Path) -> dict[str, Tensor]:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), folder)
        return {
            name: module.double().get_delta_weight("default").detach()
            for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
        }  # fmt: skip

    return deltas


def made(place: Path, out: Path, sources: Sequence[str], method: str, **options: Any) -> dict[str, Any]:
    return combine([place / source for source in sources], out, method, log=lambda _: None, **options)


METHODS: dict[str, dict[str, Any]] = {
    "cat": {}, "linear": {}, "task-arithmetic": {"scale": 0.5}, "svd": {},
    "ties": {"density": [0.3]}, "magnitude-prune": {"density": [0.3]}, "breadcrumbs": {"density": [0.7], "gamma": 0.1},
    "dare": {"density": [0.6], "seed": 3}, "dare-ties": {"density": [0.6], "seed": 3},
    "della": {"density": [0.6], "epsilon": 0.2, "seed": 3}, "knots": {"density": [0.4]}, "slerp": {},
}  # fmt: skip


@pytest.mark.parametrize("convention", ["peft", "mergekit"])
def test_the_definitions_by_way_of_folders(
    convention: str, place: Path, read: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    weights, density = (0.7, 1.3, -0.4), (0.3, 0.5, 0.8)
    given = {name: read(place / name) for name in SOURCES}
    for method, definition in {"ties": reference.ties, "knots": reference.knots_ties}.items():
        made(
            place, tmp_path / method, list(SOURCES), method, weights=weights, density=density, rank=FULL,
            ties_weights=convention,
        )  # fmt: skip
        found = read(tmp_path / method)
        for module, delta in found.items():
            rows = [given[name].get(module, torch.zeros_like(delta)).tolist() for name in SOURCES]
            expected = torch.tensor(definition(rows, weights, density, convention), dtype=torch.float64)
            assert relative(delta, expected) < STORED, (method, module)
    assert len(found) == 6


@pytest.mark.parametrize("method", METHODS)
def test_neither_order_nor_a_weight_of_zero_changes_a_bit(method: str, place: Path, tmp_path: Path) -> None:
    weights = dict(zip(SOURCES, (0.7, 1.3, 0.4)))
    if method == "slerp":
        del weights["rslora"]
    first = made(place, tmp_path / "first", list(weights), method, weights=list(weights.values()), **METHODS[method])
    bits = load_file(tmp_path / "first" / "adapter_model.safetensors")
    for number, names in enumerate(ORDERS):
        order = [name for name in names if name in weights]
        out = tmp_path / str(number)
        record = made(place, out, order, method, weights=[weights[name] for name in order], **METHODS[method])
        again = load_file(out / "adapter_model.safetensors")
        assert again.keys() == bits.keys()
        assert all(torch.equal(again[key], bits[key]) for key in bits), order
        assert record["discarded_energy"] == first["discarded_energy"]

    if method == "slerp":  # it goes between two
        return
    two, with_zero = ["plain", "patterns"], ["plain", "rslora", "patterns"]
    made(place, tmp_path / "two", two, method, weights=[0.7, 0.4], **METHODS[method])
    made(place, tmp_path / "zero", with_zero, method, weights=[0.7, 0.0, 0.4], **METHODS[method])
    bits = load_file(tmp_path / "two" / "adapter_model.safetensors")
    again = load_file(tmp_path / "zero" / "adapter_model.safetensors")
    assert again.keys() == bits.keys()
    assert all(torch.equal(again[key], bits[key]) for key in bits)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"slerp"}))
def test_one_adapter_alone(method: str, place: Path, read: Callable[[Path], dict[str, Tensor]], tmp_path: Path) -> None:
    options = {name: value for name, value in METHODS[method].items() if name in ("epsilon", "gamma", "seed")}
    density = {"density": [1.0]} if "density" in METHODS[method] else {}
    record = made(place, tmp_path / "out", ["patterns"], method, **options, **density)
    found, expected = read(tmp_path / "out"), read(place / "patterns")
    for module, delta in expected.items():
        assert relative(found[module], delta) < STORED
    assert record["discarded_energy"]["overall"] < 1e-12


def test_a_rank_leaves_out_what_is_told(place: Path, read: Callable[[Path], dict[str, Tensor]], tmp_path: Path) -> None:
    record = made(place, tmp_path / "ties", ["plain", "rslora"], "ties", density=[0.3], rank=4, ties_weights="peft")
    given = {name: read(place / name) for name in ("plain", "rslora")}
    lost = total = 0.0
    for module, delta in read(tmp_path / "ties").items():
        stacked = torch.stack([given[name].get(module, torch.zeros_like(delta)) for name in ("plain", "rslora")])
        wanted = entrywise.ties(stacked, (1.0, 1.0), (0.3, 0.3), "peft")
        assert float((wanted - delta).square().sum()) == pytest.approx(truncated(wanted, 4)[2], rel=1e-4)
        lost += float((wanted - delta).square().sum())
        total += float(wanted.square().sum())
    assert record["discarded_energy"]["overall"] == pytest.approx(lost / total, rel=1e-4)
    assert 0.05 < lost / total < 0.9


def test_what_drops_of_a_source_is_the_same_in_any_company(
    place: Path, read: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    for name, sources in {"both": ["plain", "patterns"], "a": ["plain"], "b": ["patterns"]}.items():
        made(place, tmp_path / name, sources, "dare", density=[0.5], seed=5, rank=FULL, ties_weights="peft")
    both, a, b, given = (
        read(folder) for folder in (tmp_path / "both", tmp_path / "a", tmp_path / "b", place / "plain")
    )
    kept = {module: delta.abs() > 1e-6 * delta.abs().max() for module, delta in a.items()}
    share = torch.cat([mask.flatten() for mask in kept.values()]).double().mean()
    assert abs(float(share) - 0.5) < 0.05
    for module, mask in kept.items():
        assert relative(a[module], torch.where(mask, 2 * given[module], 0)) < STORED
        assert relative(both[module], a[module] + b[module]) < STORED
    first, second = (mask for module, mask in kept.items() if module.endswith("q_proj"))
    assert not torch.equal(first, second)


def test_a_matrix_that_is_too_large_is_refused_by_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LARGEST_DENSE", 32 * 48 - 1)
    for method in ("ties", "dare", "della", "breadcrumbs"):
        with pytest.raises(RequestError, match=r"down_proj has 1,536, more than fit \(1,535\); take cat"):
            made(place, tmp_path / "out", ["plain", "patterns"], method)
    assert not (tmp_path / "out").exists()
    made(place, tmp_path / "out", ["plain", "patterns"], "knots")


def test_random_methods_by_way_of_folders(
    place: Path, read: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    """With the masks that the record lets anybody draw again: of the seed, the module and the source's content."""
    names, weights, density = ("plain", "patterns"), (0.7, 1.3), (0.4, 0.6)
    given = [read(place / name) for name in names]
    for method in ("dare", "dare-ties", "della"):
        options = {"epsilon": 0.25} if method == "della" else {}
        record = made(
            place, tmp_path / method, names, method, weights=weights, density=density, rank=FULL, seed=3, **options
        )
        contents = [source["content"] for source in record["sources"]]
        for module, delta in read(tmp_path / method).items():
            stacked, path = torch.stack([own[module] for own in given]), module.removeprefix("base_model.model.")
            by = [masks.generator(3, path, content) for content in contents]
            if method == "della":
                kept = masks.by_rank(stacked.float(), density, by, 0.25)
                expected = reference.della(stacked.tolist(), weights, density, kept.tolist(), "mergekit", 0.25)
            else:
                kept = masks.at_random(stacked, density, by)
                definition = reference.dare if method == "dare" else reference.dare_ties
                expected = definition(stacked.tolist(), weights, density, kept.tolist(), "mergekit")
            assert relative(delta, torch.tensor(expected, dtype=torch.float64)) < STORED, (method, module)
