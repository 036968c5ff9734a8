"""When a feed-forward layer is made in one step, and that autograd, workspaces and checkpoints see no difference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference.families import learning_batch, randomise, sequences, tiny_base
from reference.feedforward import CASES, ROUNDING, drawn, learned, rows_of
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.models import fast
from topwork.models.checkpointing import checkpoint_layers
from topwork.ops import feedforward as module
from topwork.ops import parts
from topwork.ops.bundles import LowRank
from topwork.ops.context import training_pass
from topwork.ops.dropout import Dropout
from topwork.ops.feedforward import GATE, UP
from topwork.ops.grouped import MOST_ADDENDS
from topwork.ops.native import load
from topwork.ops.packed import pack_4bit
from topwork.ops.projection import Projection
from topwork.ops.prologues import Identity, Prologue, RmsNorm
from topwork.ops.vectors import Gain, Shift
from topwork.ops.workspace import Workspace


@pytest.mark.parametrize("prologue", [Identity(), RmsNorm(torch.ones(96), 1e-5, hands_back=True)], ids=["bare", "norm"])
@pytest.mark.parametrize("skip_forward", [False, True])
def test_a_workspace_changes_nothing(prologue: Prologue, skip_forward: bool, on_amx) -> None:
    layer, (x, dy) = drawn(CASES[5]), rows_of(CASES[5])
    expected: list[Tensor] = []
    for keeps in (True, False):
        for memory in (None, Workspace()):
            leaf = x.clone().requires_grad_()
            with training_pass(memory):
                y = module.feedforward(leaf, layer, prologue, keeps, skip_forward)
                assert not skip_forward or not y.any()
                found = [y, *torch.autograd.grad(y, (leaf, *learned(layer)), dy)]
                expected = expected or [tensor.clone() for tensor in found]
                assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with torch.no_grad():
        bare = module.feedforward(x, layer, prologue)
    assert skip_forward or torch.equal(bare, expected[0])
    y = module.feedforward(x, layer, prologue)  # of which x does not learn
    assert all(
        torch.equal(*pair) for pair in zip(torch.autograd.grad(y, learned(layer), dy), expected[2:], strict=True)
    )
    y = module.feedforward(x, layer, prologue)
    for one, its in zip(torch.autograd.grad(y.sum(), learned(layer)), expected[2:], strict=True):
        assert one.shape == its.shape, "of a gradient that was expanded"


def test_packed_weights_are_what_they_stand_for(on_amx) -> None:
    layer, (x, dy) = drawn(CASES[5]), rows_of(CASES[5])
    packed = replace(layer, weights=tuple(pack_4bit(w, "nf4", 32, True) for w in layer.weights))
    gate, up, down = packed.dense()
    dense = replace(layer, weights=(*torch.cat([gate, up]).split(layer.features), down))
    results = []
    for each, memory in ((dense, None), (packed, None), (packed, Workspace())):
        leaf = x.clone().requires_grad_()
        with training_pass(memory):
            y = module.feedforward(leaf, each)
            results.append([tensor.clone() for tensor in (y, *torch.autograd.grad(y, (leaf, *learned(each)), dy))])
    for found in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], found, strict=True))


def test_a_gradient_of_turned_rows_is_that_of_others(on_amx) -> None:
    layer, (x, dy) = drawn(CASES[5]), rows_of(CASES[5])
    found = []
    for grad in (dy, dy.t().contiguous().t()):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(module.feedforward(leaf, layer), (leaf, *learned(layer)), grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_does_not_belong_together_is_refused() -> None:
    layer, (x, _) = drawn(CASES[5]), rows_of(CASES[5])
    gate, up, down = layer.weights
    turned = replace(layer, weights=(gate, up, down.t()))
    for wrong, rows in ((turned, x), (layer, x[:149])):
        with pytest.raises(ValueError, match="are expected"):
            module.feedforward(rows, wrong)


def test_what_learns_may_not_change_before_the_gradient(on_amx) -> None:
    layer, (x, dy) = drawn(CASES[5]), rows_of(CASES[5])
    y = module.feedforward(x, layer)
    with torch.no_grad():
        layer.terms[0].term.a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, learned(layer), dy)


GATE_UP_DOWN = [Projection(torch.zeros(*of).bfloat16()) for of in ((96, 64), (96, 64), (64, 96))]


def low(start: int, stop: int, a: Tensor | None = None, b: Tensor | None = None, **others: Dropout) -> LowRank:
    """A term of gate."""
    return LowRank(
        start, stop, torch.zeros(4, 64) if a is None else a, torch.zeros(96, 4) if b is None else b, 1.0, **others
    )


def best_at_once(change: dict[str, object], part: int = GATE, x: Tensor | None = None) -> bool:
    layers = [replace(layer, **change) if at == part else layer for at, layer in enumerate(GATE_UP_DOWN)]
    x = torch.zeros(192, 64).bfloat16() if x is None else x
    found = module.feedforward_of(x, layers[:2], layers[2], "silu")
    assert found is None or found.weights[part] is layers[part].weight
    return found is not None


SEEDS = torch.zeros(192, dtype=torch.int64)
NOT_FOR_IT: dict[str, dict[str, object]] = {
    "a bias": {"bias": torch.zeros(96)},
    "a gain": {"gains": (Gain(0, 192, torch.ones(96)),)},
    "a gain on inputs": {"input_gains": (Gain(0, 192, torch.ones(64)),)},
    "a shift": {"shifts": (Shift(0, 192, torch.ones(96)),)},
    "dropout by seeds with gaps": {"terms": (low(0, 192, dropout=Dropout(0.1, 0, SEEDS.repeat(2)[::2])),)},
    "A in 16 bits": {"terms": (low(0, 192, torch.zeros(4, 64).bfloat16()),)},
    "a turned B": {"terms": (low(0, 192, b=torch.zeros(4, 96).t()),)},
    "a weight in fp32": {"weight": torch.zeros(96, 64)},
    "a weight in fp16": {"weight": torch.zeros(96, 64).half()},
    "a weight packed from fp32": {"weight": pack_4bit(torch.zeros(96, 64), "nf4", 64, True)},
    "a turned weight": {"weight": torch.zeros(64, 96).bfloat16().t()},
}


@pytest.mark.parametrize("why", NOT_FOR_IT)
def test_what_it_is_not_for(why: str, on_amx) -> None:
    assert not best_at_once(NOT_FOR_IT[why])


def test_what_it_is_for(on_amx, monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_at_once({})
    assert best_at_once({"terms": (low(0, 192, dropout=Dropout(0.1, 0, SEEDS)),)})
    assert best_at_once({"terms": (low(0, 192),) * MOST_ADDENDS}, UP)
    assert not best_at_once({"terms": (low(0, 192),) * (MOST_ADDENDS + 1)}, UP)
    packed = {"weight": pack_4bit(torch.zeros(96, 64).bfloat16(), "nf4", 64, True)}
    assert best_at_once(packed)
    monkeypatch.setattr(parts, "MOST_OPENED", 2 * 96 * 64 - 1)
    assert not best_at_once(packed)
    for x in (torch.zeros(192, 64), torch.zeros(192, 64).half()):
        assert not best_at_once({}, x=x)
    given = torch.zeros(192, 64).bfloat16()
    assert module.feedforward_of(given, GATE_UP_DOWN, GATE_UP_DOWN[2], "silu") is None
    assert module.feedforward_of(given, GATE_UP_DOWN[:2], None, "silu") is None


def test_nor_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "compiled", lambda _: None)
    assert not best_at_once({})


def test_a_model_has_the_same_gradients_whatever_is_checkpointed(on_amx, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(dtype=torch.bfloat16)
    adapters, batch, calls = Adapters(base.module), learning_batch(sequences(), "a"), []
    adapters.add("a", AdapterConfig(r=4))
    randomise(adapters, "a")
    parameters = list(adapters.parameters("a").values())

    def results(layers: int) -> list[Tensor]:
        checkpoint_layers(base, layers)
        gradient = -batch.labels.loss_weights
        calls.clear()
        values = base.log_probabilities(batch, gradient)
        return [values.detach(), *torch.autograd.grad((gradient * values).sum(), parameters)]

    monkeypatch.setattr(fast, "decoder_layer_of", lambda *_: None)
    monkeypatch.setattr(fast, "feedforward", lambda *given: calls.append(given[-1]) or module.feedforward(*given))
    expected = results(0)
    assert calls == [False, False]
    for layers, skipped in ((1, [True]), (2, [True, True])):
        assert all(torch.equal(*pair) for pair in zip(results(layers), expected, strict=True))
        assert calls == [False, False, *skipped]
    monkeypatch.setattr(fast, "feedforward_of", lambda *_: None)
    assert relative(results(0), expected) < ROUNDING
    assert not calls
