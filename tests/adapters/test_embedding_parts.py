"""LoRA at embeddings and heads, and trained rows: PEFT's folders, logits and losses, mixed batches, tied pairs."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reference.families import added, learning_batch, logits, sequences, tiny_base, tiny_model
from reference.measure import LOGITS_APART, furthest, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import PREFIX
from topwork.adapters.graft import Adapters, plan_adapter
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError
from topwork.merging.merge import merge
from topwork.models.base import Base
from topwork.models.load import as_base
from topwork.ops.batch import Batch, Segment, batch_of
from topwork.ops.context import running

pytestmark = pytest.mark.slow

NAMES = {"gpt2": {"embed_tokens": "wte", "v_proj": "c_attn"}, "phi3": {"v_proj": "qkv_proj"}}
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3"]
CASES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "rank_pattern": {"embed_tokens": 5}},
    "head": {"target_modules": ["lm_head"], "use_rslora": True},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [7, 3, 98]},
    "tokens of both": {
        "target_modules": ["v_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 3, 98], "lm_head": [7, 3, 98]},
    },
}
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
STEPS = 20


def config(case: str, family: str = "llama") -> AdapterConfig:
    names = NAMES.get(family, {})
    values = dict(CASES[case])
    values["target_modules"] = [names.get(name, name) for name in values["target_modules"]]
    values["rank_pattern"] = {names.get(name, name): r for name, r in values.get("rank_pattern", {}).items()}
    if isinstance(tokens := values.get("trainable_token_indices"), dict):
        values["trainable_token_indices"] = {names.get(name, name): ids for name, ids in tokens.items()}
    return AdapterConfig(r=3, lora_alpha=6, **values)


def pair(case: str, family: str, tied: bool) -> tuple[PreTrainedModel, Base, Adapters]:
    theirs = tiny_model(family, tie_word_embeddings=tied)
    base = as_base(copy.deepcopy(theirs), None, "x", lambda _: None)  # type: ignore[arg-type]
    return theirs, base, added(base, a=config(case, family))


def by_peft(model: PeftModel, parts: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
@TIED
def test_our_folder_in_peft_and_theirs_here(tied: bool, case: str, family: str, tmp_path: Path) -> None:
    theirs, base, adapters = pair(case, family, tied)
    write_adapter(tmp_path / "ours", adapters, "a", BaseId("x"))
    model = PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    found = logits(base, batch_of(sequences(), "a"))
    assert relative(found, by_peft(model, sequences())) < 1e-5
    assert relative(found, logits(base, batch_of(sequences()))) > 0.01
    model.save_pretrained(tmp_path / "theirs")
    load_adapter(adapters, "b", read_adapter(tmp_path / "theirs"), BaseId("x"))
    assert torch.equal(logits(base, batch_of(sequences(), "b")), found)
    for ours, back in zip(adapters.state("a").values(), adapters.state("b").values(), strict=True):
        assert torch.equal(ours, back)


@pytest.mark.parametrize("case", CASES)
@TIED
def test_twenty_steps_as_in_peft(tied: bool, case: str, tmp_path: Path) -> None:
    theirs = tiny_model("llama", tie_word_embeddings=tied)
    base = as_base(copy.deepcopy(theirs), None, "x", lambda _: None)  # type: ignore[arg-type]
    adapters = Adapters(base.module)
    adapters.add("a", config(case))
    write_adapter(tmp_path, adapters, "a", BaseId("x"))
    model = PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True).eval()
    learned = {id(p): p for p in model.parameters() if p.requires_grad}
    parameters = adapters.parameters("a")
    assert len(learned) == len(parameters)
    ours, other = (torch.optim.AdamW(x, lr=0.01, weight_decay=0.0) for x in (parameters.values(), learned.values()))
    losses, expected = [], []
    for step in range(STEPS):
        parts = sequences((9 + step % 5, 5 + step % 3), seed=step % 4)
        parts[0][2], parts[1][3] = 7, 0  # a trained token, and the padding one
        batch = learning_batch(parts, "a")
        gradient = -batch.labels.loss_weights
        loss = (gradient * base.log_probabilities(batch, gradient)).sum() / len(batch.labels.positions)
        theirs_logits = torch.cat([model(input_ids=part[None]).logits[0] for part in parts])[batch.labels.positions]
        logps = theirs_logits.log_softmax(-1).gather(-1, batch.labels.targets[:, None])[:, 0]
        total = (gradient * logps).sum() / len(batch.labels.positions)
        losses.append(float(loss.detach()))
        expected.append(float(total.detach()))
        for value, optimizer in ((loss, ours), (total, other)):
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses == pytest.approx(expected, rel=1e-5, abs=0)
    assert losses[-1] < losses[0]
    final = get_peft_model_state_dict(model)
    for key, parameter in parameters.items():
        assert furthest(final[PREFIX + key], parameter) < 1e-4, key


def mixed(names: tuple[str | None, ...] = ("embedding", "head", None, "tokens")) -> Batch:
    batch = learning_batch(sequences((13, 4, 7, 24)))
    batch.tokens[[2, 15, 20, 30]] = 7
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    return replace(batch, segments=tuple(Segment(*span, name) for span, name in zip(spans, names)))


@TIED
def test_in_a_mixed_stream_each_is_alone(tied: bool) -> None:
    """Embedding, head and trained tokens of three adapters, and the bare base beside them."""
    base = tiny_base("gemma3_text", tie_word_embeddings=tied)
    adapters = added(base, **{case: config(case) for case in ("embedding", "head", "tokens")})
    batch = mixed()
    together = logits(base, batch).split([13, 4, 7, 24])
    for part, segment, found in zip(batch.tokens.split([13, 4, 7, 24]), batch.segments, together):
        assert relative(found, logits(base, batch_of([part], segment.adapter))) < LOGITS_APART
        if segment.adapter:
            assert relative(found, logits(base, batch_of([part]))) > 1e-3
    (-batch.labels.loss_weights * base.log_probabilities(batch, -batch.labels.loss_weights)).sum().backward()
    for name in adapters.configs:
        assert all(p.grad is not None and p.grad.any() for p in adapters.parameters(name).values()), name


@pytest.mark.parametrize("case", CASES)
@TIED
def test_fresh_it_is_the_base_to_the_bit(tied: bool, case: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_base("gemma3_text", dtype, tie_word_embeddings=tied)
        before = logits(base, batch_of(sequences()))
        Adapters(base.module).add("a", config(case))
        assert torch.equal(logits(base, batch_of(sequences(), "a")), before)


@pytest.mark.parametrize("case", CASES)
@TIED
def test_merged_it_is_the_same_model(tied: bool, case: str, tmp_path: Path) -> None:
    """A tied pair comes apart, unless both learn the same rows; so it is too for who loads what was written."""
    _, base, adapters = pair(case, "gemma3_text", tied)
    batch = batch_of(sequences(), "a")
    batch.tokens[[3, 9]] = 7
    expected = logits(base, batch)
    merge(base, adapters, "a")
    bare = replace(batch, segments=(Segment(0, len(batch.tokens), None),))
    assert relative(logits(base, bare), expected) < 1e-5
    stays = tied and case.startswith("tokens")
    assert base.module.config.tie_word_embeddings is stays
    head, embedding = base.module.get_output_embeddings(), base.module.get_input_embeddings()
    assert (head.weight is embedding.weight) == stays
    base.module.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = torch.cat([again(input_ids=part[None]).logits[0] for part in batch.tokens.split([13, 1, 7, 24])])
    assert relative(found, expected) < 1e-5


def test_trained_rows_take_the_bases_place_and_no_others() -> None:
    base = tiny_base("gemma3_text", tie_word_embeddings=True)
    adapters = Adapters(base.module)
    adapters.add("a", config("tokens"))
    rows = adapters.parameters("a")["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    weight = base.module.get_input_embeddings().weight
    assert torch.equal(rows, weight[[7, 3, 98]])
    with torch.no_grad():
        rows[1] += 1.0
    embedding = base.module.get_input_embeddings()
    tokens = torch.tensor([3, 4, 7, 98, 3])
    with running(batch_of([tokens], "a")):
        found = embedding(tokens[None])[0]
    expected = embedding.base_layer(tokens)
    changed = [not torch.equal(x, y) for x, y in zip(found, expected)]
    assert changed == [True, False, False, False, True]
    before = logits(base, batch_of([tokens[1:4]]))
    after = logits(base, batch_of([tokens[1:4]], "a"))
    differ = (before != after).any(0).nonzero().flatten().tolist()
    assert differ == [3]  # in the tied head, that token's logit alone


def test_a_rows_gradient_comes_from_both_ends_of_a_tied_pair() -> None:
    found = {}
    for tied in (False, True):
        base = tiny_base("llama", tie_word_embeddings=tied)
        adapters = added(base, a=config("tokens"))
        batch = learning_batch(sequences(), "a")
        assert len(adapters.parameters("a")) == 2 * 2 + 1
        (-base.log_probabilities(batch)).sum().backward()
        rows = adapters.parameters("a")["model.embed_tokens.token_adapter.trainable_tokens_delta"]
        assert rows.grad is not None
        found[tied] = rows.grad.abs().sum(-1) > 0
    there = [bool((batch.tokens == token).any()) for token in (7, 3, 98)]
    assert found[False].tolist() == there == [False, True, False]
    assert found[True].all()  # tied, every token that might have been said counts


def test_parameters_are_counted_once() -> None:
    base = tiny_base("llama", tie_word_embeddings=True)
    for case, expected in (
        ("embedding", 5 * (99 + 64) + 2 * 3 * (64 + 32)),
        ("head", 3 * (99 + 64)),
        ("tokens", 3 * 64 + 2 * 3 * (64 + 32)),
    ):
        assert sum(planned.trained for planned in plan_adapter(base.module, config(case)).values()) == expected
        adapters = Adapters(base.module)
        adapters.add("a", config(case))
        assert sum(p.numel() for p in adapters.parameters("a").values()) == expected
        adapters.remove("a")
        assert type(base.module.get_input_embeddings()) is torch.nn.Embedding


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"trainable_token_indices": [3, 99]}, r"has \[99\]; the base has 0 to 98"),
        ({"trainable_token_indices": [-1]}, r"has \[-1\]; the base has 0 to 98"),
        ({"trainable_token_indices": []}, "has no ids"),
        ({"trainable_token_indices": [5, 3, 5]}, r"names \[5\] more than once"),
        ({"trainable_token_indices": [3], "target_modules": ["embed_tokens"]}, "embed_tokens is chosen by target_mod"),
        ({"trainable_token_indices": [3], "target_modules": ["lm_head"]}, "lm_head is chosen by target_modules"),
        ({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "can't be both"),
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "where use_dora is not supported"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(values: dict[str, Any], told: str) -> None:
    base = tiny_base("llama", tie_word_embeddings=True)
    with pytest.raises(AdapterError, match=told):
        Adapters(base.module).add("a", AdapterConfig(**values))
    assert type(base.module.get_input_embeddings()) is torch.nn.Embedding


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: {"model.embed_tokens": tokens},
        lambda tokens: {"lm_head": tokens},
        lambda tokens: {"embed_tokens": tokens, "lm_head": tokens[:1]},
    ],
    ids=["embedding", "head", "two"],
)
def test_tokens_named_by_module(change: Callable[[list[int]], dict[str, list[int]]], tmp_path: Path) -> None:
    base = tiny_base("llama")
    adapters = added(base, a=config("tokens"))
    write_adapter(tmp_path, adapters, "a", BaseId("x"))
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    named = change(raw["trainable_token_indices"])
    path.write_text(json.dumps({**raw, "trainable_token_indices": named}))
    alone = len(named) == 1 and "lm_head" not in named
    assert read_adapter(tmp_path).config.trainable_token_indices == ([7, 3, 98] if alone else named)


def test_an_adapter_of_one_kind_leaves_another_alone() -> None:
    base = tiny_base("llama", tie_word_embeddings=True)
    before = logits(base, batch_of(sequences()))
    adapters = added(base, a=config("tokens"), b=config("both"))
    expected = logits(base, batch_of(sequences(), "b"))
    adapters.remove("a")
    assert torch.equal(logits(base, batch_of(sequences(), "b")), expected)
    adapters.remove("b")
    assert torch.equal(logits(base, batch_of(sequences())), before)
