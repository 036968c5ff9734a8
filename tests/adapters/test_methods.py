"""Each method's own formula against autograd and dense algebra, and what is refused before anything is grafted."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from reference.families import added, learning_batch, logits, randomise, sequences, tiny_base
from reference.measure import GRADIENTS_APART, LOGITS_APART, relative
from reference.quantized_by_others import write_base
from topwork.adapters.base_weight import dense_weight
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, adapted_layers, plan_adapter
from topwork.adapters.methods.full import TiedHead
from topwork.adapters.methods.ia3 import Ia3
from topwork.adapters.methods.lora.dora import Dora
from topwork.adapters.methods.lora.inits import LoftQ
from topwork.adapters.module import AdaptedLayer
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.common.errors import AdapterError, ModelError
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.merging.merge import merge
from topwork.models.base import Base
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.config import ModelConfig
from topwork.models.held import held_for_inference
from topwork.models.load import load_base
from topwork.models.source import Source, find_source
from topwork.models.weights import original_weight
from topwork.ops.batch import batch_of
from topwork.ops.context import running
from topwork.ops.dropout import stays
from topwork.quantization.config import QuantizationConfig

DORA = AdapterConfig(r=4, lora_alpha=8, use_dora=True)
FULL, BITFIT, IA3 = (AdapterConfig(method=method) for method in ("full", "bitfit", "ia3"))


def slopes(base: Base, parameters: dict[str, Tensor], adapter: str | None) -> dict[str, Tensor]:
    batch = learning_batch(sequences(), adapter)
    total = (batch.labels.loss_weights * base.log_probabilities(batch)).sum()
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values()))))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("method", "family"), [("full", "qwen2"), ("full", "gpt2"), ("bitfit", "gpt2")])
def test_gradients_are_those_of_the_base_itself(method: str, family: str, tied: bool) -> None:
    """A copy of every weight learns what the weights themselves would learn; tied ones from both their uses."""
    base = tiny_base(family, tie_word_embeddings=tied)
    own = dict(base.module.named_parameters())
    base.module.requires_grad_(True)
    expected = slopes(base, own, None)
    base.module.requires_grad_(False)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(method=method))
    parameters = adapters.parameters("a")
    assert parameters.keys() == (own.keys() if method == "full" else {key for key in own if key.endswith("bias")})
    for key, gradient in slopes(base, parameters, "a").items():
        assert relative(gradient, expected[key], least=1e-5) < 2e-5, key


def test_a_tied_pair_is_counted_and_written_once(tmp_path: Path) -> None:
    base = tiny_base("qwen2", tie_word_embeddings=True)
    size = sum(parameter.numel() for parameter in base.module.parameters())
    assert sum(planned.trained for planned in plan_adapter(base.module, FULL).values()) == size
    adapters = added(base, a=FULL)
    assert sum(parameter.numel() for parameter in adapters.parameters("a").values()) == size
    assert isinstance(adapters.parts("a")["lm_head"], TiedHead)
    assert "lm_head.weight" not in adapters.state("a")
    write_adapter(tmp_path, adapters, "a", BaseId("tiny"))
    before = logits(base, batch_of(sequences(), "a"))
    merge(base, adapters, "a")
    assert base.module.lm_head.weight is base.module.model.embed_tokens.weight
    assert base.module.config.tie_word_embeddings
    assert relative(logits(base, batch_of(sequences())), before) < 1e-5


def test_the_file_of_a_full_fine_tuning_is_a_state_dict(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = tiny_base("llama")
    adapters = added(base, a=FULL)
    write_adapter(tmp_path, adapters, "a", BaseId("tiny"))
    other = tiny_base("llama")
    found = other.module.load_state_dict(load_file(tmp_path / "adapter_model.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert not found.missing_keys
    assert relative(logits(other, batch_of(sequences())), logits(base, batch_of(sequences(), "a"))) < LOGITS_APART


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lengths_are_those_of_the_dense_sum(family: str, fused: bool) -> None:
    """After every change of A and B, whether or not torch counts it (the fused AdamW's it does not)."""
    base = tiny_base(family)
    adapters = added(base, a=DORA)
    optimizer = torch.optim.AdamW(adapters.parameters("a").values(), lr=0.1, fused=fused)

    def check() -> None:
        for path, part in adapters.parts("a").items():
            assert isinstance(part, Dora)
            layer = adapted_layers(base.module)[path].base_layer
            lengths = part.lengths(layer)
            assert relative(lengths, (dense_weight(layer) + part.delta()).norm(dim=1)) < 1e-6
            assert not lengths.requires_grad

    for step in range(3):
        batch = learning_batch(sequences(), "a", step)
        base.log_probabilities(batch).sum().backward()
        with torch.no_grad():  # a look between the gradient and the update
            check()
        optimizer.step()
        optimizer.zero_grad()
        for mode in (False, True):
            with torch.set_grad_enabled(mode):
                check()


@torch.no_grad()
def test_lengths_are_kept_while_they_are_held() -> None:
    """And at no other time; what is loaded meanwhile is seen, and so is what changed after it."""
    base = tiny_base("llama")
    path, part = next(iter(added(base, a=DORA).parts("a").items()))
    assert isinstance(part, Dora)
    layer = adapted_layers(base.module)[path].base_layer
    assert part.lengths(layer) is not (lengths := part.lengths(layer))
    with held_for_inference(base.module):
        held = part.lengths(layer)
        assert torch.equal(held, lengths)
        assert part.lengths(layer) is held
        part.load_state({key: tensor + 1 for key, tensor in part.state().items()})
        assert not torch.equal(part.lengths(layer), lengths)
    with contextlib.suppress(ZeroDivisionError), held_for_inference(base.module):
        lengths = part.lengths(layer)
        raise ZeroDivisionError
    part.lora_B.add_(1)
    assert not torch.equal(part.lengths(layer), lengths)


def test_generation_computes_lengths_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    adapters = added(base, a=DORA)
    computed: list[Dora] = []
    plain = Dora._computed_lengths

    def counted(part: Dora, base_layer: nn.Module) -> Tensor:
        computed.append(part)
        return plain(part, base_layer)

    monkeypatch.setattr(Dora, "_computed_lengths", counted)
    generate(base, [[5, 6, 7], [8, 9]], ["a", "a"], [], Sampling(max_new_tokens=4))
    assert len(computed) == len(adapters.parts("a"))


def test_lengths_begin_without_large_buffers() -> None:
    """Freed between adapters that stay, they would leave holes: 0.27 GiB of SmolLM2's heap before."""
    layer, part = nn.Linear(576, 1536, bias=False).bfloat16(), Dora(576, 1536, r=4, scaling=2.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        part.reset_parameters(layer, seed=0, path="x")
    taken = [event.self_cpu_memory_usage for event in profiler.events()]
    assert 0 < max(taken) < 1 << 20
    assert torch.allclose(part.lora_magnitude_vector, layer.weight.float().norm(dim=1), rtol=1e-6)


def test_the_lengths_have_no_gradient() -> None:
    """dm = sum(dy * (W x + s B A x)) / n; dA and dB as if n were a number (section 4.3 of the paper)."""
    base = tiny_base("llama")
    adapters = added(base, a=DORA)
    part = adapters.parts("a")["model.layers.1.mlp.down_proj"]
    layer = adapted_layers(base.module)["model.layers.1.mlp.down_proj"].base_layer
    assert isinstance(part, Dora)
    x, dy = torch.randn(7, 96), torch.randn(7, 64)
    y = part.forward(layer(x), x, layer)
    slope, slope_b = torch.autograd.grad(y, [part.lora_magnitude_vector, part.lora_B], dy)
    whole = (dense_weight(layer) + part.delta()).detach()
    direct = (dy * part.factor(layer)).t() @ x @ part.lora_A.t() * part.scaling
    assert relative(slope_b, direct) < 1e-5
    assert relative(y, x @ (whole * part.factor(layer)[:, None]).t()) < 1e-5
    assert relative(slope, (dy * (x @ whole.t())).sum(0) / whole.norm(dim=1)) < 1e-5


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 3e-7), (torch.bfloat16, 2**-8)], ids=str)
@torch.no_grad()
def test_a_small_factor_does_not_enlarge_rounding(dtype: torch.dtype, limit: float, bias: bool) -> None:
    """s B A a hundred times W, and lengths as they began: f is 0.004 to 0.03, and y rounded as always. (As
    y + (f - 1) y it was off by 3e-6 to 6e-6 in fp32, and by a quarter in bf16.)"""
    layer, part = nn.Linear(64, 48, bias=bias).to(dtype), Dora(64, 48, r=4, scaling=100.0)
    part.reset_parameters(layer, seed=0, path="x")
    part.lora_A.copy_(torch.randn(4, 64).to(dtype) / 2)
    part.lora_B.copy_(torch.randn(48, 4).to(dtype) / 10)
    x = torch.randn(7, 64).to(dtype)
    factor = part.factor(layer).double()
    assert factor.max() < 0.05
    inner = torch.mm(x, part.lora_A.to(dtype).t()).double()  # which is rounded in every LoRA
    term = 100 * inner @ part.lora_B.double().t()
    expected = factor * (x.double() @ layer.weight.double().t() + term) + (layer.bias.double() if bias else 0)
    assert relative(part.forward(layer(x), x, layer), expected) < limit


@pytest.mark.parametrize("family", ["qwen2", "llama"], ids=["bias", "no bias"])
def test_dora_drops_out_of_what_it_adds_alone(family: str) -> None:
    """y = W x + b + (f - 1) W dropout(x) + f s B A dropout(x), which is no gain on a product."""
    base = tiny_base(family)
    adapters = added(base, a=DORA.model_copy(update={"lora_dropout": 0.4}))
    layer, part = (
        found["model.layers.1.self_attn.q_proj"] for found in (adapted_layers(base.module), adapters.parts("a"))
    )
    assert isinstance(layer, AdaptedLayer)
    assert isinstance(part, Dora)
    adapters.train("a")
    x, batch = torch.randn(1, 9, 64), batch_of([torch.zeros(9, dtype=torch.int64)], "a").with_dropout_seeds([3])
    with running(batch), torch.no_grad():
        y = layer(x)
        assert layer.projection() is None
    dropout = batch.dropout(0.4, layer.input_key, slice(0, 9))
    dropped = x * stays(dropout, dropout.seeds, 64) / 0.6
    factor = part.factor(layer.base_layer)
    added_to = (factor - 1) * (dropped @ dense_weight(layer.base_layer).t()) + factor * (dropped @ part.delta().t())
    assert relative(y, layer.base_layer(x) + added_to) < 1e-5


@pytest.mark.parametrize("config", [DORA, IA3], ids=["dora", "ia3"])
def test_gradients_with_checkpointed_layers(config: AdapterConfig) -> None:
    """A gain on a layer's last product needs its value again."""
    found = []
    for layers in (0, 2):
        base = tiny_base("llama")
        adapters = added(base, a=config)
        checkpoint_layers(base, layers)
        found.append(slopes(base, adapters.parameters("a"), "a"))
    assert relative(list(found[1].values()), list(found[0].values())) < GRADIENTS_APART


@pytest.mark.parametrize(
    ("family", "outputs", "inputs"),
    [
        ("llama", {"k_proj", "v_proj"}, {"down_proj"}),
        ("gpt2", {"c_attn"}, {"c_proj"}),
        ("opt", {"k_proj", "v_proj"}, {"fc2"}),
        ("phi3", {"qkv_proj"}, {"down_proj"}),
        ("gpt_neox", {"query_key_value"}, {"dense_4h_to_h"}),
    ],
)
def test_what_ia3_is_meant_for(family: str, outputs: set[str], inputs: set[str]) -> None:
    adapters = Adapters(tiny_base(family).module)
    adapters.add("a", IA3)
    kinds: dict[bool, set[str]] = {False: set(), True: set()}
    for path, part in adapters.parts("a").items():
        assert isinstance(part, Ia3)
        kinds[part.scales_inputs].add(path.rpartition(".")[2])
        assert family != "gpt2" or ".attn.c_proj" not in path
    assert kinds == {False: outputs, True: inputs}


def test_ia3_whose_feedforward_modules_are_all_left_out() -> None:
    """They were targets, so it is no mistake: PEFT writes and reads it so."""
    adapters = Adapters(tiny_base("llama").module)
    names = {"target_modules": ["k_proj", "o_proj"], "feedforward_modules": ["k_proj"], "exclude_modules": ["k_proj"]}
    adapters.add("a", AdapterConfig(method="ia3", **names))
    assert {path.rpartition(".")[2]: part.setting for path, part in adapters.parts("a").items()} == {"o_proj": False}


@pytest.mark.parametrize(
    ("family", "values", "told"),
    [
        ("llama", {"method": "bitfit"}, "this base has none in its linear layers and norms.*lora or ia3"),
        ("qwen2", {"method": "bitfit", "target_modules": ["up_proj"]}, r"none of the modules .* k_proj, q_proj"),
        ("llama", {"method": "ia3", "feedforward_modules": ["o_proj"]}, "matches none of the 6 target modules"),
        ("llama", {"init_lora_weights": "pissa", "r": 65}, r"has 64, fewer than r = 65"),
        ("llama", {"init_lora_weights": "loftq"}, "this base is not quantized; set quantization.load_in_4bit: true"),
        ("gpt_oss", {"method": "full"}, "method full cannot train .*exclude_modules"),
        ("llama", {"method": "full", "exclude_modules": ".*"}, "leaves nothing to train"),
    ],
)
def test_what_cannot_be_is_refused(family: str, values: dict[str, Any], told: str) -> None:
    base = tiny_base(family)
    before = [name for name, _ in base.module.named_modules()]
    with pytest.raises(AdapterError, match=told):
        Adapters(base.module).add("a", AdapterConfig(**values))
    assert [name for name, _ in base.module.named_modules()] == before


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Base, Source]]:
    """quantized(family): an NF4 base, and where its weights came from."""
    root = tmp_path_factory.mktemp("bases")

    def load(family: str) -> tuple[Base, Source]:
        folder = root / family
        if not folder.exists():
            write_base(folder, family)
        config = ModelConfig.model_validate({"model_name_or_path": str(folder), "dtype": "float32", "device": "cpu"})
        log: Callable[[str], None] = lambda _: None  # noqa: E731
        return load_base(config, log, QuantizationConfig(load_in_4bit=True)), find_source(config, log)

    return load


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loftq_begins_as_what_quantizing_lost(
    family: str, quantized: Callable[[str], tuple[Base, Source]]
) -> None:  # fmt: skip
    """The best approximation of its rank, whatever the scale; a head that is not quantized begins as LoRA does."""
    base, source = quantized(family)
    original = original_weight(source, base.module)
    adapters = Adapters(base.module, original=original)
    adapters.add("a", AdapterConfig(r=6, lora_alpha=15, init_lora_weights="loftq"))
    for path, part in adapters.parts("a").items():
        assert isinstance(part, LoftQ)
        lost = original(path) - dense_weight(adapted_layers(base.module)[path].base_layer)
        best = torch.linalg.svdvals(lost)[6:].square().sum().sqrt()
        assert float((lost - part.delta()).norm()) == pytest.approx(float(best), rel=1e-4)
        assert float(best) < float(lost.norm())


def test_loftq_needs_the_weights_from_before(quantized: Callable[[str], tuple[Base, Source]], tmp_path: Path) -> None:
    base, source = quantized("llama")
    loftq = AdapterConfig(init_lora_weights="loftq")
    with pytest.raises(AdapterError, match="they are not at hand"):
        Adapters(base.module).add("a", loftq)
    assert not adapted_layers(base.module)
    assert plan_adapter(base.module, loftq)  # counting needs none
    with pytest.raises(ModelError, match=r"holds no weight of model\.nothing in 16 or 32 bits"):
        original_weight(source, base.module)("model.nothing")


def test_a_learned_bias_on_a_norm_and_nowhere_else() -> None:
    base = tiny_base("gpt2")
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(method="bitfit", target_modules=["ln_1"]))
    assert set(adapters.parameters("a")) == {f"transformer.h.{layer}.ln_1.bias" for layer in (0, 1)}
    before = logits(base, batch_of(sequences()))
    assert torch.equal(logits(base, batch_of(sequences(), "a")), before)
    randomise(adapters, "a")
    assert not torch.equal(logits(base, batch_of(sequences(), "a")), before)
