"""Decoder layers in one step: the single steps to the bit, threads, memory and its borders, and when they are taken."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reference.compiler import build_kernel
from reference.families import added, chosen_labels, learning_batch, sequences, tiny_base
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.models import fast
from topwork.models.base import Base
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.fast import FastLayer
from topwork.ops import decoder_layer as module
from topwork.ops import decoder_memory, parts
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.batch import Batch, Segment
from topwork.ops.bundles import LowRank
from topwork.ops.context import training_pass
from topwork.ops.decoder_layer import DecoderLayer
from topwork.ops.dropout import Dropout, token_seeds
from topwork.ops.grouped import MOST_ADDENDS
from topwork.ops.native import load
from topwork.ops.packed import pack_4bit
from topwork.ops.parts import Placed
from topwork.ops.projection import Projection
from topwork.ops.prologues import RmsNorm
from topwork.ops.self_attention import HeadNorm, Heads, SelfAttention
from topwork.ops.vectors import Gain
from topwork.ops.workspace import Workspace

BOUNDS = (0, 40, 40, 41, 97, 150)
EVERY = tuple(range(7))
SEEDS = token_seeds(torch.arange(150) // 40, torch.arange(150))


def drawn(
    heads: int = 4, key_heads: int = 2, size: int = 16, d: int = 96, f: int = 160, kind: str = "silu",
    terms: tuple[tuple[int, int, int], ...] = ((0, 150, 32),), biases: torch.dtype | None = None,
    window: int | None = None, norms: torch.dtype = torch.bfloat16, multiplier: float = 1.0,
    of_heads: torch.dtype | None = None, drops: tuple[int, ...] = (), keys: tuple[int, ...] = (0, 0, 2, 3, 3, 3, 6),
) -> DecoderLayer:  # fmt: skip
    """Gate and up stand behind one another, and so do queries, keys and values; `terms` are start, stop and rank,
    and those of the layers `drops` have dropout, by default the same where layers have one input."""
    torch.manual_seed(heads + d + f)
    own, others = heads * size, key_heads * size
    sizes = [(f, d), (f, d), (d, f), (own, d), (others, d), (others, d), (d, own)]
    weights = [(torch.randn(n, k) / k**0.5).bfloat16() for n, k in sizes]
    weights[:2] = torch.cat(weights[:2]).split(f)
    weights[3:6] = torch.cat(weights[3:6]).split([own, others, others])
    placed = [
        Placed(LowRank(start, stop, _master(r, k), _master(n, r), 0.37, _dropout(part, start, stop, drops, keys)), part)
        for part, (n, k) in enumerate(sizes)
        for start, stop, r in terms
    ]
    shifts = tuple(
        None if biases is None or part < 3 else torch.randn(n).to(biases) for part, (n, _) in enumerate(sizes)
    )
    around = RmsNorm(torch.randn(d).to(norms), 1e-5), RmsNorm(torch.randn(d).to(norms), 1e-6, kind == "gelu")
    attention = SelfAttention(Heads(heads, key_heads, size), AttentionRule(size**-0.5, window))
    if of_heads is not None:
        queries, keys = (HeadNorm(torch.randn(size).to(of_heads), eps, kind == "gelu") for eps in (1e-3, 1e-6))
        attention = replace(attention, norms=(queries, keys))
    return DecoderLayer(tuple(weights), shifts, tuple(placed), attention, around, kind, multiplier)


def _dropout(
    part: int, start: int, stop: int, drops: tuple[int, ...], keys: tuple[int, ...] = EVERY
) -> Dropout | None:  # fmt: skip
    return Dropout(0.3, keys[part] + start, SEEDS[start:stop]) if part in drops else None


def _master(n: int, k: int) -> Tensor:
    return (torch.randn(n, k) / k**0.5).requires_grad_()


LAYERS: dict[str, dict[str, Any]] = {
    "one adapter": {},
    "none": {"terms": ()},
    "several": {"terms": ((0, 41, 32), (41, 97, 64), (100, 150, 32))},
    "rows of two": {"terms": ((0, 120, 32), (30, 150, 32))},
    "biases": {"biases": torch.bfloat16, "multiplier": 0.22},
    "biases and norms in fp32": {"biases": torch.float32, "norms": torch.float32, "kind": "gelu"},
    "a window": {"window": 9, "kind": "gelu_tanh"},
    "wide heads": {"heads": 2, "key_heads": 1, "size": 112, "f": 32},
    "an inner width off the grid": {"f": 40, "biases": torch.bfloat16},
    "many stripes": {"terms": tuple((at, at + 30, 16) for at in range(0, 150, 30))},
    "norms of heads": {"of_heads": torch.bfloat16},
    "norms of many heads, in fp32": {"of_heads": torch.float32, "heads": 12, "key_heads": 6, "f": 32, "kind": "gelu"},
    "dropout": {"drops": EVERY},
    "dropout of some of several": {"drops": (0, 4, 5, 6), "terms": ((0, 41, 48), (41, 97, 8), (100, 150, 32))},
    "dropout of rows of two": {"drops": EVERY, "keys": EVERY, "terms": ((0, 120, 40), (30, 150, 16))},
    "dropout and an inner width off the grid": {"drops": (0, 2, 3), "f": 40, "biases": torch.bfloat16},
    "no groups of heads": {"heads": 3, "key_heads": 3, "size": 32, "d": 64, "f": 48},
}
ALL = pytest.mark.parametrize("of", LAYERS)


def given(layer: DecoderLayer) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """A stream, cos and sin, and a gradient."""
    size = layer.attention.heads.size
    x, dx = (torch.randn(1, BOUNDS[-1], layer.hidden) for _ in range(2))
    angles = torch.randn(BOUNDS[-1], size // 2).repeat(1, 2).numpy()
    # not torch's: a thread's first cosine is now and then off by 1.5e-4
    return x, (torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))), dx


def learned(layer: DecoderLayer) -> list[Tensor]:
    return [*(term.a for term, _ in layer.terms), *(term.b for term, _ in layer.terms)]


def results(
    layer: DecoderLayer, step: Callable[..., Tensor], wants: bool = True, memory: Workspace | None = None,
    rows: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The stream behind it (or its `rows`), and the gradients of it (where it is wanted) and of all that learns."""
    torch.manual_seed(1)
    x, rotary, dx = given(layer)
    dx = dx if rows is None else dx[:, rows]
    leaf = x.requires_grad_(wants)
    with training_pass(memory):
        y = step(leaf * 1.0, layer, rotary, BOUNDS)
        wanted = [*([leaf] if wants else []), *learned(layer)]
        return [y.detach().clone(), *(torch.autograd.grad(y, wanted, dx) if wanted else ())]


def in_place(x: Tensor, layer: DecoderLayer, rotary: Any, bounds: tuple[int, ...]) -> Tensor:
    return module.decoder_layer(x, layer, rotary, bounds, in_place=True)


def in_single_steps(x: Tensor, layer: DecoderLayer, rotary: Any, bounds: tuple[int, ...]) -> Tensor:
    return module.in_single_steps(layer, x, rotary, bounds)


@ALL
def test_it_is_the_single_steps_to_the_bit(of: str, on_amx) -> None:
    """But for sums that are made in another order where the layers' weights are multiplied apart, as they are there."""
    layer = drawn(**LAYERS[of])
    found, expected = results(layer, module.decoder_layer), results(layer, in_single_steps)
    assert torch.equal(found[0], expected[0])
    for mine, its in zip(found[1:], expected[1:], strict=True):
        assert relative(mine, its) < 1e-2


def going_on(layer: DecoderLayer, positions: Tensor) -> DecoderLayer:
    """Its terms behind the attention as they are among these rows."""

    def among(placed: Placed) -> Placed:
        if placed.part in module.INPUTS:
            return placed
        start, stop = (int((positions < at).sum()) for at in (placed.term.start, placed.term.stop))
        dropout = placed.term.dropout and replace(placed.term.dropout, seeds=SEEDS[positions][start:stop])
        return placed._replace(term=replace(placed.term, start=start, stop=stop, dropout=dropout))

    return replace(layer, terms=tuple(map(among, layer.terms)))


SOME = {
    "every third": torch.arange(150)[::3],
    "one": torch.tensor([120]),
    "in no order": torch.randperm(150, generator=torch.Generator().manual_seed(1))[:80],
    "all": torch.arange(150),
}


@ALL
@pytest.mark.parametrize("which", SOME)
def test_some_rows_may_go_on(of: str, which: str, on_amx) -> None:
    """They are what single steps make of them to the bit, whatever memory they are in, and nothing reaches others."""
    positions = SOME[which]
    layer = going_on(drawn(**LAYERS[of]), positions)

    def in_one(x: Tensor, *given: Any) -> Tensor:
        return module.decoder_layer(x, *given, in_place=True, positions=positions)

    def one_by_one(x: Tensor, layer: DecoderLayer, rotary: Any, bounds: tuple[int, ...]) -> Tensor:
        return module.in_single_steps(layer, x, rotary, bounds, positions)

    found, expected = results(layer, in_one, rows=positions), results(layer, one_by_one, rows=positions)
    assert found[0].shape == (1, len(positions), layer.hidden)
    assert torch.equal(found[0], expected[0])
    assert all(relative(*pair) < 1e-2 for pair in zip(found[1:], expected[1:], strict=True))
    again = results(layer, in_one, memory=Workspace(), rows=positions)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize("drops", [(), EVERY], ids=["", "with dropout"])
def test_other_adapters_change_nothing(drops: tuple[int, ...], on_amx) -> None:
    """However many there are: what memory their sums would take is theirs."""
    bare, found = drawn(d=256, f=288, terms=()), []
    for others in (0, 1, 20):
        torch.manual_seed(2)
        ranges = (0, 97), *((97 + 2 * i, 99 + 2 * i) for i in range(others))
        terms = [
            Placed(LowRank(start, stop, _master(32, weight.shape[1]), _master(weight.shape[0], 32), 0.37, lost), part)
            for start, stop in ranges
            for part, weight in enumerate(bare.weights)
            for lost in (_dropout(part, start, stop, drops),)
        ]
        y, dx, *grads = results(replace(bare, terms=tuple(terms)), module.decoder_layer)
        found.append([y[:, :97], dx[:, :97], *grads[:7], *grads[len(terms) : len(terms) + 7]])
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("rows", [None, torch.arange(0, 150, 2)], ids=["all go on", "some go on"])
@pytest.mark.parametrize("of", ["several", "dropout of some of several"])
@pytest.mark.parametrize("most", [1, 20000])
def test_gradients_that_are_products_after_all(
    most: int,
    of: str,
    rows: Any,
    on_amx,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all sums there is too little memory for all, or for some."""
    layer = drawn(**LAYERS[of])
    layer = layer if rows is None else going_on(layer, rows)

    def step(x: Tensor, *given: Any) -> Tensor:
        return module.decoder_layer(x, *given, positions=rows)

    expected, usual = results(layer, step, rows=rows), load.compiled
    how = request.node.callspec.params["amx_kernels"]
    library = build_kernel("decoder", f"{how} -DMOST_SUMS={most}", tmp_path)
    monkeypatch.setattr(load, "compiled", lambda name: library if name == "decoder" else usual(name))
    found = results(layer, step, rows=rows)
    assert torch.equal(found[0], expected[0])
    assert all(relative(*pair) < 1e-5 for pair in zip(found, expected, strict=True))


@ALL
def test_the_number_of_threads_changes_nothing(of: str, on_amx) -> None:
    layer, found = drawn(**LAYERS[of]), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(layer, module.decoder_layer))
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@ALL
def test_a_workspace_changes_nothing(of: str, on_amx) -> None:
    layer = drawn(**LAYERS[of])
    expected = results(layer, module.decoder_layer)
    for found in (
        results(layer, module.decoder_layer, memory=Workspace()),
        results(layer, in_place, memory=Workspace()),
    ):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_gradient_that_nobody_wants_changes_no_other(on_amx) -> None:
    layer = drawn(**LAYERS["several"])
    found, expected = (results(layer, module.decoder_layer, wants) for wants in (False, True))
    assert all(torch.equal(*pair) for pair in zip(found[1:], expected[2:], strict=True))


def test_without_positions(on_amx) -> None:
    layer = drawn()

    def without(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, layer, _, bounds: step(x, layer, None, bounds)

    found, expected = results(layer, without(module.decoder_layer)), results(layer, without(in_single_steps))
    assert torch.equal(found[0], expected[0])
    assert all(relative(*pair) < 1e-2 for pair in zip(found, expected, strict=True))
    assert not torch.equal(found[0], results(layer, module.decoder_layer)[0])


@ALL
def test_a_layer_that_runs_again_may_leave_its_end_out(of: str, on_amx) -> None:
    layer = drawn(**LAYERS[of])

    def again(x: Tensor, *given: Any) -> Tensor:
        return module.decoder_layer(x, *given, skip_forward=True)

    found, expected = results(layer, again), results(layer, module.decoder_layer)
    assert not torch.equal(found[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(found[1:], expected[1:], strict=True))


def test_what_it_is_given_stays_as_it_was(on_amx) -> None:
    layer = drawn()
    x, rotary, dx = given(layer)
    before, gradient = x.clone(), dx.clone()
    y = module.decoder_layer(x.requires_grad_(), layer, rotary, BOUNDS)
    torch.autograd.grad(y, (x, *learned(layer)), dx)
    assert torch.equal(x, before)
    assert torch.equal(dx, gradient)
    with torch.no_grad():
        assert torch.equal(module.decoder_layer(x, layer, rotary, BOUNDS), y)
    module.decoder_layer(x.view(x.shape), layer, rotary, BOUNDS, in_place=True)  # autograd refuses to mark a view
    assert torch.equal(x, before)


def test_it_goes_backward_once(on_amx) -> None:
    """Gate's and up's gradients take their place."""
    layer = drawn()
    x, rotary, dx = given(layer)
    y = module.decoder_layer(x, layer, rotary, BOUNDS)
    torch.autograd.grad(y, learned(layer), dx, retain_graph=True)
    with pytest.raises(RuntimeError, match="went backward already"):
        torch.autograd.grad(y, learned(layer), dx)


def test_or_the_stream_is_overwritten_and_its_gradient_too(on_amx) -> None:
    layer = drawn()
    x, rotary, dx = given(layer)
    stream = x.requires_grad_() * 1.0
    with training_pass(Workspace()):
        y = module.decoder_layer(stream, layer, rotary, BOUNDS, in_place=True)
        (back,) = torch.autograd.grad(y, stream, dx)
    assert y.data_ptr() == stream.data_ptr()
    assert back.data_ptr() == dx.data_ptr()


def test_a_gradient_may_have_been_expanded(on_amx) -> None:
    layer = drawn()
    x, rotary, _ = given(layer)
    leaf = x.requires_grad_()
    found = torch.autograd.grad(module.decoder_layer(leaf * 1.0, layer, rotary, BOUNDS).sum(), leaf)
    ones = torch.ones(x.shape)
    expected = torch.autograd.grad(module.decoder_layer(leaf * 1.0, layer, rotary, BOUNDS), leaf, ones)
    assert torch.equal(*found, *expected)


def test_packed_weights_are_what_they_stand_for(on_amx) -> None:
    layer = drawn(**LAYERS["biases"])
    packed = replace(layer, weights=tuple(pack_4bit(weight, "nf4", 32, True) for weight in layer.weights))
    dense = replace(packed, weights=tuple(chain(*(parts.opened(packed.weights[group]) for group in module.GROUPS))))
    found, expected = results(packed, module.decoder_layer), results(dense, module.decoder_layer)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("f", [40, 160])
def test_packed_weights_give_what_single_steps_give(f: int, on_amx) -> None:
    """Those join packed layers too, where all of their terms can be added before a sum is rounded."""
    layer = drawn(f=f, d=64)
    layer = replace(layer, weights=tuple(pack_4bit(weight, "nf4", 32, True) for weight in layer.weights))
    found, expected = results(layer, module.decoder_layer), results(layer, in_single_steps)
    assert torch.equal(found[0], expected[0])
    assert all(relative(*pair) < 1e-2 for pair in zip(found, expected, strict=True))


def test_what_is_not_finite_stays_in_its_sequence(on_amx) -> None:
    """An adapter that has diverged, beside another."""
    layer = drawn(terms=((0, 41, 5), (41, 150, 16)))
    expected = results(layer, module.decoder_layer)
    with torch.no_grad():
        for term, _ in layer.terms[::2]:
            term.b[7, 1], term.a[1, 7] = torch.inf, torch.nan
    found = results(layer, module.decoder_layer)
    for mine, its in zip(found[:2], expected[:2]):
        assert mine[0, :41].isnan().any()
        assert relative(mine[0, 41:], its[0, 41:]) < 1e-2
    half = len(layer.terms)
    for number in (*range(1, half, 2), *range(half + 1, 2 * half, 2)):
        assert relative(found[2 + number], expected[2 + number]) < 1e-2


@pytest.mark.parametrize("of", ["several", "norms of heads", "norms of many heads, in fp32"])
@pytest.mark.parametrize("rows", [None, torch.arange(0, 150, 2)], ids=["all go on", "some go on"])
def test_only_its_own_memory_is_written(of: str, rows: Any, on_amx, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept and what is needed for a moment stand between borders, and are not a number at first."""
    layer, rooms = drawn(**LAYERS[of]), list[Tensor]()
    layer = layer if rows is None else going_on(layer, rows)

    def step(x: Tensor, *given: Any) -> Tensor:
        return module.decoder_layer(x, *given, positions=rows)

    expected = results(layer, step, rows=rows)

    def bordered(_: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        assert dtype == torch.uint8
        rooms.append(torch.full((size + 512,), 255, dtype=dtype))
        return rooms[-1][256:-256]

    monkeypatch.setattr(module, "saved_empty", bordered)
    for name in ("scratch_empty", "handoff_empty", "handback_empty"):
        monkeypatch.setattr(decoder_memory, name, bordered)
    found = results(layer, step, rows=rows)
    assert len(rooms) == 7
    assert all((room[:256] == 255).all() and (room[-256:] == 255).all() for room in rooms)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_learns_may_not_change_before_the_gradient(on_amx) -> None:
    layer = drawn()
    x, rotary, _ = given(layer)
    with training_pass(Workspace()):
        y = module.decoder_layer(x, layer, rotary, BOUNDS)
        with torch.no_grad():
            layer.terms[0].term.a.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), learned(layer))


def with_heads(layer: DecoderLayer, heads: Heads) -> DecoderLayer:
    return replace(layer, attention=replace(layer.attention, heads=heads))


def wrong() -> Iterator[Any]:
    layer = drawn(**LAYERS["biases"])
    x, (cos, sin), _ = given(layer)
    gate, *others = layer.weights
    norm, other = layer.norms
    short = replace(layer.terms[0].term, stop=151)
    yield "layers", (x, replace(layer, weights=(gate.t(), *others)), (cos, sin), BOUNDS)
    yield "layers", (x[:, :-1].contiguous(), layer, (cos, sin), BOUNDS)
    yield "layers", (x.double(), layer, (cos, sin), BOUNDS)
    yield "layers", (x.transpose(1, 2).contiguous().transpose(1, 2), layer, (cos, sin), BOUNDS)
    yield "biases", (x, replace(layer, biases=(None, None, None, torch.zeros(3), None, None, None)), (cos, sin), BOUNDS)
    yield "norms", (x, replace(layer, norms=(replace(norm, weight=torch.ones(95)), other)), (cos, sin), BOUNDS)
    normed = replace(
        layer.attention, norms=(HeadNorm(torch.ones(16), 1e-5, False), HeadNorm(torch.ones(8), 1e-5, False))
    )
    yield "norms", (x, replace(layer, attention=normed), (cos, sin), BOUNDS)
    yield "cos is", (x, layer, (cos, sin[:, :-2]), BOUNDS)
    yield "cos and sin are", (x, layer, (cos[:-1], sin[:-1]), BOUNDS)
    yield "cos and sin are", (x, layer, (cos.half(), sin.half()), BOUNDS)
    yield "cos and sin are", (x, layer, (cos[:, :-1], sin[:, :-1]), BOUNDS)
    yield "cos and sin are", (x, layer, (cos.repeat(1, 2), sin.repeat(1, 2)), BOUNDS)
    yield "cos of strides", (x, layer, (cos, torch.empty(150, 32)[:, :16].copy_(sin)), BOUNDS)
    yield "bounds", (x, layer, (cos, sin), (0, 150, 40, 150))
    yield "bounds", (x, layer, (cos, sin), (1, 150))
    yield "3 heads of queries", (x, with_heads(layer, Heads(3, 2, 16)), (cos, sin), BOUNDS)
    yield "4 heads of queries", (x, with_heads(layer, Heads(4, 2, 24)), (cos, sin), BOUNDS)
    yield "a term of rows", (x, replace(layer, terms=(Placed(short, 0),)), (cos, sin), BOUNDS)
    for seeds in (SEEDS[1:], SEEDS.repeat(2)[::2], SEEDS.int()):
        lost = replace(layer.terms[0].term, dropout=Dropout(0.1, 1, seeds))
        yield "dropout seeds", (x, replace(layer, terms=(Placed(lost, 0),)), (cos, sin), BOUNDS)
    for rows in (torch.tensor([150]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor([], dtype=torch.int64)):
        yield "positions", (x, replace(layer, terms=()), (cos, sin), BOUNDS, False, False, rows)
    yield "a term of rows", (x, layer, (cos, sin), BOUNDS, False, False, torch.arange(149))


@pytest.mark.parametrize("case", wrong(), ids=lambda case: case[0])
def test_what_does_not_belong_together_is_refused(case: Any) -> None:
    with pytest.raises(ValueError, match=case[0]):
        module.decoder_layer(*case[1])


def asked(
    change: Callable[[list[Projection]], object] = lambda _: None, attention: dict[str, Any] | None = None,
    norm: torch.dtype = torch.bfloat16, stream: Callable[[Tensor], Tensor] = lambda x: x,
) -> DecoderLayer | None:  # fmt: skip
    """What is made of a layer of which something is otherwise."""
    layer = drawn()
    layers = [
        Projection(weight, bias, tuple(term for term, its in layer.terms if its == part))
        for part, (weight, bias) in enumerate(zip(layer.weights, layer.biases))
    ]
    change(layers)
    gate, up, down, *inputs, output = layers
    norms = tuple(replace(norm_, weight=norm_.weight.to(norm)) for norm_ in layer.norms)
    how = replace(layer.attention, **(attention or {}))
    x = stream(torch.randn(1, BOUNDS[-1], layer.hidden))
    if not module.at_once(x, norms[0].weight):
        return None
    return module.decoder_layer_of(inputs, output, (gate, up), down, norms, how, "silu", 1.0)


def put(part: int, **values: Any) -> Callable[[list[Projection]], object]:
    return lambda layers: layers.__setitem__(part, replace(layers[part], **values))


def dropping(layers: list[Projection]) -> None:
    (term,) = layers[4].terms
    with_gaps = Dropout(0.1, 1, SEEDS.repeat(2)[::2])
    layers[4] = replace(layers[4], terms=(replace(term, dropout=with_gaps),))


def crowded(layers: list[Projection]) -> None:
    layers[0] = replace(layers[0], bias=torch.zeros(160), terms=layers[0].terms * (MOST_ADDENDS - 1))


def of_heads(*weights: Tensor) -> tuple[HeadNorm, ...]:
    return tuple(HeadNorm(weight, 1e-5, False) for weight in weights)


ONES = torch.ones(64)
NOT_FOR: dict[str, dict[str, Any]] = {
    "a norm of all heads together": {
        "attention": {"norms": tuple(HeadNorm(torch.ones(n), 1e-5, False) for n in (64, 32))}
    },
    "norms of heads in fp16": {"attention": {"norms": (HeadNorm(torch.ones(16).half(), 1e-5, False),) * 2}},
    "sinks": {"attention": {"sinks": torch.zeros(4)}},
    "what looks at its products again": {"attention": {"restores": True}},
    "scores that are capped": {"attention": {"rule": AttentionRule(0.25, softcap=2.0)}},
    "scores of no scale": {"attention": {"rule": AttentionRule(0.0)}},
    "no window at all": {"attention": {"rule": AttentionRule(0.25, 0)}},
    "heads of another width": {"attention": {"heads": Heads(4, 2, 24)}},
    "norms in fp32": {"norm": torch.float32},
    "a weight in fp32": {"change": put(6, weight=torch.zeros(96, 64))},
    "a weight by columns": {"change": put(6, weight=torch.zeros(64, 96).bfloat16().t())},
    "a bias in fp16": {"change": put(3, bias=torch.zeros(64).half())},
    "a gain": {"change": put(3, gains=(Gain(0, 150, ONES),))},
    "a gain on inputs": {"change": put(6, input_gains=(Gain(0, 150, ONES),))},
    "dropout by seeds with gaps": {"change": dropping},
    "more addends than fit": {"change": crowded},
    "a stream with gaps": {"stream": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)},
    "a stream in bf16": {"stream": lambda x: x.bfloat16()},
}


@pytest.mark.parametrize("name", NOT_FOR)
def test_layers_that_it_does_not_know(name: str, on_amx) -> None:
    assert asked() is not None
    assert asked(**NOT_FOR[name]) is None


# Models

FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (2, {}),
    "mistral": (3, {"num_hidden_layers": 3}),
    "qwen2": (2, {}),
    "granite": (2, {}),
    "smollm3": (2, {}),
    "qwen3": (2, {}),
    "olmo2": (0, {}),  # norms that follow
    "gemma2": (0, {}),  # both, and scores that are capped
    "phi3": (0, {}),  # one weight for queries, keys and values
}
"""How many layers are made in one step, and values of the model."""


def adapted(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Base, Adapters]:
    values = FAMILIES[family][1] if family in FAMILIES else {}
    base = tiny_base(family, dtype=dtype, **values)
    return base, added(base, a=AdapterConfig.model_validate({"r": 32, **options}), b=AdapterConfig(r=4))


@pytest.fixture
def calls(on_amx, monkeypatch: pytest.MonkeyPatch) -> list[DecoderLayer]:
    """Of each layer that is made in one step."""
    made: list[DecoderLayer] = []
    monkeypatch.setattr(fast, "decoder_layer", lambda *of: made.append(of[1]) or module.decoder_layer(*of))
    return made


def gradients(base: Base, adapters: Adapters, batch: Batch, workspace: bool = True) -> list[Tensor]:
    """Log-probabilities, and what they give all adapters of the batch."""
    names = {segment.adapter for segment in batch.segments}
    parameters = [x for name in sorted(filter(None, names)) for x in adapters.parameters(name).values()]
    factor = -batch.labels.loss_weights
    with training_pass(Workspace() if workspace else None):
        values = base.log_probabilities(batch, factor)
        return [values.detach().clone(), *torch.autograd.grad((factor * values).sum(), parameters)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("members", "lora_dropout"), [("a", 0.0), ("a", 0.2), ("ab", 0.0), ("ab", 0.2)])
def test_a_model_has_the_same_gradients(
    family: str, members: str, lora_dropout: float, calls: list[DecoderLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = adapted(family, lora_dropout=lora_dropout)
    adapters.train("a")
    batch = learning_batch(sequences(), "a")
    if members == "ab":
        cuts = batch.cu_seqlens[0], batch.cu_seqlens[2], batch.cu_seqlens[-1]
        batch = replace(batch, segments=tuple(Segment(*span, name) for span, name in zip(zip(cuts, cuts[1:]), "ab")))
    found = gradients(base, adapters, batch)
    assert len(calls) == FAMILIES[family][0]
    calls.clear()
    monkeypatch.setattr(fast, "decoder_layer_of", lambda *_: None)
    expected = gradients(base, adapters, batch)
    assert not calls
    assert torch.equal(found[0], expected[0])
    assert all(relative(*pair) < 1e-2 for pair in zip(found, expected, strict=True))


OTHERWISE: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "ia3": {"method": "ia3", "r": None},
    "bitfit": {"method": "bitfit", "r": None},
    "prefixes": {"method": "prefix", "r": None, "num_virtual_tokens": 3},
}


@pytest.mark.parametrize(("family", "values"), [("gemma2", {"attn_logit_softcapping": None}), ("olmo2", {})])
def test_not_where_norms_follow(family: str, values: dict[str, Any], calls: list[DecoderLayer]) -> None:
    base = tiny_base(family, dtype=torch.bfloat16, **values)
    adapters = added(base, a=AdapterConfig(r=4))
    gradients(base, adapters, learning_batch(sequences(), "a"))
    assert not calls


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_it_is_not_for(name: str, calls: list[DecoderLayer]) -> None:
    options = {key: value for key, value in OTHERWISE[name].items() if value is not None}
    base = tiny_base("qwen2", dtype=torch.bfloat16)
    options = options if "method" in options else {"r": 4, **options}
    adapters = added(base, a=AdapterConfig.model_validate(options))
    adapters.train("a")
    gradients(base, adapters, learning_batch(sequences(), "a"))
    assert not calls


def test_nor_in_fp32(calls: list[DecoderLayer]) -> None:
    gradients(*adapted(dtype=torch.float32), learning_batch(sequences(), "a"))
    assert not calls


def test_a_batch_that_wants_no_rows(calls: list[DecoderLayer]) -> None:
    (base, adapters), batch = adapted(), learning_batch(sequences(), "a")
    none = replace(batch, labels=chosen_labels(batch, torch.tensor([], dtype=torch.int64)))
    with training_pass(Workspace()):
        assert not len(base.log_probabilities(none, -none.labels.loss_weights))
    assert adapters
    assert not calls


def test_workspaces_and_checkpoints_change_no_bit(calls: list[DecoderLayer]) -> None:
    (base, adapters), batch = adapted("mistral"), learning_batch(sequences(), "a")
    expected = gradients(base, adapters, batch)
    assert len(calls) == 3
    found = [gradients(base, adapters, batch, workspace=False)]
    for layers, runs in ((1, 4), (3, 6)):
        checkpoint_layers(base, layers)
        calls.clear()
        found.append(gradients(base, adapters, batch))
        assert len(calls) == runs
    for each in found:
        assert all(torch.equal(*pair) for pair in zip(each, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(base.log_probabilities(batch), expected[0])


def test_a_plain_layer_is_handed_what_it_multiplies(calls: list[DecoderLayer], monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapters = adapted()
    batch, layer = learning_batch(sequences(), "a"), next(x for x in base.module.modules() if isinstance(x, FastLayer))
    layer.before_another, types = False, list[torch.dtype]()
    layer.register_forward_hook(lambda _, __, out: types.append(out.dtype))
    found = gradients(base, adapters, batch)
    assert len(calls) == 2
    monkeypatch.setattr(fast, "decoder_layer_of", lambda *_: None)
    expected = gradients(base, adapters, batch)
    assert types == [torch.bfloat16] * 2
    assert torch.equal(found[0], expected[0])
    assert all(relative(*pair) < 1e-2 for pair in zip(found, expected, strict=True))


def test_nor_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "compiled", lambda _: None)
    monkeypatch.setattr(fast, "decoder_layer", None)
    gradients(*adapted(), learning_batch(sequences(), "a"))
