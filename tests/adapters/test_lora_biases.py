"""Biases beside LoRA (`bias`, `lora_bias`): PEFT's folders here and ours there, twenty steps as PEFT takes them, and
merged both ways."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from adapters.test_file_names import shaken, truth
from merging.streams import loaded, streamed
from reference.families import added, learning_batch, logits, sequences, tiny_base, tiny_model
from reference.measure import furthest, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import PREFIX
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError
from topwork.merging.changes import changes_of
from topwork.merging.merge import merge
from topwork.models.base import Base
from topwork.models.load import as_base
from topwork.ops.batch import Segment, batch_of

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "of targets": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "all, some saved": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f", "1.mlp"]}),
    "all on qwen2": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "none to train": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "of b": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "of b where the base has none": ("llama", {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True}),
    "of b and of targets": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True, "bias": "lora_only"}),
    "dora": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "bias": "all", "use_dora": True}),
}
pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")


def folder_of_peft(case: str, place: Path) -> tuple[PreTrainedModel, Tensor]:
    """A base, and what PEFT's adapter of it, which lies in the folder, gives there."""
    family, values = CASES[case]
    model = tiny_model(family)
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, lora_alpha=7, **values))
    shaken(theirs)
    theirs.save_pretrained(place)
    return model, truth(theirs)


def as_tiny(model: PreTrainedModel) -> Base:
    return as_base(copy.deepcopy(model), None, "tiny", lambda _: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_pefts_folder_here_and_ours_in_peft(case: str, tmp_path: Path) -> None:
    model, expected = folder_of_peft(case, tmp_path / "theirs")
    base = as_tiny(model)
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", read_adapter(tmp_path / "theirs"), BaseId("tiny"))
    found = logits(base, batch_of(sequences(), "a"))
    assert relative(found, expected) < 1e-5
    write_adapter(tmp_path / "ours", adapters, "a", BaseId("tiny"))
    assert relative(truth(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()), found) < 1e-5
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == {
        key
        for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors")
        if ".original_module." not in key and ".modules_to_save." not in key  # said twice
    }


@pytest.mark.parametrize("case", ["of targets", "all", "of b", "of b and of targets", "dora"])
def test_twenty_steps_as_in_peft(case: str, tmp_path: Path) -> None:
    family, values = CASES[case]
    base = tiny_base(family)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=3, lora_alpha=7, **values))
    write_adapter(tmp_path, adapters, "a", BaseId("tiny"))
    theirs = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True).eval()
    learned = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    parameters = adapters.parameters("a")
    assert len(learned) == len(parameters)
    ours, other = (torch.optim.AdamW(x, lr=0.01, weight_decay=0.0) for x in (parameters.values(), learned.values()))
    for step in range(20):
        parts = sequences((9 + step % 5, 5 + step % 3), seed=step % 4)
        batch = learning_batch(parts, "a")
        gradient = -batch.labels.loss_weights
        loss = (gradient * base.log_probabilities(batch, gradient)).sum() / len(batch.labels.positions)
        rows = torch.cat([theirs(input_ids=part[None]).logits[0] for part in parts])[batch.labels.positions]
        chosen = rows.log_softmax(-1).gather(-1, batch.labels.targets[:, None])[:, 0]
        total = (gradient * chosen).sum() / len(batch.labels.positions)
        assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5, abs=0)
        for value, optimizer in ((loss, ours), (total, other)):
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    final = {PREFIX + name.removeprefix(PREFIX).replace(".default", ""): p for name, p in learned.items()}
    for key, parameter in parameters.items():
        name = key.replace("lora_magnitude_vector", "lora_magnitude_vector.weight")
        if "k_proj.bias" in key or "c_attn" in key:
            continue  # a bias of all keys changes no weight of attention: its steps are those of rounding
        assert furthest(final[PREFIX + name], parameter) < 1e-4, key


@pytest.mark.parametrize("case", [case for case in CASES if case != "of b where the base has none"])
def test_merged_both_ways(case: str, tmp_path: Path) -> None:
    if case == "of b and of targets":
        pytest.skip("some of its targets have no bias")
    model, expected = folder_of_peft(case, tmp_path / "theirs")
    saved, base = read_adapter(tmp_path / "theirs"), as_tiny(model)
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", saved, BaseId("tiny"))
    merge(base, adapters, "a")
    assert relative(logits(base, batch_of(sequences())), expected) < 1e-5
    model.save_pretrained(tmp_path / "base")
    assert relative(truth(loaded(streamed(tmp_path / "base", saved, tmp_path / "out"))), expected) < 1e-5


def test_a_bias_that_nothing_could_hold_is_not_merged(tmp_path: Path) -> None:
    model, _ = folder_of_peft("of b where the base has none", tmp_path / "theirs")
    saved, base = read_adapter(tmp_path / "theirs"), as_tiny(model)
    before = copy.deepcopy(base.module.state_dict())
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", saved, BaseId("tiny"))
    told = r"lora_bias adds a bias to model\.layers\.0\.self_attn\.q_proj, which has none"
    with pytest.raises(AdapterError, match=told):
        merge(base, adapters, "a")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=told):
        streamed(tmp_path / "base", saved, tmp_path / "out")
    adapters.remove("a")
    assert all(torch.equal(value, before[key]) for key, value in base.module.state_dict().items())


def test_what_combines_weights_refuses_biases(tmp_path: Path) -> None:
    model, _ = folder_of_peft("all", tmp_path / "theirs")
    base = as_tiny(model)
    with pytest.raises(AdapterError, match=r"^one: it trained the bias of transformer\.h\.0.*merge it into the base"):
        changes_of("one", read_adapter(tmp_path / "theirs"), Adapters(base.module).bare(), lambda _: torch.empty(0))


def test_two_adapters_with_biases_and_the_base_in_one_batch() -> None:
    base = tiny_base("gpt2")
    options = {name: AdapterConfig(r=2, **CASES[name][1]) for name in ("of targets", "all", "of b")}
    added(base, **options)
    parts = sequences((4, 7, 5, 6))
    batch = batch_of(parts)
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    batch = replace(batch, segments=tuple(Segment(*span, name) for span, name in zip(spans, (*options, None))))
    for part, name, found in zip(parts, (*options, None), logits(base, batch).split([4, 7, 5, 6])):
        assert relative(found, logits(base, batch_of([part], name))) < 1e-5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lora_bias": True, "use_dora": True}, "lora_bias goes with plain LoRA"),
        (
            {"bias": "all", "init_lora_weights": "pissa"},
            "bias and lora_bias go with init_lora_weights: true, not pissa",
        ),
        ({"bias": "some"}, "'none', 'lora_only' or 'all'"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        AdapterConfig(**values)


def test_an_embedding_has_no_bias_of_b() -> None:
    with pytest.raises(AdapterError, match="lora_bias is for linear layers, and target_modules names an embedding"):
        Adapters(tiny_base().module).add("a", AdapterConfig(lora_bias=True, target_modules=["embed_tokens"]))
