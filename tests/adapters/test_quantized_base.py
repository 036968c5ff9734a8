"""Adapters on a base in few bits behave as on its dense twin, whose weights are what the packed ones stand for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.families import added, learning_batch, logits, randomise, sequences
from reference.measure import GRADIENTS_APART, LOGITS_APART, relative
from reference.quantized_by_others import differing, write_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, adapted_layers, bare_modules
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.module_copy import ModuleCopy
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.merging.merge import dequantize, merge
from topwork.models import fast
from topwork.models.base import Base
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.ops import project, quantized_linear
from topwork.ops.batch import Segment, batch_of
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import PackedModule, QuantizedLinear, packed_modules

pytestmark = pytest.mark.slow

CONFIG = AdapterConfig(r=4, lora_alpha=8)
HELD: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
    "nf4 and its head": {"load_in_4bit": True, "head": "int8"},
}
KINDS = {
    "linear layers": CONFIG,
    "with a saved head": AdapterConfig(r=4, modules_to_save=["lm_head"]),
    "with saved embeddings and norms": AdapterConfig(r=4, modules_to_save=["embed_tokens", "norm"]),
    "with a saved linear layer": AdapterConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"]),
    "with a saved block": AdapterConfig(r=4, modules_to_save=["layers.1.mlp"]),
    "with an adapted head": AdapterConfig(r=4, target_modules=["q_proj", "lm_head"]),
}
FAMILIES = ["llama", "gpt2", "phi", "opt", "qwen3_moe"]
Bases = Callable[..., Base]


@pytest.fixture(scope="session")
def held(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """held("nf4", family="llama", dtype="float32", twin=False): a fresh base; with `twin` made dense again."""
    folders: dict[str, Path] = {}

    def load(kind: str, family: str = "llama", dtype: str = "float32", twin: bool = False, **values: Any) -> Base:
        name = f"{family} {values}"
        if name not in folders:
            folders[name] = write_base(tmp_path_factory.mktemp("base") / "base", family, **values)
        config = ModelConfig.model_validate({"model_name_or_path": str(folders[name]), "dtype": dtype, "device": "cpu"})
        base = load_base(config, lambda _: None, QuantizationConfig(**HELD[kind]))
        if twin:
            dequantize(base.module)
            assert not packed_modules(base.module)
        return base

    return load


def gradients(base: Base, adapters: Adapters, name: str) -> dict[str, Tensor]:
    batch = learning_batch(sequences(), name)
    parameters = adapters.parameters(name)
    loss = (-batch.labels.loss_weights * base.log_probabilities(batch, -batch.labels.loss_weights)).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    zero = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    return {key: zero[key] if gradient is None else gradient for key, gradient in zip(parameters, found)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", HELD)
def test_a_fresh_adapter_is_the_base_bit_for_bit(kind: str, family: str, dtype: str, held: Bases) -> None:
    base = held(kind, family, dtype)
    before, modules = logits(base, batch_of(sequences())), dict(base.module.named_modules())
    adapters = Adapters(base.module)
    targets = adapters.add("a", CONFIG)
    packed = {path for path, module in bare_modules(base.module).items() if isinstance(module, QuantizedLinear)}
    head = {path for path in packed if path.endswith(("lm_head", "embed_out"))}
    raw = {path for path in targets if path.endswith((".mlp.experts", ".mlp.gate"))}  # experts stay as they are
    assert set(targets) - raw == packed - head
    assert torch.equal(logits(base, batch_of(sequences(), "a")), before)
    randomise(adapters, "a")
    assert not torch.equal(logits(base, batch_of(sequences(), "a")), before)
    assert torch.equal(logits(base, batch_of(sequences(), None)), before)
    adapters.remove("a")
    assert dict(base.module.named_modules()) == modules
    assert torch.equal(logits(base, batch_of(sequences())), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("kind", HELD)
def test_fresh_modules_to_save_are_the_base_too(kind: str, config: str, dtype: str, held: Bases) -> None:
    base = held(kind, dtype=dtype)
    before = logits(base, batch_of(sequences()))
    adapters = Adapters(base.module)
    adapters.add("a", KINDS[config])
    fresh = logits(base, batch_of(sequences(), "a"))
    if dtype == "bfloat16":
        assert torch.equal(fresh, before)
    assert relative(fresh, before) < LOGITS_APART  # a saved module sums in fp32 in its own order
    randomise(adapters, "a")
    assert not torch.equal(logits(base, batch_of(sequences(), "a")), before)
    assert torch.equal(logits(base, batch_of(sequences())), before)
    for parameter in adapters.parameters("a").values():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("kind", HELD)
def test_two_adapters_in_one_stream_are_each_alone(kind: str, config: str, held: Bases) -> None:
    base = held(kind)
    added(base, one=KINDS[config], two=KINDS[config].model_copy(update={"r": 7, "use_rslora": True}))
    parts = sequences()
    batch = batch_of(parts)
    names = ["one", None, "two", "one"]
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    mixed = replace(batch, segments=tuple(Segment(a, b, name) for (a, b), name in zip(spans, names, strict=True)))
    together = logits(base, mixed).split([len(part) for part in parts])
    for part, name, found in zip(parts, names, together, strict=True):
        assert relative(found, logits(base, batch_of([part], name))) < LOGITS_APART
    alone = [logits(base, batch_of(parts[:1], name)) for name in ("one", "two", None)]
    assert relative(alone[0], alone[1]) > 1e-2
    assert relative(alone[0], alone[2]) > 1e-2


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("kind", HELD)
def test_gradients_are_those_on_the_dense_twin(kind: str, config: str, held: Bases) -> None:
    found, expected = (
        gradients(base, added(base, a=KINDS[config]), "a") for base in (held(kind), held(kind, twin=True))
    )
    assert found.keys() == expected.keys()
    assert relative(list(found.values()), list(expected.values())) < GRADIENTS_APART
    assert all(float(expected[key].norm()) > 0 for key in expected if "lora" in key)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_in_other_families(kind: str, family: str, held: Bases) -> None:
    found, expected = (
        gradients(base, added(base, a=CONFIG), "a") for base in (held(kind, family), held(kind, family, twin=True))
    )
    assert relative(list(found.values()), list(expected.values())) < GRADIENTS_APART


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_in_bfloat16_the_gradients_are_the_twins_bit_for_bit(
    kind: str, held: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One panel holds each of these weights, so the same products are rounded in the same way; on AMX those of dense
    weights with one input would be one product."""
    monkeypatch.setattr(fast, "decoder_layer_of", lambda *_: None)
    monkeypatch.setattr(fast, "feedforward_of", lambda *_: None)
    for place in (project, quantized_linear):
        monkeypatch.setattr(place, "multiplies_all", lambda _: False)
    found, expected = (
        gradients(base, added(base, a=CONFIG), "a")
        for base in (held(kind, dtype="bfloat16"), held(kind, dtype="bfloat16", twin=True))
    )
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key


METHODS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {"use_dora": True}, "dora with dropout": {"use_dora": True, "lora_dropout": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_with_checkpointed_layers(kind: str, method: str, held: Bases) -> None:
    """DoRA's magnitudes need every product."""
    found = []
    for layers in (0, 2):
        base = held(kind)
        adapters = added(base, a=AdapterConfig(r=4, lora_alpha=8, **METHODS[method]))
        checkpoint_layers(base, layers)
        adapters.train("a")
        found.append(gradients(base, adapters, "a"))
    assert relative(list(found[1].values()), list(found[0].values())) < GRADIENTS_APART


@pytest.mark.parametrize("kind", HELD)
def test_a_saved_packed_module_trains_a_dense_copy(kind: str, held: Bases) -> None:
    base = held(kind, tie_word_embeddings=False)
    fresh = packed_modules(held(kind, tie_word_embeddings=False).module)
    adapters = Adapters(base.module)
    adapters.add(
        "a", AdapterConfig(target_modules=["q_proj"], modules_to_save=["down_proj", "lm_head", "layers.0.mlp.up_proj"])
    )
    layers = {
        path: layer for path, layer in adapted_layers(base.module).items() if isinstance(layer.part("a"), ModuleCopy)
    }
    assert len(layers) == 4
    for path, layer in layers.items():
        copy = layer.adapters["a"].module
        assert type(copy) is nn.Linear
        if isinstance(layer.base_layer, PackedModule):
            assert torch.equal(copy.weight, layer.base_layer.packed.dense().float()), path
        assert copy.weight.dtype == torch.float32
    parameters = adapters.parameters("a")
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for key, gradient in gradients(base, adapters, "a").items():
        parameters[key].grad = gradient
    optimizer.step()
    for path in layers:
        assert not torch.equal(parameters[f"{path}.weight"], before[f"{path}.weight"]), path
    packed = {path.replace(".base_layer", ""): module.packed for path, module in packed_modules(base.module).items()}
    for path, module in fresh.items():
        assert differing(packed[path], module.packed) == [], path


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("kind", ["nf4", "nf4 and its head"])
def test_written_and_read_it_is_the_same(kind: str, config: str, held: Bases, tmp_path: Path) -> None:
    base = held(kind)
    adapters = added(base, a=KINDS[config])
    write_adapter(tmp_path / "a", adapters, "a", BaseId(base.name, base.fingerprint))
    fresh = held(kind)
    assert (
        load_adapter(Adapters(fresh.module), "b", read_adapter(tmp_path / "a"), BaseId(fresh.name, fresh.fingerprint))
        is None
    )
    assert torch.equal(logits(fresh, batch_of(sequences(), "b")), logits(base, batch_of(sequences(), "a")))


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", HELD)
def test_merged_it_is_the_same_model(kind: str, tied: bool, config: str, held: Bases) -> None:
    base = held(kind, tie_word_embeddings=tied)
    adapters = added(base, a=KINDS[config])
    before = logits(base, batch_of(sequences(), "a"))
    merge(base, adapters, "a")
    assert not packed_modules(base.module)
    assert not adapted_layers(base.module)
    assert relative(logits(base, batch_of(sequences())), before) < 1e-5
    assert all(parameter.dtype == torch.float32 for parameter in base.module.parameters())
    still = base.module.lm_head.weight is base.module.model.embed_tokens.weight
    touched = any(name in str(KINDS[config]) for name in ("lm_head", "embed_tokens"))
    assert still == (tied and not touched)
    assert base.module.config.tie_word_embeddings == still


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_in_other_families(family: str, held: Bases) -> None:
    base = held("nf4", family)
    adapters = added(base, a=CONFIG)
    before = logits(base, batch_of(sequences(), "a"))
    merge(base, adapters, "a")
    assert relative(logits(base, batch_of(sequences())), before) < 1e-5


def test_the_layers_of_an_adapter_stand_around_packed_ones(held: Bases) -> None:
    base = held("nf4")
    adapters = added(base, a=CONFIG)
    for layer in adapted_layers(base.module).values():
        assert isinstance(layer.part("a"), Lora)
        assert isinstance(layer.base_layer, QuantizedLinear)
    shapes = {key: tuple(parameter.shape) for key, parameter in adapters.parameters("a").items()}
    assert shapes["model.layers.0.mlp.down_proj.lora_A.weight"] == (4, 96)
    assert shapes["model.layers.0.mlp.down_proj.lora_B.weight"] == (64, 4)
