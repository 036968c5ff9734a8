"""Adapters across a model that reads pictures too and the language model that its text part is: the same layers, at
another place in the model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from merging.streams import loaded, opened, source
from reference.families import PICTURES, added, alone, logits, sequences, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.merging.stream import merged_lazily
from topwork.models.lazy import open_lazily
from topwork.models.lazy_writing import write_lazily
from topwork.models.load import as_base
from topwork.models.skeleton import skeleton
from topwork.ops.batch import batch_of

KINDS = ["gemma3", "llava"]
"""Those whose text part is a model of its own in transformers."""


def twins(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A whole model, and its text part alone."""
    whole, text = tiny_model(kind), tiny_model(PICTURES[kind][0])
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    with torch.no_grad():
        assert relative(alone(text, sequences()), alone(whole, sequences())) <= 1e-6
    return whole, text


def by_peft(model: PreTrainedModel, folder: Path, **options: Any) -> Tensor:
    """An adapter of PEFT's on a model, whose logits are given."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(adapted.named_parameters())):
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(number))
        found = alone(adapted, sequences())
    adapted.save_pretrained(str(folder))
    return found


def ours(model: PreTrainedModel, folder: Path) -> Tensor:
    base = as_base(copy.deepcopy(model), None, "tiny", lambda _: None)  # type: ignore[arg-type]
    load_adapter(Adapters(base.module), "a", read_adapter(folder), BaseId("tiny"), force=True)
    return logits(base, batch_of(sequences(), "a"))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapters_are_read_across(kind: str, tmp_path: Path) -> None:
    whole, text = twins(kind)
    of_whole = by_peft(whole, tmp_path / "whole", target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    assert relative(ours(text, tmp_path / "whole"), of_whole) <= 1e-5
    of_text = by_peft(text, tmp_path / "text", target_modules=["q_proj", "v_proj"])
    assert relative(ours(whole, tmp_path / "text"), of_text) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_so_are_ours(kind: str, tmp_path: Path) -> None:
    for number, (model, other) in enumerate((twins(kind), twins(kind)[::-1])):
        base = as_base(copy.deepcopy(model), None, "tiny", lambda _: None)  # type: ignore[arg-type]
        adapters = added(base, a=AdapterConfig(r=4, rank_pattern={"q_proj": 2}))
        write_adapter(tmp_path / str(number), adapters, "a", BaseId("tiny"))
        expected = logits(base, batch_of(sequences(), "a"))
        assert relative(ours(other, tmp_path / str(number)), expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_merged_across_tensor_by_tensor(kind: str, tmp_path: Path) -> None:
    whole, text = twins(kind)
    for name, model in (("whole", whole), ("text", text)):
        model.save_pretrained(tmp_path / name)
    of_text = by_peft(text, tmp_path / "of-text", target_modules=["q_proj", "down_proj"])
    bare = skeleton(AutoConfig.from_pretrained(tmp_path / "whole"), dtype=torch.float32)
    (tmp_path / "out").mkdir()
    saved = read_adapter(tmp_path / "of-text")
    write_lazily(merged_lazily(open_lazily(source(tmp_path / "whole")), bare, saved), tmp_path / "out")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative(alone(merged, sequences()), of_text) <= 1e-5
    of_whole = by_peft(whole, tmp_path / "of-whole", target_modules=r".*language_model.*\.(q_proj|down_proj)")
    (tmp_path / "out-text").mkdir()
    lazy, twin = opened(tmp_path / "text", torch.float32)
    write_lazily(merged_lazily(lazy, twin, read_adapter(tmp_path / "of-whole")), tmp_path / "out-text")
    with torch.no_grad():
        assert relative(alone(loaded(tmp_path / "out-text"), sequences()), of_whole) <= 1e-5
