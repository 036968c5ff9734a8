"""Virtual tokens in a batch: rows put in front and taken away again, packed as alone, checkpointed as not."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference.families import added, chosen_labels, learning_batch, logits, sequences, tiny_base
from reference.measure import GRADIENTS_APART, LOGITS_APART, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import ModelError
from topwork.models.base import Base
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.virtual import expanded
from topwork.ops.batch import Batch, Labels, Segment, batch_of
from topwork.ops.context import Virtual
from topwork.ops.packed import pack_4bit
from topwork.quantization.linear import QuantizedLinear

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "gpt_oss", "olmo2"]
"""Grouped keys, head norms, windows and soft caps, learned positions, joined projections, sinks, norms after."""
NAMES = ("prefix", "prefix", "lora", "prompt", None, "prefix")
LENGTHS = (13, 1, 7, 24, 5, 9)


def adapted(family: str, dtype: torch.dtype = torch.float32) -> tuple[Base, Adapters]:
    base = tiny_base(family, dtype)
    adapters = added(
        base,
        prefix=AdapterConfig(method="prefix", num_virtual_tokens=3),
        prompt=AdapterConfig(method="prompt", num_virtual_tokens=4),
        lora=AdapterConfig(r=4, lora_alpha=8),
    )
    widen(adapters, "prefix")
    return base, adapters


def widen(adapters: Adapters, name: str) -> None:
    """Keys as large as the base's own, so that a mistake is seen."""
    with torch.no_grad():
        for parameter in adapters.parameters(name).values():
            parameter.normal_(std=0.7, generator=torch.Generator().manual_seed(3))


def mixed() -> Batch:
    batch = learning_batch(sequences(LENGTHS))
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    return replace(batch, segments=tuple(Segment(*span, name) for span, name in zip(spans, NAMES)))


def gradients(base: Base, adapters: Adapters, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The log-probabilities and each adapter's gradients of the weighted sum over all batches."""
    found = []
    for batch in batches:
        logprobs = base.log_probabilities(batch, -batch.labels.loss_weights)
        if logprobs.requires_grad:  # the bare base's has none
            (-batch.labels.loss_weights * logprobs).sum().backward()
        found.append(logprobs.detach())
    grads: dict[str, list[Tensor]] = {}
    for name in adapters.configs:
        parameters = adapters.parameters(name).values()
        grads[name] = [p.grad for p in parameters if p.grad is not None]
        assert len(grads[name]) == len(parameters)
        for parameter in parameters:
            parameter.grad = None
    return torch.cat(found), grads


def apart(batch: Batch) -> list[Batch]:
    """Each sequence with something to learn in a batch of its own."""
    found = []
    for (start, stop), segment in zip(zip(batch.cu_seqlens, batch.cu_seqlens[1:]), batch.segments):
        at = (batch.labels.positions >= start) & (batch.labels.positions < stop)
        if at.any():
            one = batch_of([batch.tokens[start:stop]], segment.adapter)
            labels = chosen_labels(batch, at)
            found.append(replace(one, labels=replace(labels, positions=labels.positions - start)))
    return found


def test_rows_move_and_come_back() -> None:
    batch = replace(
        batch_of([torch.tensor([7, 8]), torch.tensor([9]), torch.tensor([4, 5, 6]), torch.tensor([3])]),
        segments=(Segment(0, 3, "a"), Segment(3, 6, None), Segment(6, 7, "b")),
        labels=Labels(torch.tensor([0, 4])), output_positions=torch.tensor([1, 2, 6]),
    )  # fmt: skip
    found = expanded(batch, {"a": Virtual(2), "b": Virtual(1)})
    run = found.batch
    assert run.tokens.tolist() == [0, 0, 7, 8, 0, 0, 9, 4, 5, 6, 0, 3]
    assert run.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 1]
    assert run.cu_seqlens == (0, 4, 7, 10, 12)
    assert run.segments == (Segment(0, 7, "a"), Segment(7, 10, None), Segment(10, 12, "b"))
    assert [virtual.rows.tolist() for virtual in found.virtual] == [[0, 1, 4, 5], [10]]
    assert (run.labels.positions.tolist(), run.output_positions.tolist()) == ([2, 8], [3, 6, 11])
    hidden = torch.arange(12.0)[:, None]
    assert found.back(hidden)[:, 0].tolist() == [2, 3, 6, 7, 8, 9, 11]
    assert len(found.back(hidden[:3])) == 3


def test_an_adapter_in_several_segments_and_an_empty_sequence() -> None:
    tokens = torch.tensor([5, 6, 7])
    batch = Batch(
        tokens, torch.tensor([0, 0, 0]), (0, 1, 1, 2, 3),
        (Segment(0, 1, "a"), Segment(1, 2, None), Segment(2, 3, "a")),
    )  # fmt: skip
    found = expanded(batch, {"a": Virtual(2)})
    run = found.batch
    assert run.tokens.tolist() == [0, 0, 5, 6, 0, 0, 7]
    assert run.cu_seqlens == (0, 3, 3, 4, 7)
    assert [virtual.rows.tolist() for virtual in found.virtual] == [[0, 1, 4, 5]]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone(family: str) -> None:
    """Values and gradients, beside a LoRA and the bare base; and the base's own rows are as if nothing were there."""
    base, adapters = adapted(family)
    batch = mixed()
    together, grads = gradients(base, adapters, [batch])
    alone, expected = gradients(base, adapters, apart(batch))
    assert relative(together, alone) < LOGITS_APART
    for name in adapters.configs:
        assert relative(grads[name], expected[name]) < GRADIENTS_APART, name
        assert all(grad.abs().max() > 0 for grad in grads[name]), name
    bare = batch_of([sequences(LENGTHS)[4]])
    before = logits(base, bare)
    for name in list(adapters.configs):
        adapters.remove(name)
    assert torch.equal(logits(base, bare), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit(family: str) -> None:
    base, adapters = adapted(family)
    batch = mixed()
    values, grads = gradients(base, adapters, [batch])
    for count in (1, 2):
        checkpoint_layers(base, count)
        found, again = gradients(base, adapters, [batch])
        assert torch.equal(found, values)
        for name in adapters.configs:
            assert all(map(torch.equal, again[name], grads[name])), name


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_a_virtual_adapter_alone_learns_under_checkpointing(name: str) -> None:
    """No layer's own parameter learns then, and the first layer's input needs no gradient."""
    base, adapters = adapted("llama")
    for other in {"prefix", "prompt", "lora"} - {name}:
        adapters.remove(other)
    batch = learning_batch(sequences(LENGTHS), name)
    _, grads = gradients(base, adapters, [batch])
    checkpoint_layers(base, 2)
    _, again = gradients(base, adapters, [batch])
    assert all(map(torch.equal, again[name], grads[name]))


def test_the_first_layer_is_recomputed_too() -> None:
    """With a prefix alone neither its input nor its own parameters learn, yet it keeps nothing."""
    base, adapters = adapted("gpt2")
    for other in ("prompt", "lora"):
        adapters.remove(other)
    checkpoint_layers(base, 2)
    calls = []
    for path, module in base.module.named_modules():
        if path.endswith(".attn"):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    gradients(base, adapters, [learning_batch(sequences(LENGTHS), "prefix")])
    assert [path.split(".")[2] for path in calls] == ["0", "1", "1", "0"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_fast_layers_are_the_plain_ones(family: str) -> None:
    fast, adapters = adapted(family)
    plain, theirs = plain_base(family)
    for name in adapters.configs:
        theirs.load(name, adapters.state(name))
    batch = mixed()
    values, grads = gradients(fast, adapters, [batch])
    expected, wanted = gradients(plain, theirs, [batch])
    assert relative(values, expected) < LOGITS_APART
    for name in adapters.configs:
        assert relative(grads[name], wanted[name]) < GRADIENTS_APART, name


def plain_base(family: str) -> tuple[Base, Adapters]:
    from reference.families import tiny_model
    from topwork.models.load import as_base

    base = as_base(tiny_model(family), None, "plain", lambda _: None, fast=False)  # type: ignore[arg-type]
    configs = {
        "prefix": AdapterConfig(method="prefix", num_virtual_tokens=3),
        "prompt": AdapterConfig(method="prompt", num_virtual_tokens=4),
        "lora": AdapterConfig(r=4, lora_alpha=8),
    }
    return base, added(base, **configs)


def test_in_sixteen_bits() -> None:
    """Packed and alone differ by rounding, and the learned tables stay in fp32."""
    base, adapters = adapted("llama", torch.bfloat16)
    batch = mixed()
    together, grads = gradients(base, adapters, [batch])
    alone, expected = gradients(base, adapters, apart(batch))
    assert relative(together, alone) < 1e-2
    for name in ("prefix", "prompt"):
        assert relative(grads[name], expected[name]) < 3e-2
        assert grads[name][0].dtype == torch.float32


def test_over_four_bit_layers() -> None:
    base, adapters = adapted("llama")
    for path, module in list(base.module.named_modules()):
        if type(module) is torch.nn.Linear and path.endswith("base_layer"):
            packed = QuantizedLinear(module.in_features, module.out_features)
            base.module.set_submodule(path, packed.hold(pack_4bit(module.weight, "nf4", 64, False)))
    batch = mixed()
    together, grads = gradients(base, adapters, [batch])
    alone, expected = gradients(base, adapters, apart(batch))
    assert relative(together, alone) < LOGITS_APART
    assert relative(grads["prefix"] + grads["prompt"], expected["prefix"] + expected["prompt"]) < GRADIENTS_APART


def test_the_gradient_is_the_slope() -> None:
    """By central differences, in one direction, of one prefix over a batch of several sequences."""
    base, adapters = adapted("qwen3")
    batch = learning_batch(sequences(LENGTHS), "prefix")
    (table,) = adapters.parameters("prefix").values()
    (-batch.labels.loss_weights * base.log_probabilities(batch, -batch.labels.loss_weights)).sum().backward()
    assert table.grad is not None
    direction = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    with torch.no_grad():
        for step in (1e-2, -1e-2):
            table.add_(step * direction)
            losses.append(float((-batch.labels.loss_weights * base.log_probabilities(batch)).sum(dtype=torch.float64)))
            table.sub_(step * direction)
    slope = float((table.grad * direction).sum(dtype=torch.float64))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(slope, rel=2e-3)


def test_logits_and_wanted_rows_are_the_callers() -> None:
    base, _ = adapted("llama")
    batch = mixed()
    every = logits(base, batch)
    assert len(every) == len(batch.tokens)
    rows = torch.tensor([0, 12, 13, 20, 30, 58])
    with torch.no_grad():
        some = base.hidden_rows(batch, rows)
        assert relative(some, base.hidden(batch)[rows]) < LOGITS_APART
        assert relative(base.logits(batch, rows), every[rows]) < LOGITS_APART


def test_too_long_for_the_context() -> None:
    base, _ = adapted("llama")
    fits = batch_of(sequences((61,)), "prefix")
    assert len(logits(base, fits)) == 61
    with pytest.raises(ModelError, match=r"has 65 tokens, and the context of tiny is 64; lower data.max_length"):
        logits(base, batch_of(sequences((62,)), "prefix"))
    assert base.virtual_tokens("prompt") == 4
    assert base.virtual_tokens("lora") == base.virtual_tokens(None) == 0
