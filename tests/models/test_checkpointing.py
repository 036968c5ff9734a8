"""Checkpointing changes what is kept and nothing else: losses and gradients stay the same to the bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reference.families import CONTEXT, learning_batch, randomise, sequences, tiny_base, tiny_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.module import AdaptedLayer
from topwork.common.errors import ModelError
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.models import fast
from topwork.models.base import Base
from topwork.models.checkpointing import checkpoint_layers, decoder_layers
from topwork.ops import project, projection
from topwork.ops.batch import Batch, Segment, batch_of
from topwork.ops.context import running
from topwork.ops.logprobs import LogitRule
from topwork.ops.packed import pack_4bit
from topwork.ops.quantized_linear import write_output
from topwork.quantization.linear import QuantizedLinear

LEFT_OUT = {
    "llama": ["mlp.down_proj"], "qwen3": ["mlp.down_proj"], "phi3": ["mlp.down_proj"], "granite": ["mlp.down_proj"],
    "gemma2": [], "gemma3_text": [], "olmo2": [], "mixtral": [], "qwen3_moe": [], "gpt_oss": [],
    "gpt2": [], "opt": [], "starcoder2": [], "phi": [],
}  # fmt: skip
"""What is not computed again: a fast layer's last product, but for families where a norm follows or there are experts;
plain layers repeat all."""

OWN_DROPOUT = {"opt": {"dropout": 0.5}, "starcoder2": {"residual_dropout": 0.5}, "phi": {"resid_pdrop": 0.5}}
"""What these families would drop in a layer that is in training mode."""


def adapted(family: str = "llama", dropout: float = 0.0, **values: Any) -> tuple[Base, Adapters]:
    base = tiny_base(family, **OWN_DROPOUT.get(family, {}), **values)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, lora_dropout=dropout))
    randomise(adapters, "a")
    return base, adapters


def mixed_batch(names: Sequence[str | None] = ("a", None, "b", "a"), seed: int = 0) -> Batch:
    batch = learning_batch(sequences(), seed=seed)
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    return replace(batch, segments=tuple(Segment(*span, name) for span, name in zip(spans, names)))


def results(base: Base, adapters: Adapters, batch: Batch) -> list[Tensor]:
    """The loss, what is drawn at random next, and every gradient, of adapters in training."""
    torch.manual_seed(3)
    parameters = [p for name in adapters.configs for p in adapters.parameters(name).values()]
    for name in adapters.configs:
        adapters.train(name)
    for parameter in parameters:
        parameter.grad = None
    gradient = -batch.labels.loss_weights
    loss = (gradient * base.log_probabilities(batch, gradient)).sum()
    loss.backward()
    grads = [torch.zeros(1) if p.grad is None else p.grad for p in parameters]
    assert any(grad.any() for grad in grads)
    return [loss.detach(), torch.rand(1), *grads]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", LEFT_OUT)
def test_losses_and_gradients_are_the_same_to_the_bit(family: str) -> None:
    """Dropout, two adapters and the bare base in one batch."""
    base, adapters = adapted(family, dropout=0.2)
    adapters.add("b", AdapterConfig(r=2))
    randomise(adapters, "b", 2)
    batch = mixed_batch()
    off = results(base, adapters, batch)
    others = replace(batch, dropout_seeds=mixed_batch(seed=4).dropout_seeds)
    assert not torch.equal(results(base, adapters, others)[0], off[0])  # there is something to draw
    for count in (1, 2):
        checkpoint_layers(base, count)
        assert_same(results(base, adapters, batch), off)
    checkpoint_layers(base, 0)
    assert_same(results(base, adapters, batch), off)


def test_in_sixteen_bits_too() -> None:
    base, adapters = adapted(dtype=torch.bfloat16)
    batch = mixed_batch(("a", "a", None, "a"))
    off = results(base, adapters, batch)
    checkpoint_layers(base, 2)
    assert_same(results(base, adapters, batch), off)


@pytest.mark.parametrize("saved", [["lm_head", "norm"], ["embed_tokens"], ["input_layernorm"]], ids=str)
def test_whole_modules_that_learn(saved: list[str]) -> None:
    base = tiny_base()
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, modules_to_save=saved))
    randomise(adapters, "a")
    batch = mixed_batch(("a", None, "a", "a"))
    off = results(base, adapters, batch)
    checkpoint_layers(base, 2)
    assert_same(results(base, adapters, batch), off)


def test_a_down_projection_that_is_learned_whole() -> None:
    base = tiny_base()
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"]))
    randomise(adapters, "a")
    batch = mixed_batch(("a", "a", None, "a"))
    off = results(base, adapters, batch)
    checkpoint_layers(base, 2)
    assert_same(results(base, adapters, batch), off)


class Products(TorchDispatchMode):
    """Counts the matrix products with some weights, whichever way they are laid out, several in one product too."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.places = {name: weight.data_ptr() for name, weight in weights.items()}
        self.counts = dict.fromkeys(weights, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in (
            "aten::mm",
            "aten::addmm",
            "aten::addmm_",
            "aten::bmm",
            "aten::linear",
            "aten::matmul",
        ):
            for arg in filter(torch.is_tensor, args):
                start = arg.data_ptr()
                for name, place in self.places.items():
                    self.counts[name] += start <= place < start + arg.nbytes
        return func(*args, **(kwargs or {}))


def linear_weights(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's linear layers by path, adapted or not."""
    return {
        path.removesuffix(".base_layer"): module.weight
        for path, module in layer.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }


@pytest.mark.parametrize(
    ("family", "values", "left_out"),
    [
        *((family, {}, names) for family, names in LEFT_OUT.items()),
        ("llama", {"target_modules": ["q_proj", "v_proj"]}, ["mlp.down_proj"]),
    ],
    ids=str,
)
def test_what_is_not_computed_again(family: str, values: dict[str, Any], left_out: list[str]) -> None:
    off, full = counted_products(family, values)
    assert full == {name: products + (name not in left_out) for name, products in off.items()}


@pytest.mark.parametrize(("targets", "again"), [(["q_proj"], False), (["q_proj", "down_proj"], True)], ids=str)
def test_a_gain_on_the_last_product_needs_its_value(targets: list[str], again: bool) -> None:
    off, full = counted_products("llama", {"use_dora": True, "target_modules": targets})
    assert (full["mlp.down_proj"] > off["mlp.down_proj"]) is again


def counted_products(family: str, values: dict[str, Any]) -> list[dict[str, int]]:
    """Those of the second layer in a training pass, without and with checkpointing."""
    base = tiny_base(family)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig.model_validate({"r": 4, **values}))
    randomise(adapters, "a")
    layer = decoder_layers(base.module)[1]
    found = []
    for count in (0, 2):
        checkpoint_layers(base, count)
        with Products(linear_weights(layer)) as products:
            results(base, adapters, mixed_batch(("a",) * 4))
        found.append(products.counts)
    return found


def packed(linear: nn.Linear) -> QuantizedLinear:
    layer = QuantizedLinear(linear.in_features, linear.out_features)
    layer.hold(pack_4bit(linear.weight.detach(), "nf4", 64, True))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_in_four_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []

    def counted(*given: Any, **more: Any) -> None:
        products.append(1)
        write_output(*given, **more)

    monkeypatch.setattr(project, "multiplies_all", lambda _: False)  # on AMX small weights are opened
    for in_one_step in ("decoder_layer_of", "feedforward_of"):  # and so are those of layers in one step
        monkeypatch.setattr(fast, in_one_step, lambda *_: None)
    for place in (project, projection):
        monkeypatch.setattr(place, "write_output", counted)
    base, adapters = adapted(dropout=0.1, dtype=dtype)
    for module in list(base.module.modules()):
        if isinstance(module, AdaptedLayer):
            module.base_layer = packed(module.base_layer)  # type: ignore[arg-type]
    batch = mixed_batch(("a", "a", None, "a"))
    off, once = results(base, adapters, batch), len(products)
    checkpoint_layers(base, 2)
    assert_same(results(base, adapters, batch), off)
    assert len(products) - once == 2 * once - 2  # all but the last of each layer


def test_going_backward_the_layers_see_their_own_stream() -> None:
    """Even while another one is active: other bounds, and no adapter."""
    base, adapters = adapted()
    batch, other = mixed_batch(("a",) * 4), batch_of(sequences([45]))
    off = results(base, adapters, batch)
    checkpoint_layers(base, 2)
    for parameter in adapters.parameters("a").values():
        parameter.grad = None
    gradient = -batch.labels.loss_weights
    loss = (gradient * base.log_probabilities(batch, gradient)).sum()
    with running(other):
        loss.backward()
    assert_same([parameter.grad for parameter in adapters.parameters("a").values()], off[2:])  # type: ignore[misc]


def test_gradients_asked_for_by_name() -> None:
    """torch.autograd.grad leaves .grad alone and finds what backward does."""
    base, adapters = adapted()
    batch = mixed_batch(("a",) * 4)
    off = results(base, adapters, batch)
    checkpoint_layers(base, 2)
    parameters = list(adapters.parameters("a").values())
    for parameter in parameters:
        parameter.grad = None
    gradient = -batch.labels.loss_weights
    assert_same(torch.autograd.grad((gradient * base.log_probabilities(batch, gradient)).sum(), parameters), off[2:])
    assert all(parameter.grad is None for parameter in parameters)


def test_an_adapter_that_came_later_is_not_forgotten() -> None:
    """It goes where a bare linear layer stood when checkpointing was switched on."""
    base = tiny_base()
    (adapters := Adapters(base.module)).add("a", AdapterConfig(r=4, target_modules=["q_proj"]))
    checkpoint_layers(base, 2)
    adapters.add("b", AdapterConfig(r=4))
    randomise(adapters, "b")
    batch = mixed_batch(("b",) * 4)
    full = results(base, adapters, batch)
    checkpoint_layers(base, 0)
    assert_same(full, results(base, adapters, batch))


def test_switching_on_leaves_no_trace() -> None:
    """Neither in the adapter nor in the random state nor in the modules; only the layer itself is in training mode."""
    base, adapters = adapted(dropout=0.2)
    names, state = [name for name, _ in base.module.named_modules()], torch.get_rng_state()
    adapters.train("a")
    checkpoint_layers(base, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in adapters.parameters("a").values())
    assert [name for name, _ in base.module.named_modules()] == names
    adapters.train("a", False)
    assert [module for module in base.module.modules() if module.training] == decoder_layers(base.module)[:1]


@contextmanager
def counted_calls(layer: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = layer.get_submodule("self_attn").register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def test_without_gradients_nothing_is_different() -> None:
    base, _ = adapted()
    batch = batch_of(sequences(), "a")

    def outputs() -> tuple[Tensor, list[list[int]]]:
        with torch.no_grad():
            hidden = base.hidden(batch)
        prompts = [part.tolist() for part in sequences()]
        return hidden, generate(base, prompts, ["a"] * len(prompts), [], Sampling(max_new_tokens=4))

    hidden, made = outputs()
    checkpoint_layers(base, 2)
    with counted_calls(decoder_layers(base.module)[0]) as calls:
        again, made_again = outputs()
    assert torch.equal(again, hidden)
    assert made_again == made
    assert len(calls) <= 1 + 4


def test_more_layers_than_there_are() -> None:
    base, _ = adapted()
    for count in (3, -1):
        with pytest.raises(ModelError, match=rf"activation_checkpointing is {count}, and tiny has 2 layers; give at"):
            checkpoint_layers(base, count)


def test_a_family_whose_layers_cannot_be_checkpointed() -> None:
    module = tiny_model("gpt_neox_japanese")
    base = Base(module, None, "neox", "", CONTEXT, LogitRule())  # type: ignore[arg-type]
    checkpoint_layers(base, 0)
    with pytest.raises(ModelError, match="gpt_neox_japanese's layers can't be checkpointed"):
        checkpoint_layers(base, 2)
