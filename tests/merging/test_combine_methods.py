"""The combined adapter, as PEFT reads its folder, is the formula on dense deltas; and identities that hold for all."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from merging.adapters_of import CASES, changes, dense, write_one
from reference.combining import Deltas, averaged, furthest, nearest, peft_deltas, slerped, weighted
from reference.families import alone, sequences, tiny_base, tiny_model
from topwork.adapters.graft import Adapters, bare_base
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter
from topwork.merging.combine import entrywise, masks
from topwork.merging.combine.driver import Combined, combine_changes
from topwork.merging.combine.request import settings_for
from topwork.merging.combine.result import folder_of, write_combined
from topwork.merging.combine.table import WAYS
from topwork.merging.deltas import LowRankDelta, inner, reduced, singular_values, weighted_sum
from topwork.ops.batch import batch_of

EXACT = 1e-5
MIXES = {
    "lora of unequal ranks, scales and targets": ("plain", "rslora", "patterns"),
    "with an embedding and a head": ("embedding", "head"),
    "with dora and ia3": ("plain", "dora", "ia3"),
    "with whole modules": ("saved", "plain", "head"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter for every case."""
    base, place = tiny_base(), tmp_path_factory.mktemp("sources")
    return {name: write_one(place / name, base, options, seed) for seed, (name, options) in enumerate(CASES.items())}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, Deltas]:
    """What PEFT makes of each."""
    return {name: peft_deltas(folder, tiny_model("llama")) for name, folder in folders.items()}


def combined(folders: Sequence[Path], method: str, **options: Any) -> Combined:
    base = tiny_base()
    sources = [changes(folder, base) for folder in folders]
    wanted = settings_for(method, [source.label for source in sources], **options)
    return combine_changes(sources, wanted, bare_base(base.module))


def written(found: Combined, out: Path) -> Path:
    folder = folder_of(found, bare_base(tiny_base().module), BaseId("tiny", "sha256:1"), torch.float32)
    write_combined(out, folder, {})
    return out


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("method", "options"),
    [("cat", {}), ("linear", {}), ("task-arithmetic", {"scale": 0.5})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sums_are_exact(
    mix: str, method: str, options: dict[str, Any], folders: dict[str, Path], references: dict[str, Deltas],
    tmp_path: Path,
) -> None:  # fmt: skip
    names = MIXES[mix]
    weights = [1.0, -0.5, 2.0][: len(names)]
    full = {"rank": 64} if "dora" in names else {}
    found = combined([folders[n] for n in names], method, weights=weights, **options, **full)
    sources = [references[n] for n in names]
    expected = averaged(sources, weights) if method == "linear" else weighted(sources, weights)
    expected = {name: options.get("scale", 1.0) * delta for name, delta in expected.items()}
    assert furthest(peft_deltas(written(found, tmp_path / "out"), tiny_model("llama")), expected) <= EXACT
    assert found.discarded <= 1e-12


def test_the_rank_of_a_sum_is_what_a_module_needs(folders: dict[str, Path]) -> None:
    found = combined([folders["plain"], folders["patterns"]], "cat")
    assert found.rank == 4 + 7
    assert {path.rpartition(".")[2]: delta.rank for path, delta in found.deltas.items()}["v_proj"] == 4


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_a_rank_gives_the_best_approximation_and_tells_what_it_leaves_out(
    method: str, folders: dict[str, Path], references: dict[str, Deltas], tmp_path: Path
) -> None:
    names, weights = ("plain", "rslora"), [1.0, -0.7]
    options = {} if method == "svd" else {"rank": 6}
    found = combined([folders[n] for n in names], method, weights=weights, **options)
    expected, lost = nearest(weighted([references[n] for n in names], weights), 6)
    assert found.rank == 6
    assert furthest(peft_deltas(written(found, tmp_path / "out"), tiny_model("llama")), expected) <= EXACT
    assert found.discarded == pytest.approx(lost, rel=1e-5)
    assert lost > 0.01


@pytest.mark.parametrize("mix", [("plain", "rslora"), ("plain", "dora"), ("saved", "head")])
def test_slerp_goes_along_the_arc(
    mix: tuple[str, str], folders: dict[str, Path], references: dict[str, Deltas], tmp_path: Path
) -> None:
    found = combined([folders[n] for n in mix], "slerp", weights=[3.0, 1.0], **({"rank": 64} if "dora" in mix else {}))
    expected = slerped(references[mix[0]], references[mix[1]], 0.25)
    assert furthest(peft_deltas(written(found, tmp_path / "out"), tiny_model("llama")), expected) <= EXACT


def test_tokens_rows_are_combined_as_rows(
    folders: dict[str, Path], references: dict[str, Deltas], tmp_path: Path
) -> None:
    options = {**CASES["tokens"], "trainable_token_indices": [17, 60]}
    other = write_one(tmp_path / "other", tiny_base(), options, 9)
    found = combined([folders["tokens"], other], "linear", weights=[3.0, 1.0])
    expected = averaged([references["tokens"], peft_deltas(other, tiny_model("llama"))], [3.0, 1.0])
    out = written(found, tmp_path / "out")
    assert furthest(peft_deltas(out, tiny_model("llama")), expected) <= EXACT
    assert read_adapter(out).config.trainable_token_indices == [5, 17, 40, 60]  # type: ignore[attr-defined]


def test_turned_weights(tmp_path: Path) -> None:
    base, model = tiny_base("gpt2"), tiny_model("gpt2")
    places = [
        write_one(tmp_path / n, base, {"r": 3, "target_modules": ["c_attn"]}, seed) for seed, n in enumerate("ab")
    ]
    wanted = settings_for("cat", ["a", "b"], [1.0, -1.0])
    found = combine_changes([changes(place, base) for place in places], wanted, bare_base(base.module))
    write_combined(tmp_path / "out", folder_of(found, bare_base(base.module), BaseId("tiny"), torch.float32), {})
    expected = weighted([peft_deltas(place, model) for place in places], [1.0, -1.0])
    assert furthest(peft_deltas(tmp_path / "out", model), expected) <= EXACT


@torch.no_grad()
def test_logits_of_ours_and_of_peft(folders: dict[str, Path], tmp_path: Path) -> None:
    out = written(combined([folders["plain"], folders["rslora"], folders["saved"]], "cat"), tmp_path / "out")
    base, batch = tiny_base(), batch_of(sequences(), "a")
    load_adapter(Adapters(base.module), "a", read_adapter(out), BaseId("tiny"))
    ours = base.logits(batch, torch.arange(len(batch.tokens)))
    theirs = alone(PeftModel.from_pretrained(tiny_model("llama"), str(out)).eval(), sequences())
    bare = alone(tiny_model("llama"), sequences())
    assert float((ours - theirs).abs().max()) <= EXACT * float(theirs.abs().max())
    assert float((bare - theirs).abs().max()) > 0.01 * float(theirs.abs().max())


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_pefts_own_sum_is_ours_where_it_is_right(method: str, tmp_path: Path) -> None:
    """Without rsLoRA and patterns."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]), "one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["one", "two"], [1.0, -0.5], "c", combination_type=method)
    model.set_adapter("c")
    found = combined([tmp_path / "one", tmp_path / "two"], method, weights=[1.0, -0.5])
    for path, delta in found.deltas.items():
        theirs = model.base_model.model.get_submodule(path).get_delta_weight("c").detach().double()
        assert float((delta.dense() - theirs).norm()) <= EXACT * float(theirs.norm())


ENTRYWISE = sorted(name for name, way in WAYS.items() if way.entrywise is not None)


def entrywise_reference(method: str, stacked: Tensor, path: str, contents: list[str]) -> Tensor:
    """The function itself, on what the driver is to give it."""
    weights, shares, by = (1.0, -0.5), (0.6, 0.4), [masks.generator(7, path, content) for content in contents]
    drawn = (masks.by_rank if method == "della" else masks.at_random)(stacked, shares, by)
    match method:
        case "ties":
            return entrywise.ties(stacked, weights, shares, "peft")
        case "dare":
            return entrywise.dare(stacked, weights, shares, drawn, "peft")
        case "dare-ties":
            return entrywise.dare_ties(stacked, weights, shares, drawn, "peft")
        case "della":
            return entrywise.della(stacked, weights, shares, drawn, "peft")
        case "breadcrumbs":
            return entrywise.breadcrumbs(stacked, weights, shares)
        case _:
            return entrywise.magnitude_prune(stacked, weights, shares)


@pytest.mark.parametrize("method", ENTRYWISE)
def test_entrywise_methods_see_dense_deltas_with_zeros_where_one_is_absent(
    method: str, folders: dict[str, Path]
) -> None:
    base = tiny_base()
    sources = [changes(folders[name], base) for name in ("plain", "rslora")]
    reads = WAYS[method].reads
    options = {name: value for name, value in (("ties_weights", "peft"), ("seed", 7)) if name in reads}
    found = combined(
        [folders["plain"], folders["rslora"]], method, weights=[1.0, -0.5], density=[0.6, 0.4], rank=64, scale=0.5,
        **options,
    )  # fmt: skip
    contents = [source.content for source in sources]
    for path, delta in found.deltas.items():
        stacked = torch.stack([source.delta(path).dense() if path in source.adapted else torch.zeros(delta.shape)
                               for source in sources]).float()  # fmt: skip
        expected = 0.5 * entrywise_reference(method, stacked, path, contents).double()
        assert float((delta.dense() - expected).norm()) <= EXACT * float(expected.norm()), path
    assert found.discarded <= 1e-12


@pytest.mark.parametrize("method", [name for name in WAYS if name != "slerp"])
def test_order_and_sources_of_weight_zero_do_not_matter(method: str, folders: dict[str, Path]) -> None:
    weights, names = [1.0, 2.0, 0.0], ["plain", "rslora", "patterns"]
    options: dict[str, Any] = {"density": [0.5, 0.6, 0.7]} if "density" in WAYS[method].reads else {}
    if method == "della":
        options["epsilon"] = 0.1
    found = combined([folders[n] for n in names], method, weights=weights, rank=64, **options)
    turned = {key: values[::-1] for key, values in options.items() if key == "density"}
    again = combined([folders[n] for n in names[::-1]], method, weights=weights[::-1], rank=64, **options | turned)
    without = {key: values[:2] for key, values in options.items() if key == "density"}
    two = combined([folders[n] for n in names[:2]], method, weights=weights[:2], rank=64, **options | without)
    for path, delta in two.deltas.items():
        for other in (found, again):
            assert float((other.deltas[path].dense() - delta.dense()).norm()) <= EXACT * delta.norm(), path


@pytest.mark.parametrize("method", [name for name in WAYS if name != "slerp"])
@pytest.mark.parametrize("case", ["plain", "saved"])
def test_one_adapter_is_itself(method: str, case: str, folders: dict[str, Path], references: dict[str, Deltas],
                               tmp_path: Path) -> None:  # fmt: skip
    """At a density of 1, where there is one, whatever the sign."""
    options: dict[str, Any] = {"density": [1.0]} if "density" in WAYS[method].reads else {}
    out = written(combined([folders[case]], method, **options), tmp_path / "out")
    if method == "knots":  # the SVD of one source's own directions
        assert furthest(peft_deltas(out, tiny_model("llama")), references[case]) <= 10 * EXACT
    assert furthest(peft_deltas(out, tiny_model("llama")), references[case]) <= 2 * EXACT


@st.composite
def low_rank(draw: st.DrawFn, rows: int, columns: int) -> LowRankDelta:
    """With factors of unlike size, some of fewer dimensions than they have columns."""
    rank, seed = draw(st.integers(1, 9)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(rows, rank, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    a = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        a[-1], b[:, -1] = a[0], b[:, 0]
    return LowRankDelta(b, a)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 12))
def test_factors_say_what_the_dense_matrix_says(data: st.DataObject, rows: int, columns: int) -> None:
    deltas = [data.draw(low_rank(rows, columns)) for _ in range(3)]
    weights = [1.0, -0.5, 0.0]
    total = weighted_sum(deltas, weights)
    assert isinstance(total, LowRankDelta)
    expected = sum((w * delta.dense() for w, delta in zip(weights, deltas)), torch.zeros(rows, columns).double())
    size = max(float(delta.norm()) for delta in deltas)
    assert float((total.dense() - expected).norm()) <= 1e-12 * size
    assert inner(deltas[0], deltas[1]) == pytest.approx(float((deltas[0].dense() * deltas[1].dense()).sum()),
                                                        abs=1e-12 * deltas[0].norm() * deltas[1].norm())  # fmt: skip
    sigma = torch.linalg.svdvals(expected)
    found = singular_values(total)[1]
    assert float((found[: len(sigma)] - sigma[: len(found)]).abs().max()) <= 1e-12 * size
    rank = data.draw(st.integers(1, 6))
    kept, lost = reduced(total, rank)
    assert kept.rank <= max(rank, total.rank if rank >= total.rank else rank)
    distance = float((kept.dense() - expected).square().sum())
    assert distance == pytest.approx(float(sigma[rank:].square().sum()), abs=1e-11 * size**2)
    assert lost == pytest.approx(distance, abs=1e-11 * size**2)


def test_seeds_draw_and_the_same_seed_draws_the_same(folders: dict[str, Path]) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        found = combined([folders["plain"], folders["rslora"]], "dare", seed=seed, rank=64)
        return {path: delta.dense() for path, delta in found.deltas.items()}

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[path], again[path]) for path in first)
    assert not any(torch.equal(first[path], other[path]) for path in first)


def test_the_folder_is_the_plainest_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    out = written(combined([folders["one layer by regex"], folders["rslora"]], "cat"), tmp_path / "out")
    saved = read_adapter(out)
    config = saved.config.model_dump()
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (8, 8, False, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(  # o_proj of layer 1 alone: whole paths
        [f"model.layers.{n}.{m}" for n in (0, 1) for m in ("mlp.down_proj", "self_attn.q_proj")]
        + ["model.layers.1.self_attn.o_proj"]
    )
    assert saved.base == BaseId("tiny", "sha256:1")
    assert {tensor.dtype for tensor in saved.tensors.values()} == {torch.float32}
    again = written(combined([folders["one layer by regex"], folders["rslora"]], "cat"), tmp_path / "again")
    assert (out / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()
    plain = dense(changes(out, tiny_base()))
    assert plain.keys() == {f"{path}.weight" for path in config["target_modules"]}


def test_dora_needs_no_more_than_its_own_modules_of_the_base(folders: dict[str, Path]) -> None:
    base = tiny_base()
    asked: list[str] = []
    source = changes(folders["dora"], base)
    read = source.base
    watched = replace(source, base=lambda name: (asked.append(name), read(name))[1])
    combine_changes([watched, changes(folders["plain"], base)], settings_for("cat", ["a", "b"]), bare_base(base.module))
    assert asked
    assert all(name.removesuffix(".weight") in watched.adapted for name in asked)
