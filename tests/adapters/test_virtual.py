"""Prefix and prompt tuning: how they begin, what is refused, and PEFT's folders, logits and losses."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from reference.families import VOCABULARY, added, learning_batch, logits, sequences, tiny_base, tiny_model
from reference.measure import furthest, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, plan_adapter
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError
from topwork.merging.merge import merge
from topwork.models.base import Base
from topwork.models.load import as_base
from topwork.ops.batch import batch_of

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "mistral", "opt"]
METHODS = ["prefix", "prompt"]
STEPS = 20


class Words:
    """A tokenizer: a token for each word, its length."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def config(method: str, count: int = 3, **values: Any) -> AdapterConfig:
    return AdapterConfig(method=method, num_virtual_tokens=count, **values)


def pair(family: str = "llama", method: str = "prefix", **values: Any) -> tuple[PreTrainedModel, Base, Adapters]:
    """A model for PEFT, and the same as a base with an adapter `a` that changes much."""
    theirs = tiny_model(family, **values)
    base = as_base(copy.deepcopy(theirs), None, "x", lambda _: None)  # type: ignore[arg-type]
    adapters = added(base, a=config(method))
    with torch.no_grad():
        table(adapters).normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return theirs, base, adapters


def table(adapters: Adapters, name: str = "a") -> Tensor:
    (parameter,) = adapters.parameters(name).values()
    return parameter


def by_peft(model: PeftModel, parts: list[Tensor]) -> Tensor:
    """Logits of the text's rows, each sequence in a call of its own."""
    found = []
    for part in parts:
        with torch.no_grad():
            out = model(input_ids=part[None], attention_mask=torch.ones_like(part[None]), use_cache=False)
        found.append(out.logits[0][-len(part) :])
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_our_folder_in_peft_and_theirs_here(method: str, family: str, tmp_path: Path) -> None:
    theirs, base, adapters = pair(family, method)
    write_adapter(tmp_path / "ours", adapters, "a", BaseId("x"))
    model = PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    found = logits(base, batch_of(sequences(), "a"))
    assert relative(found, by_peft(model, sequences())) < 1e-5
    assert relative(found, logits(base, batch_of(sequences()))) > 0.05
    model.save_pretrained(str(tmp_path / "theirs"))
    load_adapter(adapters, "b", read_adapter(tmp_path / "theirs"), BaseId("x"))
    assert torch.equal(table(adapters, "b"), table(adapters))
    assert torch.equal(logits(base, batch_of(sequences(), "b")), found)


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_of_theirs_alone(method: str, tmp_path: Path) -> None:
    """With the config that PEFT itself fills in for grouped keys, and its first weights."""
    theirs = tiny_model("llama")
    base = as_base(copy.deepcopy(theirs), None, "x", lambda _: None)  # type: ignore[arg-type]
    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    model = get_peft_model(theirs, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    model.save_pretrained(str(tmp_path / "theirs"))
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", read_adapter(tmp_path / "theirs"), BaseId("x"))
    assert relative(logits(base, batch_of(sequences(), "a")), by_peft(model, sequences())) < 1e-5
    write_adapter(tmp_path / "ours", adapters, "a", BaseId(None))
    ours, expected = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert ours == {**expected, "base_model_name_or_path": None}
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert [*tensors[0]] == [*tensors[1]] == ["prompt_embeddings"]
    assert torch.equal(tensors[0]["prompt_embeddings"], tensors[1]["prompt_embeddings"])


def test_a_prefix_in_sixteen_bits(tmp_path: Path) -> None:
    theirs, _, adapters = pair("llama", "prefix")
    write_adapter(tmp_path, adapters, "a", BaseId("x"))
    half = as_base(copy.deepcopy(theirs).bfloat16(), None, "x", lambda _: None)  # type: ignore[arg-type]
    own = Adapters(half.module)
    load_adapter(own, "a", read_adapter(tmp_path), BaseId("x"))
    model = PeftModel.from_pretrained(theirs.bfloat16(), tmp_path).eval()
    assert relative(logits(half, batch_of(sequences(), "a")), by_peft(model, sequences()).float()) < 2e-2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_as_in_peft(method: str, family: str, tmp_path: Path) -> None:
    """Two sequences a step: one batch here, one after the other there, because PEFT's packing mixes them."""
    theirs, base, adapters = pair(family, method)
    write_adapter(tmp_path, adapters, "a", BaseId("x"))
    their_config = PeftConfig.from_pretrained(str(tmp_path))
    their_config.inference_mode = False
    model = get_peft_model(theirs, their_config).eval()  # (PEFT trains no prompt that it has read from a folder)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learned) == 1
    learned[0].data.copy_(table(adapters).detach())
    ours, other = (torch.optim.AdamW([x], lr=0.01, weight_decay=0.0) for x in (table(adapters), learned[0]))
    losses, expected = [], []
    for step in range(STEPS):
        parts = sequences((9 + step % 5, 5 + step % 3), seed=step % 4)
        batch = learning_batch(parts, "a")
        gradient = -batch.labels.loss_weights
        loss = (gradient * base.log_probabilities(batch, gradient)).sum() / len(batch.labels.positions)
        loss.backward()
        losses.append(float(loss.detach()))
        at = 0
        total = torch.zeros(())
        for part in parts:
            out = model(input_ids=part[None], attention_mask=torch.ones_like(part[None])).logits[0][-len(part) :]
            weights = batch.labels.loss_weights[at : at + len(part) - 1]
            at += len(part) - 1
            logps = out[:-1].log_softmax(-1).gather(-1, part[1:, None])[:, 0]
            total = total - (weights * logps).sum() / len(batch.labels.positions)
        total.backward()
        expected.append(float(total.detach()))
        for optimizer in (ours, other):
            optimizer.step()
            optimizer.zero_grad()
    assert losses == pytest.approx(expected, rel=1e-5, abs=0)
    assert losses[-1] < losses[0]
    assert furthest(table(adapters), learned[0]) < 1e-4


def test_a_prompt_begins_as_asked() -> None:
    base = tiny_base("gemma3_text")
    adapters = Adapters(base.module, Words())  # type: ignore[arg-type]
    embedded = base.module.get_input_embeddings()(torch.arange(VOCABULARY))  # scaled, as the layers see it
    adapters.add("text", config("prompt", 5, prompt_tuning_init="text", prompt_tuning_init_text="one three a"))
    assert torch.equal(table(adapters, "text"), embedded[[3, 5, 1, 3, 5]])
    adapters.add("cut", config("prompt", 2, prompt_tuning_init="text", prompt_tuning_init_text="one three a"))
    assert torch.equal(table(adapters, "cut"), embedded[[3, 5]])
    adapters.add("words", config("prompt", 6, prompt_tuning_init="vocabulary"))
    assert all((row == embedded).all(-1).any() for row in table(adapters, "words"))
    adapters.add("noise", config("prompt", 400))
    assert float(table(adapters, "noise").detach().std()) == pytest.approx(float(embedded.std()), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_how_it_begins(method: str) -> None:
    base = tiny_base("llama")
    adapters = Adapters(base.module)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        adapters.add(name, config(method), seed)
    assert torch.equal(table(adapters, "a"), table(adapters, "b"))
    assert not torch.equal(table(adapters, "a"), table(adapters, "c"))
    assert 0 < float(table(adapters, "a").detach().std()) < 0.1


def test_parameters_are_counted_before_they_are_made() -> None:
    base = tiny_base("llama")
    for method, expected in (("prefix", 3 * 2 * 2 * 2 * 16), ("prompt", 3 * 64)):
        plan = plan_adapter(base.module, config(method))
        assert [planned.trained for planned in plan.values()] == [expected]
        adapters = Adapters(base.module)
        adapters.add("a", config(method))
        assert table(adapters).numel() == expected
        adapters.remove("a")


def test_a_text_needs_a_tokenizer() -> None:
    base = tiny_base("llama")
    text = config("prompt", prompt_tuning_init="text", prompt_tuning_init_text="say")
    with pytest.raises(AdapterError, match=r"needs the base's tokenizer; give one: Adapters\(model, tokenizer\)"):
        Adapters(base.module).add("a", text)
    with pytest.raises(AdapterError, match="has no tokens"):
        Adapters(base.module, Words()).add("a", text.model_copy(update={"prompt_tuning_init_text": " "}))  # type: ignore[arg-type]
    assert "adapters" not in " ".join(name for name, _ in base.module.named_modules())


def test_a_base_whose_layers_keep_other_shapes_takes_no_prefix() -> None:
    base = tiny_base("deepseek_v3")
    with pytest.raises(AdapterError, match=r"deepseek_v3's layers do not all keep .* take prompt tuning"):
        Adapters(base.module).add("a", config("prefix"))
    adapters = added(base, a=config("prompt"))
    assert relative(logits(base, batch_of(sequences(), "a")), logits(base, batch_of(sequences()))) > 1e-3
    assert adapters.parts("a")


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_refused(method: str) -> None:
    _, base, adapters = pair("llama", method)
    with pytest.raises(AdapterError, match=re.escape("prefix and prompt tuning cannot be merged")):
        merge(base, adapters, "a")
    assert adapters.parts("a")


def test_what_else_a_folder_may_ask_for_is_refused(tmp_path: Path) -> None:
    _, _, adapters = pair("llama", "prefix")
    write_adapter(tmp_path, adapters, "a", BaseId("x"))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["lm_head"]}))
    with pytest.raises(AdapterError, match="a decoder's virtual tokens alone can"):
        read_adapter(tmp_path)


def test_another_number_of_tokens_is_another_adapter(tmp_path: Path) -> None:
    _, base, adapters = pair("llama", "prefix")
    write_adapter(tmp_path, adapters, "a", BaseId("x"))
    adapters.add("b", config("prefix", 5))
    with pytest.raises(AdapterError, match=r"of another shape .*\(3, 128\) in the file, \(5, 128\) here"):
        adapters.load("b", read_adapter(tmp_path).tensors)
    assert base.virtual_tokens("b") == 5
