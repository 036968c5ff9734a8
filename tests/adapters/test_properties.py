"""What must hold for every adapter method: each property over all rows of `sheet.py`."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.sheet import ROWS, Row
from adapters.toy import WITH_TOY
from reference.families import chosen_labels, learning_batch, logits, randomise, sequences, tiny_base, tiny_model
from reference.measure import GRADIENTS_APART, LOGITS_APART, relative
from reference.quantized_by_others import write_base
from topwork.adapters.fitting import freeze, held_bytes
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError
from topwork.merging.merge import dequantize, merge
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.held import held_for_inference
from topwork.models.load import as_base, load_base
from topwork.models.source import find_source
from topwork.models.weights import original_weight
from topwork.ops import logprobs
from topwork.ops.batch import Batch, Segment, batch_of
from topwork.quantization.config import QuantizationConfig

pytestmark = pytest.mark.slow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NF4 = QuantizationConfig(load_in_4bit=True)
ALL = list(ROWS)
DENSE = [name for name, row in ROWS.items() if row.dense]
QUANTIZED = [name for name, row in ROWS.items() if row.quantized]
Bases = Callable[..., tuple[Base, Adapters]]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """bases(row, dtype="float32", nf4=False): a fresh base of a row's family, and its adapters, none yet."""
    folders: dict[str, Path] = {}

    def load(row: Row, dtype: str = "float32", nf4: bool = False) -> tuple[Base, Adapters]:
        if not (nf4 or not row.dense):
            base = tiny_base(row.family, DTYPES[dtype], **row.values)
            return base, Adapters(base.module, methods=WITH_TOY)
        name = f"{row.family} {row.values}"
        if name not in folders:
            folders[name] = write_base(tmp_path_factory.mktemp("base") / "base", row.family, **row.values)
        config = ModelConfig.model_validate({"model_name_or_path": str(folders[name]), "dtype": dtype, "device": "cpu"})
        base = load_base(config, lambda _: None, NF4)
        source = find_source(config, lambda _: None)
        return base, Adapters(base.module, base.tokenizer, original_weight(source, base.module), WITH_TOY)

    return load


def trained(bases: Bases, row: Row, seed: int = 0, **where: Any) -> tuple[Base, Adapters]:
    """A base with the row's adapter `a`, its weights no longer the first."""
    base, adapters = bases(row, **where)
    adapters.add("a", row.config, seed)
    randomise(adapters, "a", seed)
    return base, adapters


def by_sequence(batch: Batch, names: Iterable[str | None]) -> Batch:
    """Each sequence a segment of its own."""
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    return replace(batch, segments=tuple(Segment(a, b, name) for (a, b), name in zip(spans, names, strict=True)))


def gradients(base: Base, adapters: Adapters, batch: Batch, name: str = "a") -> dict[str, Tensor]:
    parameters = adapters.parameters(name)
    loss = (-batch.labels.loss_weights * base.log_probabilities(batch, -batch.labels.loss_weights)).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(parameters.items(), found)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in DENSE if ROWS[name].fresh is not None])
def test_a_fresh_adapter_is_the_base(name: str, dtype: str, bases: Bases) -> None:
    row = ROWS[name]
    base, adapters = bases(row, dtype)
    before = logits(base, batch_of(sequences()))
    adapters.add("a", row.config)
    fresh = logits(base, batch_of(sequences(), "a"))
    allowed = row.fresh_bf16 if dtype == "bfloat16" else row.fresh
    assert relative(fresh, before) < allowed if allowed else torch.equal(fresh, before)
    randomise(adapters, "a")
    assert relative(logits(base, batch_of(sequences(), "a")), before) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in QUANTIZED if ROWS[name].fresh is not None])
def test_a_fresh_adapter_is_the_quantized_base(name: str, dtype: str, bases: Bases) -> None:
    row = ROWS[name]
    base, adapters = bases(row, dtype, nf4=True)
    before = logits(base, batch_of(sequences()))
    adapters.add("a", row.config)
    fresh = logits(base, batch_of(sequences(), "a"))
    allowed = row.fresh_bf16 if dtype == "bfloat16" else row.fresh
    assert relative(fresh, before) < allowed if allowed else torch.equal(fresh, before)


@pytest.mark.parametrize("name", ALL)
def test_only_its_parameters_train_and_off_is_the_base(name: str, bases: Bases) -> None:
    base, adapters = bases(ROWS[name])
    modules, before = dict(base.module.named_modules()), logits(base, batch_of(sequences()))
    weights = {key: p.clone() for key, p in base.module.named_parameters()}
    adapters.add("a", ROWS[name].config)
    randomise(adapters, "a")
    assert torch.equal(logits(base, batch_of(sequences())), before)
    batch = learning_batch(sequences(), "a")
    base.log_probabilities(batch).sum().backward()
    own = {id(parameter) for parameter in adapters.parameters("a").values()}
    assert len(own) == len(adapters.parameters("a"))
    for key, parameter in base.module.named_parameters():
        assert (id(parameter) in own) == parameter.requires_grad == (parameter.grad is not None), key
        assert parameter.dtype == torch.float32 or id(parameter) not in own
    adapters.remove("a")
    assert dict(base.module.named_modules()) == modules
    assert all(torch.equal(p, weights[key]) for key, p in base.module.named_parameters())
    assert torch.equal(logits(base, batch_of(sequences())), before)


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", ALL)
def test_frozen_for_serving_it_gives_the_same_and_takes_no_more(name: str, nf4: bool, bases: Bases) -> None:
    row = ROWS[name]
    if nf4 and not row.quantized:
        pytest.skip("stands on no quantized base")
    base, adapters = trained(bases, row, dtype="bfloat16", nf4=nf4)
    batch = by_sequence(batch_of(sequences()), ["a", None, "a", "a"])
    expected, before = logits(base, batch), held_bytes(adapters.parts("a"))
    freeze(adapters.parts("a"), adapters.bare(), base.module.dtype)
    for _ in range(2):  # what is held for many passes is held and let go of again
        with held_for_inference(base.module):
            assert torch.equal(logits(base, batch), expected)
    assert not any(parameter.requires_grad for parameter in adapters.parameters("a").values())
    after = held_bytes(adapters.parts("a"))
    assert after <= before / (2 if name in ("lora", "pissa", "embedding lora", "prefix", "prompt") else 1)


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", ALL)
def test_written_and_read_it_is_the_same(name: str, nf4: bool, bases: Bases, tmp_path: Path) -> None:
    row = ROWS[name]
    if nf4 and not row.quantized:
        pytest.skip("stands on no quantized base")
    base, adapters = trained(bases, row, nf4=nf4)
    identity = BaseId(base.name, base.fingerprint)
    write_adapter(tmp_path / "first", adapters, "a", identity)
    expected = logits(base, batch_of(sequences(), "a"))
    other, others = bases(row, nf4=nf4)
    assert load_adapter(others, "b", read_adapter(tmp_path / "first", WITH_TOY), identity) is None
    assert relative(logits(other, batch_of(sequences(), "b")), expected) < LOGITS_APART
    again, resumed = bases(row, nf4=nf4)  # as a run does that goes on: the recipe's own config, and what was saved
    resumed.add("a", row.config, seed=3)
    resumed.load("a", read_adapter(tmp_path / "first", WITH_TOY).tensors)
    assert torch.equal(logits(again, batch_of(sequences(), "a")), expected)
    for key, parameter in adapters.parameters("a").items():
        assert torch.equal(resumed.parameters("a")[key], parameter), key
    write_adapter(tmp_path / "second", resumed, "a", identity)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", ALL)
def test_merged_it_is_the_same_model(name: str, nf4: bool, bases: Bases) -> None:
    row = ROWS[name]
    if nf4 and not row.quantized:
        pytest.skip("stands on no quantized base")
    base, adapters = trained(bases, row, nf4=nf4)
    expected = logits(base, batch_of(sequences(), "a"))
    if not row.merges:
        before = copy.deepcopy(base.module.state_dict())
        with pytest.raises(AdapterError, match="cannot be merged"):
            merge(base, adapters, "a")
        assert all(torch.equal(value, before[key]) for key, value in base.module.state_dict().items())
        return
    merge(base, adapters, "a")
    assert relative(logits(base, batch_of(sequences())), expected) < 1e-5
    assert not any(parameter.requires_grad for parameter in base.module.parameters())


@pytest.mark.parametrize("kind", sorted({f"{row.family} {row.values}" for row in ROWS.values()}))
def test_all_rows_in_one_stream_are_each_alone(kind: str, bases: Bases) -> None:
    """Every method beside every other and beside no adapter, in one pass over one base."""
    rows = {f"row{at}": row for at, row in enumerate(ROWS.values()) if f"{row.family} {row.values}" == kind}
    nf4 = any(not row.dense for row in rows.values())
    base, adapters = bases(next(iter(rows.values())), nf4=nf4)
    for at, (name, row) in enumerate(rows.items()):
        adapters.add(name, row.config, seed=at)
        randomise(adapters, name, at)
    names = [None, *rows, None]
    parts = sequences([3 + 2 * at for at in range(len(names))])
    together = logits(base, by_sequence(batch_of(parts), names)).split([len(part) for part in parts])
    bare = logits(base, batch_of(parts)).split([len(part) for part in parts])
    for part, name, found, without in zip(parts, names, together, bare, strict=True):
        assert relative(found, logits(base, batch_of([part], name))) < LOGITS_APART
        assert (relative(found, without) > 1e-3) == (name is not None)
        if name is not None:
            alone, own = bases(rows[name], nf4=nf4)
            own.add("a", rows[name].config, seed=list(rows).index(name))
            randomise(own, "a", list(rows).index(name))
            assert relative(found, logits(alone, batch_of([part], "a"))) < LOGITS_APART


@pytest.mark.parametrize("name", ALL)
def test_packed_is_alone(name: str, bases: Bases) -> None:
    """Values, and gradients beside another adapter of the same kind and beside none."""
    base, adapters = trained(bases, ROWS[name])
    parts = sequences()
    together = logits(base, batch_of(parts, "a")).split([len(part) for part in parts])
    for part, found in zip(parts, together, strict=True):
        assert relative(found, logits(base, batch_of([part], "a"))) < LOGITS_APART
    adapters.add("b", ROWS[name].config, seed=5)
    batch = learning_batch(parts)
    mixed = gradients(base, adapters, by_sequence(batch, ["a", "a", None, "b"]))
    lower = batch.labels.positions < batch.cu_seqlens[2]
    own = replace(
        learning_batch(parts[:2], "a"),
        labels=chosen_labels(batch, lower),
    )  # fmt: skip
    expected = gradients(base, adapters, own)
    assert relative(list(mixed.values()), list(expected.values())) < GRADIENTS_APART


@pytest.mark.parametrize("name", DENSE)
def test_fast_layers_give_the_plain_ones_gradients(name: str) -> None:
    row = ROWS[name]
    results = []
    for fast in (True, False):
        model = tiny_model(row.family, **row.values)
        base = as_base(model, None, "tiny", lambda _: None, fast=fast)  # type: ignore[arg-type]
        adapters = Adapters(base.module, methods=WITH_TOY)
        adapters.add("a", row.config)
        randomise(adapters, "a")
        batch = by_sequence(learning_batch(sequences()), ["a", None, "a", "a"])
        results.append((logits(base, batch), gradients(base, adapters, batch)))
    (found, slopes), (expected, their_slopes) = results
    assert relative(found, expected) < LOGITS_APART
    for key, gradient in their_slopes.items():
        assert relative(slopes[key], gradient, least=1e-4) < 2e-5, key
        assert gradient.any() or "embed" in key, key


@pytest.mark.parametrize("name", QUANTIZED)
def test_gradients_on_a_quantized_base_are_those_on_its_dense_twin(name: str, bases: Bases) -> None:
    found = []
    for twin in (False, True):
        base, adapters = trained(bases, ROWS[name], nf4=True)
        if twin:
            dequantize(base.module)
        found.append(list(gradients(base, adapters, learning_batch(sequences(), "a")).values()))
    assert relative(found[0], found[1]) < GRADIENTS_APART


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.config.dropout])
def test_dropout_in_training_only(name: str, bases: Bases) -> None:
    base, adapters = bases(ROWS[name])
    parts, batch = sequences(), batch_of(sequences(), "a")
    before, seeds = logits(base, batch_of(parts)), range(len(parts))
    adapters.add("a", ROWS[name].config)
    adapters.train("a")
    assert relative(logits(base, batch.with_dropout_seeds(seeds)), before) < LOGITS_APART
    randomise(adapters, "a")
    found = logits(base, batch.with_dropout_seeds(seeds))
    assert torch.equal(logits(base, batch.with_dropout_seeds(seeds)), found)
    assert not torch.equal(logits(base, batch.with_dropout_seeds([seed + 1 for seed in seeds])), found)
    with pytest.raises(RuntimeError, match=r"nothing to draw from; give `batch\.with_dropout_seeds\(seeds\)`"):
        logits(base, batch)
    adapters.train("a", False)
    assert torch.equal(logits(base, batch), logits(base, batch.with_dropout_seeds(seeds)))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.config.dropout])
def test_what_drops_out_depends_on_the_row_alone(name: str, bases: Bases) -> None:
    """Neither on what stands beside it nor on whose rows those are: values and gradients."""
    base, adapters = trained(bases, ROWS[name])
    adapters.add("b", ROWS[name].config, seed=1)
    randomise(adapters, "b", 2)
    adapters.train("a")
    adapters.train("b")
    parts = sequences()
    together = by_sequence(learning_batch(parts).with_dropout_seeds([5, 6, 7, 8]), ["b", "a", None, "a"])
    spans = list(pairwise(together.cu_seqlens))
    alone = learning_batch([parts[3], parts[1]], "a").with_dropout_seeds([8, 6])
    found, expected = logits(base, together), logits(base, alone)
    assert relative(found[slice(*spans[1])], expected[len(parts[3]) :]) < LOGITS_APART
    assert relative(found[slice(*spans[3])], expected[: len(parts[3])]) < LOGITS_APART
    slopes = []
    for batch in (together, alone):
        batch = replace(batch, labels=replace(batch.labels, loss_weights=torch.ones_like(batch.labels.loss_weights)))
        slopes.append(gradients(base, adapters, batch))
    for key, gradient in slopes[1].items():
        assert relative(slopes[0][key], gradient, least=1e-4) < 2e-5, key


def test_what_drops_out_beside_virtual_tokens(bases: Bases) -> None:
    """They move the rows that come after theirs."""
    base, adapters = trained(bases, ROWS["lora with dropout"])
    adapters.add("prompt", ROWS["prompt"].config)
    adapters.train("a")
    parts = sequences()
    together = by_sequence(batch_of(parts).with_dropout_seeds([5, 6, 7, 8]), ["prompt", "a", "prompt", "a"])
    alone = batch_of([parts[1], parts[3]], "a").with_dropout_seeds([6, 8])
    spans = list(pairwise(together.cu_seqlens))
    found = logits(base, together)
    assert relative(torch.cat([found[slice(*spans[at])] for at in (1, 3)]), logits(base, alone)) < LOGITS_APART


def test_a_head_in_chunks_drops_what_it_drops_whole(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities with a gradient, whose chunks run again, and without."""
    base, adapters = trained(bases, ROWS["head lora"])
    adapters.train("a")
    batch, found = learning_batch(sequences(), "a"), []
    for rows in (1000, 5):
        monkeypatch.setattr(logprobs, "chunk_rows", lambda *_, rows=rows: rows)
        with torch.no_grad():
            found.append([base.log_probabilities(batch), *gradients_of(base, adapters, batch)])
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < 1e-5


def gradients_of(base: Base, adapters: Adapters, batch: Batch) -> list[Tensor]:
    with torch.enable_grad():
        return [base.log_probabilities(batch).detach(), *gradients(base, adapters, batch).values()]
