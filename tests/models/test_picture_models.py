"""Models that read pictures too: adapters go into their text part, and others' adapters are read wherever they go."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from data.family_tokenizers import build_tokenizer
from merging.streams import source
from reference.families import PICTURES, added, alone, logits, sequences, tiny_base, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.adapters.targets import left_beside_text
from topwork.common.errors import AdapterError, ModelError
from topwork.merging.merge import merge
from topwork.merging.stream import merged_lazily
from topwork.models.auto import auto_class
from topwork.models.checkpointing import checkpoint_layers, decoder_layers
from topwork.models.config import ModelConfig
from topwork.models.lazy import in_type, open_lazily
from topwork.models.lazy_packed import as_trained
from topwork.models.lazy_writing import write_lazily
from topwork.models.load import as_base, load_base
from topwork.models.skeleton import skeleton
from topwork.models.source import Source
from topwork.models.weights import original_weight, quantizable, stored_weights
from topwork.ops.batch import Segment, batch_of
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import packed_modules

TEXT = "model.language_model."
KINDS = sorted(PICTURES)
VISION = {"gemma3": "model.vision_tower.", "llava": "model.vision_tower.", "mistral3": "model.vision_tower.",
          "qwen2_vl": "model.visual.", "qwen2_5_vl": "model.visual."}  # fmt: skip


def based(model: PreTrainedModel) -> Any:
    return as_base(copy.deepcopy(model), None, "tiny", lambda _: None)  # type: ignore[arg-type]


def reloaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def peft_logits(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        return alone(peft.PeftModel.from_pretrained(model, str(folder)).eval(), sequences())


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_leaves_out_what_reads_pictures(kind: str) -> None:
    base = tiny_base(kind)
    adapters = Adapters(base.module)
    paths = adapters.add("a", AdapterConfig(r=2, lora_alpha=4))
    assert paths
    assert all(path.startswith(TEXT) for path in paths)
    seen = adapters.bare().seen
    left = left_beside_text(seen, AdapterConfig(r=2))
    assert VISION[kind].removeprefix("model.").rstrip(".") in left
    assert left_beside_text(seen, AdapterConfig(method="prompt", num_virtual_tokens=2)) == []


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma3", {"target_modules": ["q_proj", "v_proj"]}),
        ("llava", {"target_modules": r".*(q_proj|v_proj)"}),
        ("mistral3", {"method": "ia3"}),
        ("qwen2_vl", {"method": "bitfit"}),
        ("llava", {"method": "full"}),
        ("gemma3", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ],
)
def test_so_do_names_and_other_methods(kind: str, options: dict[str, Any]) -> None:
    adapters = Adapters(tiny_base(kind).module)
    paths = adapters.add("a", AdapterConfig(**options))
    assert all(path.startswith(TEXT) or path == "lm_head" for path in paths)


def test_a_name_that_reads_pictures_alone_is_told() -> None:
    adapters = Adapters(tiny_base("gemma3").module)
    with pytest.raises(AdapterError, match=r"'fc1', which is model\.vision_tower\.\S+fc1: it reads pictures"):
        adapters.add("a", AdapterConfig(target_modules=["q_proj", "fc1"]))
    with pytest.raises(AdapterError, match="post_layernorm: it reads pictures"):
        adapters.add("a", AdapterConfig(target_modules=["q_proj"], modules_to_save=["post_layernorm"]))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_it_on_the_whole_model(kind: str, tmp_path: Path) -> None:
    theirs = tiny_model(kind)
    base = based(theirs)
    for number, options in enumerate(({}, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]})):
        folder = tmp_path / str(number)
        adapters = added(base, a=AdapterConfig(r=4, lora_alpha=8, **options))
        ours = logits(base, batch_of(sequences(), "a"))
        write_adapter(folder, adapters, "a", BaseId("tiny"))
        assert relative(ours, peft_logits(copy.deepcopy(theirs), folder)) <= 1e-5
        again = Adapters(base.module)
        adapters.remove("a")
        load_adapter(again, "b", read_adapter(folder), BaseId("tiny"))
        assert torch.equal(logits(base, batch_of(sequences(), "b")), ours)
        again.remove("b")


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_an_adapter_of_everything_is_read_and_merged_everywhere(kind: str, tmp_path: Path) -> None:
    """As PEFT's all-linear writes it on the whole model."""
    peft = pytest.importorskip("peft")
    theirs = tiny_model(kind)
    theirs.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        copy.deepcopy(theirs), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        expected = alone(adapted.eval(), sequences())
    adapted.save_pretrained(str(tmp_path / "adapter"))
    saved = read_adapter(tmp_path / "adapter")
    base = based(theirs)
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", saved, BaseId("tiny"))
    assert any(path.startswith(VISION[kind]) for path in adapters.parts("a"))
    assert relative(logits(base, batch_of(sequences(), "a")), expected) <= 1e-5
    merge(base, adapters, "a")
    whole = adapted.merge_and_unload().state_dict()
    for key, tensor in base.module.state_dict().items():
        torch.testing.assert_close(tensor, whole[key], rtol=1e-5, atol=1e-6)
    bare = skeleton(AutoConfig.from_pretrained(tmp_path / "base"), dtype=torch.float32)
    (tmp_path / "out").mkdir()
    write_lazily(merged_lazily(open_lazily(source(tmp_path / "base")), bare, saved), tmp_path / "out")
    streamed = reloaded(tmp_path / "out").state_dict()
    assert streamed.keys() == base.module.state_dict().keys()
    assert all(torch.equal(tensor, streamed[key]) for key, tensor in base.module.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_in_few_bits_what_reads_pictures_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    theirs = tiny_model(kind)
    theirs.save_pretrained(tmp_path)
    wanted, files = QuantizationConfig(load_in_4bit=True), Source("tiny", str(tmp_path), None)
    config = ModelConfig(model_name_or_path=str(tmp_path), dtype="float32", device="cpu")
    base = load_base(config, lambda _: None, wanted, build_tokenizer("smollm2", None))
    paths = packed_modules(base.module).keys()
    assert paths
    assert all(path.startswith(TEXT) for path in paths)
    own, now = theirs.state_dict(), base.module.state_dict()
    assert all(torch.equal(tensor, now[key]) for key, tensor in own.items() if key.startswith(VISION[kind]))
    bare = skeleton(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    held = as_trained(in_type(open_lazily(files), bare, torch.float32), bare, wanted)
    path = next(iter(paths))
    dense = base.module.get_submodule(path).dense(torch.float32).weight
    assert any(torch.equal(tensor.fetch(), dense) for tensor in held.tensors.values() if tensor.shape == dense.shape)
    assert {found for found, _ in stored_weights(files, bare, None)} == quantizable(bare).keys() == set(paths)
    assert torch.equal(original_weight(files, base.module)(path), own[f"{path}.weight"])
    adapters = added(base, a=AdapterConfig(r=2), b=AdapterConfig(r=2, target_modules=["down_proj"]))
    parts = sequences()
    names = ["a", "b", "a", None]
    apart = [logits(base, batch_of([part], name)) for part, name in zip(parts, names)]
    batch = batch_of(parts)
    bounds = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    segments = tuple(Segment(start, stop, name) for (start, stop), name in zip(bounds, names))
    together = logits(base, replace(batch, segments=segments))
    assert relative(together, torch.cat(apart)) <= 1e-5
    adapters.remove("a")


def test_what_is_checkpointed_are_the_layers_of_the_text_part() -> None:
    base = tiny_base("gemma3")
    assert len(decoder_layers(base.module)) == 2
    adapters = added(base, a=AdapterConfig(r=2))
    found = []
    for count in (0, 2):
        checkpoint_layers(base, count)
        hidden = base.hidden(batch_of(sequences(), "a"))
        hidden.square().sum().backward()
        found.append([parameter.grad for parameter in adapters.parameters("a").values()])
        for parameter in adapters.parameters("a").values():
            parameter.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*found))


@pytest.mark.parametrize("kind", ["smolvlm", "llava_next", "blip-2", "t5"])
def test_others_are_refused_by_name_in_one_line(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    with pytest.raises(ModelError) as caught:
        auto_class(config)
    told = str(caught.value)
    assert repr(kind) in told
    assert "\n" not in told
    assert len(told) < 400
    assert ("qwen2_5_vl" in told) == (kind != "t5")


def test_a_folder_of_another_is_refused_so_too(tmp_path: Path) -> None:
    AutoConfig.for_model("smolvlm").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((0).to_bytes(8, "little"))
    with pytest.raises(ModelError, match="'smolvlm' config: it reads pictures too") as caught:
        load_base(ModelConfig(model_name_or_path=str(tmp_path)), lambda _: None)
    assert "Config," not in str(caught.value)
