"""Adapters on norms of heads: rows are tokens, whichever way a family turns them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.families import added, batch_differences, learning_batch, logits, sequences, tiny_base, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.common.errors import AdapterError
from topwork.models.base import Base
from topwork.models.head_norms import tell_head_norms
from topwork.ops.batch import Segment, batch_of
from topwork.ops.context import running
from topwork.ops.logprobs import LogitRule

HEADS = 4
TURNED = {"qwen3": False, "gemma3_text": True, "exaone4": True}


def hidden(base: Base, lengths: list[int]) -> Tensor:
    """The first four rows: two of a sequence with the adapter, and two of one without."""
    batch = batch_of(sequences(lengths))
    segments = (Segment(0, 2, "a"), Segment(2, batch.cu_seqlens[-1], None))
    with torch.no_grad():
        return base.hidden(replace(batch, segments=segments))[:HEADS]


@pytest.mark.parametrize("family", TURNED)
def test_where_there_are_as_many_tokens_as_heads(family: str) -> None:
    base = tiny_base(family)
    bare = hidden(base, [2, 2])
    added(base, a=AdapterConfig(r=4, target_modules=["o_proj"], modules_to_save=["q_norm", "k_norm"]))
    found = hidden(base, [2, 2])
    assert relative(found, hidden(base, [2, 2, 5])) < 1e-5
    assert relative(found[2:], bare[2:]) < 1e-5
    assert relative(found[:2], bare[:2]) > 1e-3


@pytest.mark.parametrize(("family", "turned"), TURNED.items())
def test_it_is_known_once(family: str, turned: bool) -> None:
    told = {path: m.heads_first for path, m in tiny_base(family).module.named_modules() if hasattr(m, "heads_first")}
    assert set(told.values()) == {turned}
    assert {path.rpartition(".")[2] for path in told} == {"q_norm", "k_norm"}


def test_a_base_without_them_runs_no_pass() -> None:
    model, calls = tiny_model("llama"), []
    model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    tell_head_norms(model, linear=False)
    assert not calls


def test_heads_of_a_model_that_is_no_base() -> None:
    model = tiny_model("qwen3")
    added(Base(model, None, "x", "", 64, LogitRule()), a=AdapterConfig(modules_to_save=["q_norm"]))  # type: ignore[arg-type]
    norm = model.get_submodule("model.layers.0.self_attn.q_norm")
    with running(batch_of(sequences([3]), "a")), pytest.raises(AdapterError, match=r"is given heads.*exclude_modules"):
        norm(torch.randn(1, 3, 4, 16))


ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
DORA = {"target_modules": ATTENTION, "use_dora": True, "lora_dropout": 0.2}  # experts take plain LoRA


@pytest.mark.parametrize("options", [{}, DORA], ids=["lora", "dora"])
def test_a_linear_layer_that_is_given_heads(options: dict[str, Any]) -> None:
    """DeepSeek 3 unfolds what it keeps of keys and values as a single head: rows are tokens all the same."""
    base = tiny_base("deepseek_v3")
    assert any(module.heads_first for module in base.module.modules() if hasattr(module, "heads_first"))
    config = AdapterConfig.model_validate({"r": 4, **options})
    adapters = added(base, a=config, b=config)
    for name in ("a", "b"):
        adapters.train(name)
    batch = learning_batch(sequences())
    cut = batch.cu_seqlens
    mixed = replace(batch, segments=(Segment(0, cut[2], "a"), Segment(cut[2], cut[4], "b")))
    found = logits(base, mixed)
    for name, rows in (("a", slice(0, cut[2])), ("b", slice(cut[2], cut[4]))):
        own = logits(base, replace(batch, segments=(Segment(0, cut[4], name),)))
        assert relative(found[rows], own[rows]) < 1e-6
    assert batch_differences("deepseek_v3")["adapter gradients"] < 5e-6
