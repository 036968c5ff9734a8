"""DoRA, IA3, PiSSA and OLoRA beside PEFT's: our folder there, PEFT's here, the same beginnings, the same 20 steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from reference.families import alone, learning_batch, logits, randomise, sequences, tiny_base, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import PREFIX
from topwork.adapters.graft import Adapters
from topwork.adapters.methods.lora.inits import FromWeight
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.ops.batch import batch_of
from training.test_peft_parity import compare_twenty

pytestmark = pytest.mark.slow

HERE = BaseId("owner/base", "sha256:one")
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 3},
    "alpha_pattern": {"q_proj": 3, "down_proj": 20},
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("llama", {**LORA, "use_dora": True}),
    "DoRA with patterns": ("llama", {**LORA, "use_dora": True, **PATTERNS}),
    "DoRA with rsLoRA": ("llama", {**LORA, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 9}}),
    "DoRA with head norms and patterns": ("qwen3", {**LORA, "use_dora": True, "use_rslora": True, **PATTERNS}),
    "DoRA over biases (qwen2)": ("qwen2", {**LORA, "use_dora": True}),
    "DoRA, transposed (gpt2)": ("gpt2", {**LORA, "use_dora": True}),
    "DoRA and a saved head": ("llama", {**LORA, "use_dora": True, "modules_to_save": ["lm_head"]}),
    "IA3": ("llama", {"method": "ia3"}),
    "IA3, transposed (gpt2)": ("gpt2", {"method": "ia3"}),
    "IA3 over biases (opt)": ("opt", {"method": "ia3"}),
    "IA3, fused (phi3)": ("phi3", {"method": "ia3"}),
    "IA3 by name": (
        "qwen2",
        {"method": "ia3", "target_modules": ["q_proj", "o_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    ),
    "IA3 without inputs, a saved norm": (
        "llama",
        {"method": "ia3", "target_modules": ["v_proj"], "feedforward_modules": [], "modules_to_save": ["model.norm"]},
    ),
    "IA3 but for one": ("llama", {"method": "ia3", "exclude_modules": ["0.mlp.down_proj", "1.self_attn.k_proj"]}),
}
OURS_ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "PiSSA": ("llama", {**LORA, "init_lora_weights": "pissa", **PATTERNS}),
    "PiSSA with rsLoRA": ("gpt2", {**LORA, "init_lora_weights": "pissa", "use_rslora": True}),
    "OLoRA": ("llama", {**LORA, "init_lora_weights": "olora"}),
}
"""Written as ordinary LoRA of twice the rank; PEFT itself changes the base for these."""
THEIR_IA3: dict[str, dict[str, Any]] = {
    "IA3": {},
    "IA3, transposed (gpt2)": {},
    "IA3 over biases (opt)": {},
    "IA3, fused (phi3)": {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "IA3 but for one": {"exclude_modules": ["0.mlp.down_proj"]},
}
"""What PEFT is asked for where it is not the same; its own table of targets where nothing is said."""


def theirs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return alone(model.eval(), sequences())


def peft_config(name: str) -> LoraConfig | IA3Config:
    family, values = ADAPTERS[name]
    asked: dict[str, Any] = {**values, "task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2"}
    if asked.pop("method", "lora") == "lora":
        return LoraConfig(**asked)
    return IA3Config(**{**asked, **THEIR_IA3.get(name, {})})


@pytest.mark.parametrize("name", [*ADAPTERS, *OURS_ALONE])
def test_our_folder_in_peft(name: str, tmp_path: Path) -> None:
    family, values = {**ADAPTERS, **OURS_ALONE}[name]
    base = tiny_base(family)
    bare = logits(base, batch_of(sequences()))
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**values))
    randomise(adapters, "a")
    write_adapter(tmp_path, adapters, "a", HERE)
    found = theirs(PeftModel.from_pretrained(tiny_model(family), tmp_path))
    assert relative(found, logits(base, batch_of(sequences(), "a"))) < 1e-5
    assert relative(found, bare) > 1e-3


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_folder_here(name: str, tmp_path: Path) -> None:
    family = ADAPTERS[name][0]
    model = get_peft_model(tiny_model(family), peft_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    model.save_pretrained(tmp_path)
    truth, base = theirs(model), tiny_base(family)
    bare = logits(base, batch_of(sequences()))
    assert load_adapter(Adapters(base.module), "theirs", read_adapter(tmp_path), HERE) is None
    assert relative(logits(base, batch_of(sequences(), "theirs")), truth) < 1e-5
    assert relative(truth, bare) > 1e-3


def test_the_keys_of_an_ia3_folder(tmp_path: Path) -> None:
    """Those that PEFT writes, and its shapes."""
    get_peft_model(tiny_model("llama"), peft_config("IA3")).save_pretrained(tmp_path / "theirs")
    base = tiny_base("llama")
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(method="ia3"))
    write_adapter(tmp_path / "ours", adapters, "a", HERE)
    ours, expected = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    different = {key for key in ours if ours[key] != expected[key] and not isinstance(ours[key], list)}
    assert different <= {"base_model_name_or_path", "peft_version"}
    assert sorted(ours["target_modules"]) == sorted(expected["target_modules"])
    assert ours["feedforward_modules"] == expected["feedforward_modules"]
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {key: t.shape for key, t in load_file(tmp_path / "ours" / "adapter_model.safetensors").items()} == {
        key: t.shape for key, t in tensors.items()
    }
    assert f"{PREFIX}model.layers.0.mlp.down_proj.ia3_l" in tensors


def test_magnitudes_begin_as_pefts(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), peft_config("DoRA"))
    base = tiny_base("llama")
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**ADAPTERS["DoRA"][1]))
    for path, part in adapters.parts("a").items():
        expected = model.get_submodule(f"base_model.model.{path}").lora_magnitude_vector["default"].weight
        assert relative(part.get_parameter("lora_magnitude_vector"), expected) < 1e-6


@pytest.mark.parametrize("values", [{}, {"use_rslora": True}], ids=["alpha over r", "rsLoRA"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_it_begins_and_learns_as_pefts(init: str, values: dict[str, Any]) -> None:
    """PEFT takes the first directions out of the base; gradients of A and B are the same."""
    asked = {**LORA, **values, "init_lora_weights": init}
    model = get_peft_model(tiny_model("llama"), LoraConfig(**asked, task_type="CAUSAL_LM"))
    base = tiny_base("llama")
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**asked))
    batch = learning_batch(sequences(), "a")
    parameters = adapters.parameters("a")
    found = torch.autograd.grad(base.log_probabilities(batch).sum(), list(parameters.values()))
    logits_there = alone(model, sequences())
    told = torch.log_softmax(logits_there[batch.labels.positions], -1).gather(-1, batch.labels.targets[:, None]).sum()
    own = {key.replace(".default", "").removeprefix(PREFIX): p for key, p in model.named_parameters() if "lora" in key}
    expected = dict(zip(own, torch.autograd.grad(told, list(own.values()))))
    assert own.keys() == parameters.keys()
    for key, gradient in zip(parameters, found):
        assert relative(parameters[key], own[key]) < 1e-5, key
        assert relative(gradient, expected[key]) < 1e-4, key
    for path, part in adapters.parts("a").items():
        assert isinstance(part, FromWeight)
        residual = model.get_submodule(f"base_model.model.{path}").base_layer.weight
        whole = tiny_weight(base.module, path)
        assert relative(whole - part.scaling * part.first_B @ part.first_A, residual) < 1e-5


def tiny_weight(model: PreTrainedModel, path: str) -> Tensor:
    return model.get_submodule(path).base_layer.weight


TWENTY: dict[str, dict[str, Any]] = {
    "DoRA": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "DoRA, rsLoRA, patterns": {"r": 4, "lora_alpha": 8, "use_dora": True, "use_rslora": True, **PATTERNS},
    "IA3": {"method": "ia3"},
}


@pytest.mark.parametrize("name", TWENTY)
def test_twenty_steps(name: str, small_llama: Path, tmp_path: Path) -> None:
    compare_twenty(small_llama, AdapterConfig(**TWENTY[name]), tmp_path)
