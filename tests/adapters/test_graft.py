"""Grafting: fresh is the base bit for bit, segments keep adapters apart, removing restores the base's own modules."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reference.families import added, chosen_labels, learning_batch, logits, randomise, sequences, tiny_base
from reference.measure import GRADIENTS_APART, LOGITS_APART, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, adapted_layers, bare_modules
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.module import AdaptedLayer
from topwork.adapters.module_copy import ModuleCopy
from topwork.common.errors import AdapterError
from topwork.ops import logprobs
from topwork.ops.batch import Batch, Segment, batch_of
from topwork.ops.context import running

CONFIG = AdapterConfig(r=4, lora_alpha=8)
FAMILIES = ["llama", "gemma2", "gpt2", "phi3", "gpt_oss"]
KINDS = {
    "linear layers": CONFIG,
    "with a saved head": AdapterConfig(r=4, modules_to_save=["lm_head"]),
    "with saved embeddings and norms": AdapterConfig(r=4, modules_to_save=["embed_tokens", "norm"]),
    "with a saved block": AdapterConfig(r=4, modules_to_save=["layers.1.mlp"]),
    "with an adapted head": AdapterConfig(r=4, target_modules=["q_proj", "lm_head"]),
}


def by_sequence(batch: Batch, names: list[str | None]) -> Batch:
    """Each sequence a segment of its own."""
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    return replace(batch, segments=tuple(Segment(a, b, name) for (a, b), name in zip(spans, names, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_base_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    base = tiny_base(family, dtype)
    before = logits(base, batch_of(sequences()))
    adapters = Adapters(base.module)
    assert adapters.add("a", CONFIG)
    assert torch.equal(logits(base, batch_of(sequences(), "a")), before)
    randomise(adapters, "a")
    assert not torch.equal(logits(base, batch_of(sequences(), "a")), before)
    assert torch.equal(logits(base, batch_of(sequences(), None)), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_modules_to_save_are_the_base_too(kind: str, dtype: torch.dtype) -> None:
    base = tiny_base("llama", dtype)
    before = logits(base, batch_of(sequences()))
    adapters = Adapters(base.module)
    adapters.add("a", KINDS[kind])
    fresh = logits(base, batch_of(sequences(), "a"))
    if dtype == torch.bfloat16:
        assert torch.equal(fresh, before)
    assert relative(fresh, before) < LOGITS_APART  # a saved module sums in fp32 in its own order
    randomise(adapters, "a")
    assert torch.equal(logits(base, batch_of(sequences())), before)
    assert all(parameter.dtype == torch.float32 for parameter in adapters.parameters("a").values())


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_in_one_stream_are_each_alone(kind: str) -> None:
    base = tiny_base("llama")
    added(base, one=KINDS[kind], two=KINDS[kind].model_copy(update={"r": 7, "use_rslora": True}))
    parts = sequences()
    names = ["one", None, "two", "one"]
    together = logits(base, by_sequence(batch_of(parts), names)).split([len(part) for part in parts])
    for part, name, found in zip(parts, names, together, strict=True):
        assert relative(found, logits(base, batch_of([part], name))) < LOGITS_APART
    alone = [logits(base, batch_of(parts[:1], name)) for name in ("one", "two", None)]
    assert relative(alone[0], alone[1]) > 1e-2
    assert relative(alone[0], alone[2]) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_two_adapters_in_one_stream(kind: str) -> None:
    base = tiny_base("llama")
    adapters = added(base, one=KINDS[kind], two=KINDS[kind])
    parts = sequences()

    def gradients(batch: Batch, name: str) -> list[Tensor]:
        loss = (-batch.labels.loss_weights * base.log_probabilities(batch, -batch.labels.loss_weights)).sum()
        return list(torch.autograd.grad(loss, list(adapters.parameters(name).values())))

    batch = learning_batch(parts)
    mixed = by_sequence(batch, ["one", "one", "two", None])
    ends = (14, 21)
    for name, lower, upper in (("one", 0, ends[0]), ("two", *ends)):
        chosen = (batch.labels.positions >= lower) & (batch.labels.positions < upper)
        own = replace(
            by_sequence(batch, [name] * 4),
            labels=chosen_labels(batch, chosen),
        )  # fmt: skip
        assert relative(gradients(mixed, name), gradients(own, name)) < GRADIENTS_APART


def test_the_head_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved head with more rows than a chunk holds: same values, same gradients."""
    base = tiny_base("gemma2")
    adapters = added(base, a=AdapterConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    batch = learning_batch(sequences(), "a")
    results = []
    for size in (1 << 25, 1):
        monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", size)
        logprobs_found = base.log_probabilities(batch)
        gradients = torch.autograd.grad(logprobs_found.sum(), list(adapters.parameters("a").values()))
        results.append((logprobs_found.detach(), gradients))
    assert len(batch.labels.positions) > 16
    assert relative(results[0][0], results[1][0]) < LOGITS_APART
    assert relative(results[0][1], results[1][1]) < GRADIENTS_APART


@pytest.mark.parametrize("kind", KINDS)
def test_removing_restores_the_bases_own_modules(kind: str) -> None:
    base = tiny_base("llama")
    before = dict(base.module.named_modules())
    adapters = added(base, one=KINDS[kind], two=KINDS[kind])
    assert bare_modules(base.module).keys() == before.keys() - {""}
    two = logits(base, batch_of(sequences(), "two"))
    adapters.remove("one")
    assert torch.equal(logits(base, batch_of(sequences(), "two")), two)
    adapters.remove("two")
    after = dict(base.module.named_modules())
    assert after.keys() == before.keys()
    assert all(after[path] is before[path] for path in before)
    assert not adapters.configs


def test_only_the_adapter_learns() -> None:
    base = tiny_base("llama")
    adapters = added(base, a=KINDS["with a saved head"])
    batch = learning_batch(sequences(), "a")
    base.log_probabilities(batch).sum().backward()
    own = {id(parameter) for parameter in adapters.parameters("a").values()}
    for name, parameter in base.module.named_parameters():
        assert (id(parameter) in own) == parameter.requires_grad == (parameter.grad is not None), name


def test_names_of_the_parameters_are_pefts() -> None:
    base = tiny_base("llama")
    adapters = added(base, a=AdapterConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert {key: tuple(p.shape) for key, p in adapters.parameters("a").items()} == {
        "lm_head.weight": (99, 64),
        "model.layers.0.self_attn.q_proj.lora_A.weight": (3, 64),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (64, 3),
        "model.layers.1.self_attn.q_proj.lora_A.weight": (3, 64),
        "model.layers.1.self_attn.q_proj.lora_B.weight": (64, 3),
    }
    assert list(adapters.parameters("a")) == sorted(adapters.parameters("a"))


def test_scaling_is_alpha_over_r_or_over_its_root() -> None:
    for rslora, scaling in ((False, 8 / 4), (True, 8 / 2)):
        base = tiny_base("llama")
        Adapters(base.module).add("a", AdapterConfig(r=4, lora_alpha=8, use_rslora=rslora))
        layers = adapted_layers(base.module).values()
        assert {layer.adapters["a"].scaling for layer in layers} == {scaling}


def test_the_first_weights_depend_on_seed_and_path_alone() -> None:
    def drawn(seed: int, **values: object) -> dict[str, Tensor]:
        adapters = Adapters(tiny_base("llama").module)
        adapters.add("a", AdapterConfig(r=4, **values), seed)
        return {key: parameter.detach() for key, parameter in adapters.parameters("a").items()}

    whole, few, other = drawn(0), drawn(0, target_modules=["v_proj"]), drawn(1)
    assert few.keys() < whole.keys()
    assert all(torch.equal(whole[key], few[key]) for key in few)
    a_keys = [key for key in whole if "lora_A" in key]
    assert not any(torch.equal(whole[key], other[key]) for key in a_keys)
    assert not torch.equal(whole[a_keys[0]], whole[a_keys[-1]])


@pytest.mark.parametrize(("init", "spread"), [(True, 1 / (3 * 1024) ** 0.5), ("gaussian", 1 / 32)])
def test_how_a_begins(init: bool | str, spread: float) -> None:
    """Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(in), whose deviation is 1/sqrt(3 in)."""
    model = tiny_base("llama", hidden_size=1024, intermediate_size=64).module
    adapters = Adapters(model)
    adapters.add("a", AdapterConfig(r=32, target_modules=["gate_proj"], init_lora_weights=init))
    a, b, *_ = adapters.parameters("a").values()
    assert float(a.std()) == pytest.approx(spread, rel=0.03)
    assert float(a.mean()) == pytest.approx(0, abs=spread / 50)
    assert (float(a.abs().max()) <= 1 / 32) is (init is True)
    assert not b.any()


def test_dropout_in_training_only() -> None:
    base = tiny_base("llama")
    adapters = added(base, a=AdapterConfig(r=4, lora_dropout=0.5), b=CONFIG)
    batch = batch_of(sequences(), "a")
    still = logits(base, batch)
    assert torch.equal(logits(base, batch), still)
    adapters.train("a")
    noisy = [logits(base, batch.with_dropout_seeds([seed] * 4)) for seed in (1, 2)]
    assert not torch.equal(noisy[0], noisy[1])
    other = batch_of(sequences(), "b")
    assert torch.equal(logits(base, other), logits(base, other))
    adapters.train("a", False)
    assert torch.equal(logits(base, batch), still)


def test_layers_with_one_input_drop_the_same_of_it_and_others_do_not() -> None:
    base = tiny_base("llama")
    added(base, a=AdapterConfig(r=4, lora_dropout=0.5, target_modules=["k_proj", "v_proj", "up_proj", "o_proj"]))
    added(base, b=AdapterConfig(r=4))
    keys = {path: layer.input_key for path, layer in adapted_layers(base.module).items()}
    assert len(keys) == 14
    assert len(set(keys.values())) == 8
    for parent, *names in (("self_attn", "q_proj", "k_proj", "v_proj"), ("mlp", "gate_proj", "up_proj")):
        assert len({keys[f"model.layers.1.{parent}.{name}"] for name in names}) == 1


def test_evaluating_switches_dropout_off_and_back_to_what_it_was() -> None:
    base = tiny_base("llama")
    config = AdapterConfig(r=4, lora_dropout=0.5, modules_to_save=["norm"])
    adapters = added(base, trains=config, rests=config, other=config)
    silent = logits(base, batch_of(sequences(), "trains"))
    for name in ("trains", "other"):
        adapters.train(name)

    def modes() -> dict[str, set[bool]]:
        return {
            name: {m.training for part in adapters.parts(name).values() for m in part.modules()}
            for name in adapters.configs
        }

    before = modes()
    assert before == {"trains": {True}, "rests": {False}, "other": {True}}
    off = {"trains": {False}, "rests": {False}, "other": {True}}
    with adapters.evaluating("trains", "rests"):
        assert torch.equal(logits(base, batch_of(sequences(), "trains")), silent)
        with adapters.evaluating("trains"):
            assert modes() == off
        assert modes() == off
    assert modes() == before
    with pytest.raises(KeyboardInterrupt), adapters.evaluating("trains"):
        raise KeyboardInterrupt
    assert modes() == before
    with pytest.raises(AdapterError, match="no adapter 'nobody' here"), adapters.evaluating("trains", "nobody"):
        pass
    assert modes() == before


def test_dropout_is_on_the_adapters_input_and_scaled() -> None:
    """The mean over many draws is the output without dropout (one layer: it is linear in its input)."""
    layer = AdaptedLayer(nn.Linear(6, 5), "layer")
    holder = nn.Module()
    holder.layer = layer
    weights = Lora(6, 5, 3, 2.0, dropout=0.3)
    nn.init.normal_(weights.lora_A)
    nn.init.normal_(weights.lora_B)
    layer.adapters["a"] = weights
    x = torch.randn(1, 6).expand(40000, 6)
    with torch.no_grad(), running(batch_of([torch.zeros(40000, dtype=torch.int64)], "a").with_dropout_seeds([0])):
        mean = layer(x).mean(0)
        weights.eval()
        expected = layer(x[:1].expand(40000, 6))[0]
    update = expected - layer.base_layer(x[0])
    assert relative(mean, expected) < 0.03 * float(update.norm() / expected.norm())


def test_a_name_that_is_taken_or_no_name_is_refused() -> None:
    adapters = added(tiny_base("llama"), a=CONFIG)
    for name in ("a", "", "a.b"):
        with pytest.raises(AdapterError, match=r"is taken, empty or has a dot; taken: \['a'\]"):
            adapters.add(name, CONFIG)
    for call in (adapters.remove, adapters.parameters, adapters.train):
        with pytest.raises(AdapterError, match=r"no adapter 'b' here; there are \['a'\]"):
            call("b")


@pytest.mark.parametrize(
    ("there", "new"),
    [
        (CONFIG, AdapterConfig(target_modules=["q_proj"], modules_to_save=["mlp"])),
        (AdapterConfig(target_modules=["q_proj"], modules_to_save=["mlp"]), CONFIG),
    ],
    ids=["inside, then whole", "whole, then inside"],
)
def test_a_module_within_one_that_another_saves_is_refused(there: AdapterConfig, new: AdapterConfig) -> None:
    """Nothing of the refused adapter stays behind."""
    base = tiny_base("llama")
    adapters = added(base, a=there)
    before = {name: id(module) for name, module in base.module.named_modules()}
    with pytest.raises(AdapterError, match="lie in one another"):
        adapters.add("b", new)
    assert {name: id(module) for name, module in base.module.named_modules()} == before
    assert list(adapters.configs) == ["a"]


def test_tensors_that_do_not_fit_are_named() -> None:
    adapters = added(tiny_base("llama"), a=CONFIG)
    good = {key: parameter.detach().clone() for key, parameter in adapters.parameters("a").items()}
    first, second, *_ = good
    bad = {**good, "model.extra": torch.zeros(1), second: torch.zeros(2, 2)}
    del bad[first]
    with pytest.raises(AdapterError) as error:
        adapters.load("a", bad)
    assert f"1 missing (first {first})" in str(error.value)
    assert "1 unknown (first model.extra)" in str(error.value)
    assert f"another shape (first {second}: (2, 2)" in str(error.value)
    assert all(torch.equal(adapters.parameters("a")[key], good[key]) for key in good)


def test_a_layer_given_other_tokens_than_the_streams_refuses() -> None:
    """Experts that pick tokens would otherwise be adapted at the wrong rows."""
    base = tiny_base("llama")
    added(base, a=CONFIG)
    layer = base.module.model.layers[0].mlp.up_proj
    with (
        running(batch_of(sequences(), "a")),
        pytest.raises(AdapterError, match=r"given 7 of the batch's 45 tokens"),
    ):
        layer(torch.zeros(7, 64))


def test_a_saved_module_is_a_copy_of_its_own() -> None:
    base = tiny_base("llama", tie_word_embeddings=True)
    adapters = added(base, a=AdapterConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head = base.module.lm_head
    assert isinstance(head, AdaptedLayer)
    assert isinstance(head.part("a"), ModuleCopy)
    assert base.module.model.embed_tokens.weight is head.base_layer.weight
    assert not torch.equal(adapters.parameters("a")["lm_head.weight"], head.base_layer.weight)


def test_one_adapter_saves_whole_what_another_adapts() -> None:
    base = tiny_base("llama")
    kinds = {
        "saved": AdapterConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "down_proj"]),
        "adapted": AdapterConfig(target_modules=["lm_head", "down_proj"]),
    }
    adapters = Adapters(base.module)
    for seed, (name, config) in enumerate(kinds.items()):
        adapters.add(name, config)
        randomise(adapters, name, seed)
    parts, names = sequences(), ["saved", "adapted", None, "saved"]
    together = logits(base, by_sequence(batch_of(parts), names)).split([len(part) for part in parts])
    for part, name, found in zip(parts, names, together, strict=True):
        alone = tiny_base("llama")
        adapters = Adapters(alone.module)
        if name is not None:
            adapters.add(name, kinds[name])
            randomise(adapters, name, seed=list(kinds).index(name))
        assert relative(found, logits(alone, batch_of([part], name))) < LOGITS_APART


@pytest.mark.parametrize("name", ["training", "weight_norm.x", "forward"])
def test_names_that_modules_have_for_themselves_are_refused(name: str) -> None:
    base = tiny_base("llama")
    with pytest.raises(AdapterError, match="is taken, empty or has a dot"):
        Adapters(base.module).add(name, CONFIG)
    assert not adapted_layers(base.module)


def test_what_fails_halfway_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    base, begun = tiny_base("llama"), []

    def failing(self: Lora, *_: object) -> None:
        begun.append(self)
        if len(begun) == 5:
            raise MemoryError

    monkeypatch.setattr(Lora, "reset_parameters", failing)
    adapters = Adapters(base.module)
    with pytest.raises(MemoryError):
        adapters.add("a", CONFIG)
    assert len(begun) == 5
    assert not adapted_layers(base.module)
    assert not adapters.configs


def test_beginnings_from_a_weight_are_for_linear_layers() -> None:
    adapters = Adapters(tiny_base("llama").module)
    config = AdapterConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights="pissa")
    with pytest.raises(AdapterError, match=r"begins from a linear layer's weight.*embed_tokens"):
        adapters.add("a", config)
