"""Methods of PEFT's that are read, and not begun: merged they are the same, in one stream with others, written again
for PEFT, and told by name where they cannot go on."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from reference.families import alone, logits, sequences, tiny_base, tiny_model
from reference.measure import LOGITS_APART, relative
from topwork.adapters.config import ReadOnlyConfig
from topwork.adapters.fitting import fresh_parts, plan_on
from topwork.adapters.foreign import content_of
from topwork.adapters.graft import Adapters
from topwork.adapters.lazy_parts import LazyParts
from topwork.adapters.methods.readonly.forms import FORMS
from topwork.adapters.peft_format import BaseId, SavedAdapter, load_adapter, read_adapter, write_adapter
from topwork.adapters.peft_options import config_in
from topwork.common.errors import AdapterError
from topwork.merging.changes import changes_of
from topwork.merging.merge import merge
from topwork.ops.batch import Segment, batch_of

LINEAR: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj", "fc1", "fc2"]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ADALORA": ("AdaLoraConfig", {"total_step": 1, "init_r": 5, "lora_alpha": 7}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8}),
    "C3A": ("C3AConfig", {"block_size": 16}),
    "DELORA": ("DeloraConfig", {"r": 3}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 20}),
    "GRALORA": ("GraloraConfig", {"r": 8, "alpha": 12, "gralora_k": 4, "hybrid_r": 2}),
    "HIRA": ("HiraConfig", {"r": 4}),
    "HRA": ("HRAConfig", {"r": 3}),
    "MISS": ("MissConfig", {"r": 5}),
    "PVERA": ("PveraConfig", {"r": 6}),
    "ROAD": ("RoadConfig", {"variant": "road_4", "group_size": 8}),
    "SHIRA": ("ShiraConfig", {"r": 2}),
    "VBLORA": ("VBLoRAConfig", {"num_vectors": 7, "vector_length": 8, "topk": 3}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 30}),
}
OTHERWISE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "road_1": ("opt", "RoadConfig", {"variant": "road_1", "group_size": 4}),
    "road_2": ("opt", "RoadConfig", {"variant": "road_2", "group_size": 32}),
    "miss of few columns": ("opt", "MissConfig", {"r": 4, "mini_r": 8, "init_weights": "mini"}),
    "waves as they are": ("opt", "WaveFTConfig", {"n_frequency": 30, "use_idwt": False}),
    "blocks by number": ("opt", "BOFTConfig", {"boft_block_size": 0, "boft_block_num": 4}),
    "granular without a whole": ("opt", "GraloraConfig", {"r": 4, "gralora_k": 2}),
}


def shaken(name: str, options: dict[str, Any], tmp_path: Path) -> Tensor:
    """PEFT's logits of an adapter on opt, whose folder is written."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("opt"), getattr(peft, name)(**{**LINEAR, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        found = alone(model.eval(), sequences())
    model.save_pretrained(tmp_path)
    return found


def test_every_form_is_tried() -> None:
    assert CONFIGS.keys() == FORMS.keys()


@pytest.mark.parametrize("kind", CONFIGS)
def test_read_run_merged_and_written_again(kind: str, tmp_path: Path) -> None:
    name, options = CONFIGS[kind]
    expected = shaken(name, options, tmp_path / "theirs")
    base = tiny_base("opt")
    adapters = Adapters(base.module)
    saved = read_adapter(tmp_path / "theirs")
    load_adapter(adapters, "a", saved, BaseId(None))
    assert isinstance(saved.config, ReadOnlyConfig)
    found = logits(base, batch_of(sequences(), "a"))
    bare = logits(base, batch_of(sequences()))
    assert relative(found, expected) < 1e-5
    assert relative(found, bare) > 1e-3

    write_adapter(tmp_path / "ours", adapters, "a", BaseId(None))
    again = PeftModel.from_pretrained(tiny_model("opt"), tmp_path / "ours").eval()
    with torch.no_grad():
        assert relative(alone(again, sequences()), expected) < 1e-5
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert content_of(read_adapter(tmp_path / "ours")) == content_of(saved)

    merge(base, adapters, "a")
    assert relative(logits(base, batch_of(sequences())), expected) < 1e-5


@pytest.mark.parametrize("case", OTHERWISE)
def test_other_options(case: str, tmp_path: Path) -> None:
    _, name, options = OTHERWISE[case]
    expected = shaken(name, options, tmp_path)
    base = tiny_base("opt")
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", read_adapter(tmp_path), BaseId(None))
    assert relative(logits(base, batch_of(sequences(), "a")), expected) < 1e-5
    merge(base, adapters, "a")
    assert relative(logits(base, batch_of(sequences())), expected) < 1e-5


def test_all_in_one_stream_are_each_alone(tmp_path: Path) -> None:
    base = tiny_base("opt")
    adapters, expected = Adapters(base.module), {}
    for kind, (name, options) in CONFIGS.items():
        expected[kind] = shaken(name, options, tmp_path / kind)
        load_adapter(adapters, kind, read_adapter(tmp_path / kind), BaseId(None))
    parts = sequences((5, *[4 + at % 3 for at in range(len(CONFIGS))], 6))
    names = [None, *CONFIGS, None]
    batch = batch_of(parts)
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    mixed = replace(batch, segments=tuple(Segment(a, b, name) for (a, b), name in zip(spans, names, strict=True)))
    found = logits(base, mixed).split([len(part) for part in parts])
    for part, name, rows in zip(parts, names, found, strict=True):
        assert relative(rows, logits(base, batch_of([part], name))) < LOGITS_APART


@pytest.mark.parametrize("kind", CONFIGS)
def test_parts_are_made_one_by_one(kind: str, tmp_path: Path) -> None:
    """As merging does over a base that is not in memory, and combining, which asks for what is added to each weight."""
    name, options = CONFIGS[kind]
    shaken(name, options, tmp_path)
    base, saved = tiny_base("opt"), read_adapter(tmp_path)
    bare = Adapters(base.module).bare()
    whole = _loaded(saved)
    lazy = LazyParts(bare, saved, lambda *_: None)
    for path in lazy.shapes:
        weight = bare.modules[path].get_parameter("weight")
        one, other = (part.merged(weight, None)[0] for part in (lazy.part(path, partial(_same, weight)), whole[path]))
        assert torch.equal(one, other)
    if kind == "ROAD":  # which turns biases too
        with pytest.raises(AdapterError, match="RoAd turns the bias"):
            changes_of("a", saved, bare, lambda key: base.module.get_parameter(key).float())
        return
    changes = changes_of("a", saved, bare, lambda key: base.module.get_parameter(key).float())
    assert set(changes.adapted) == set(whole)
    for path in changes.adapted[:2]:
        weight = bare.modules[path].get_parameter("weight")
        assert relative(changes.delta(path).dense(), whole[path].merged(weight, None)[0] - weight) < 1e-4


def _same(weight: Tensor) -> Tensor:
    return weight


def _loaded(saved: SavedAdapter) -> dict[str, Any]:
    adapters = Adapters(tiny_base("opt").module)
    load_adapter(adapters, "a", saved, BaseId(None))
    return adapters.parts("a")


def test_gradients_are_there_but_nobody_begins_one(tmp_path: Path) -> None:
    shaken(*CONFIGS["MISS"], tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(AdapterError, match="peft_type MISS, which is run, merged and served, and not trained on"):
        config_in(raw, "it")
    config = read_adapter(tmp_path).config
    bare = Adapters(tiny_base("opt").module).bare()
    assert all(not part.tensors()["miss_block"].any() for part in fresh_parts(bare, plan_on(bare, config)).values())


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "save_only_topk_weights": ("VBLORA", {"save_only_topk_weights": True}),
    "wavelet_family": ("WAVEFT", {"wavelet_family": "db2"}),
    "apply_GS": ("HRA", {"apply_GS": True}),
    "init_weights=bat": ("MISS", {"init_weights": "bat"}),
    "bias=.?all": ("C3A", {"bias": "all"}),
    "sample_at_inference": ("PVERA", {"sample_at_inference": True}),
    "n_frequency_pattern": ("FOURIERFT", {"n_frequency_pattern": {"q_proj": 3}}),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_cannot_be_read_is_named(told: str, tmp_path: Path) -> None:
    kind, change = REFUSED[told]
    shaken(*CONFIGS[kind], tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=f"{told}.*cannot be read"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "CPT", "CARTRIDGE"])
def test_learned_tokens_of_other_makes(kind: str, tmp_path: Path) -> None:
    """Their folders hold the tokens as they are put before the text."""
    tokens = {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}
    configs = {
        "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "CPT": peft.CPTConfig(task_type="CAUSAL_LM", **tokens),
        "CARTRIDGE": peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_frozen_tokens=1),
    }
    model = get_peft_model(tiny_model("llama"), configs[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        expected = [
            model.eval()(input_ids=part[None], attention_mask=torch.ones_like(part[None]), use_cache=False).logits[0]
            for part in sequences()
        ]
    model.save_pretrained(tmp_path)
    base = tiny_base("llama")
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", read_adapter(tmp_path), BaseId(None))
    truth = torch.cat([rows[-len(part) :] for rows, part in zip(expected, sequences())])
    assert relative(logits(base, batch_of(sequences(), "a")), truth) < 1e-5


def test_ranks_that_adalora_let_go(tmp_path: Path) -> None:
    """A file in which some of the first ranks are gone, of every layer others."""
    name, options = CONFIGS["ADALORA"]
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("opt"), getattr(peft, name)(**{**LINEAR, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        kept, own = {}, model.peft_config["default"]
        for at, (path, module) in enumerate(model.base_model.model.named_modules()):
            if hasattr(module, "lora_E"):
                kept[f"{path}.lora_E.default"] = [bool((at + rank) % 3) for rank in range(5)]
                module.lora_E["default"][~torch.tensor(kept[f"{path}.lora_E.default"])] = 0
        expected = alone(model.eval(), sequences())
    own.rank_pattern = kept
    model.save_pretrained(tmp_path)
    base = tiny_base("opt")
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", read_adapter(tmp_path), BaseId(None))
    assert relative(logits(base, batch_of(sequences(), "a")), expected) < 1e-5
