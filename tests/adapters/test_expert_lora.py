"""LoRA on experts and routers: as PEFT chooses, means, writes and reads it, and as autograd differentiates it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference.families import (
    added,
    alone,
    batch_differences,
    learning_batch,
    logits,
    randomise,
    sequences,
    tiny_base,
    tiny_model,
)
from reference.measure import LOGITS_APART, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.methods.lora.experts import ExpertsLora, RouterLora
from topwork.adapters.methods.lora.parameters import OLD_NAMES, told_of_experts
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError
from topwork.merging.changes import changes_of
from topwork.models.base import Base
from topwork.ops.batch import Segment, batch_of

pytestmark = pytest.mark.slow

HERE = BaseId("tiny", "sha256:one")
GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
BOTH: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": [GATE_UP, DOWN]}
ALL: dict[str, Any] = {"target_modules": "all-linear"}
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", BOTH),
    "mixtral, all-linear": ("mixtral", ALL),
    "mixtral by its old names": ("mixtral", {"target_modules": ["v_proj", "w1", "w2", "w3"]}),
    "mixtral's router": ("mixtral", {"target_modules": ["q_proj", "gate"]}),
    "qwen3_moe, one of two": ("qwen3_moe", {**BOTH, "target_parameters": [GATE_UP]}),
    "qwen3_moe, no modules": ("qwen3_moe", {**BOTH, "target_modules": []}),
    "qwen3_moe, all-linear, rsLoRA": ("qwen3_moe", {**ALL, "use_rslora": True}),
    "qwen3_moe, ranks": ("qwen3_moe", {**BOTH, "rank_pattern": {DOWN: 2}, "alpha_pattern": {GATE_UP: 5}}),
    "qwen3_moe by its old names": ("qwen3_moe", {"target_modules": ["q_proj", "down_proj"]}),
    "qwen3_moe by an expression": ("qwen3_moe", {"target_modules": r".*\.(o_proj|gate_proj|up_proj)"}),
    "qwen2_moe, all-linear": ("qwen2_moe", ALL),
    "qwen2_moe": ("qwen2_moe", BOTH),
    "olmoe, all-linear": ("olmoe", ALL),
    "deepseek_v3, all-linear": ("deepseek_v3", ALL),
    "gpt_oss": ("gpt_oss", BOTH),
    "gpt_oss, all-linear": ("gpt_oss", ALL),
    "gpt_oss, its router": ("gpt_oss", {"target_modules": [], "target_parameters": ["router.weight", "down_proj"]}),
    "a linear layer's weight": ("llama", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}),
}  # fmt: skip


def config(values: dict[str, Any]) -> AdapterConfig:
    return AdapterConfig(**{"r": 4, "lora_alpha": 12, **values})


def by_peft(family: str, values: dict[str, Any]) -> Any:
    """PEFT's model, with weights that change something."""
    own: dict[str, Any] = {key: list(value) if isinstance(value, list) else value for key, value in values.items()}
    model: Any = get_peft_model(tiny_model(family), LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **own))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def theirs(model: Any) -> Tensor:
    with torch.no_grad():
        return alone(model.eval(), sequences())


def ours(base: Base, name: str | None = "a") -> Tensor:
    return logits(base, batch_of(sequences(), name))


def loaded(folder: Path, family: str) -> Base:
    base = tiny_base(family)
    load_adapter(Adapters(base.module), "a", read_adapter(folder), HERE)
    return base


@pytest.mark.parametrize("name", CHOICES)
def test_pefts_folder_here_and_ours_there(name: str, tmp_path: Path) -> None:
    family, values = CHOICES[name]
    model = by_peft(family, values)
    truth = theirs(model)
    model.save_pretrained(tmp_path / "theirs")
    assert relative(ours(loaded(tmp_path / "theirs", family)), truth) < LOGITS_APART
    assert relative(truth, ours(tiny_base(family), None)) > 1e-3

    base = tiny_base(family)
    adapters = added(base, a=config(values))
    write_adapter(tmp_path / "ours", adapters, "a", HERE)
    found = theirs(PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours"))
    assert relative(found, ours(base)) < LOGITS_APART
    assert torch.equal(ours(loaded(tmp_path / "ours", family)), ours(base))
    sides = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")]
    assert shapes(sides[0]) == shapes(sides[1])


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def test_a_fresh_one_begins_as_pefts_does() -> None:
    """A as wide as its inputs say, B zero."""
    base = tiny_base("mixtral")
    adapters = Adapters(base.module)
    adapters.add("a", config({**BOTH, "init_lora_weights": True}))
    for part in adapters.parts("a").values():
        if isinstance(part, ExpertsLora):
            for name in part.names:
                a = part.lora_A[name]
                assert a.abs().max() <= a.shape[1] ** -0.5
                assert abs(float(a.detach().std()) * (3 * a.shape[1]) ** 0.5 - 1) < 0.1
                assert not part.lora_B[name].any()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_gradients_are_those_of_the_merged_weights(family: str) -> None:
    """All-linear, experts and router among them, against autograd through transformers' own modules."""
    assert batch_differences(family)["adapter gradients"] < 1e-5


def test_two_adapters_and_none_in_one_batch_are_each_alone() -> None:
    base = tiny_base("qwen3_moe")
    adapters = added(base, a=config(ALL), b=config({**BOTH, "rank_pattern": {GATE_UP: 7}}))
    batch = learning_batch(sequences())
    spans = list(zip(batch.cu_seqlens, batch.cu_seqlens[1:]))
    mixed = replace(batch, segments=tuple(Segment(s, e, n) for (s, e), n in zip(spans, ["a", "b", None, "a"])))
    apart = [replace(batch, segments=tuple(replace(s, adapter=n) for s in batch.segments)) for n in ("a", "b", None)]
    found, alike = logits(base, mixed), [logits(base, one) for one in apart]
    for (start, stop), which in zip(spans, [0, 1, 2, 0]):
        assert relative(found[start:stop], alike[which][start:stop]) < LOGITS_APART
    base.log_probabilities(mixed).sum().backward()
    assert all(p.grad is not None for name in ("a", "b") for p in adapters.parameters(name).values())


def per_expert(family: str, names: dict[str, tuple[int, int]], parent: str, extra: list[str]) -> dict[str, Tensor]:
    """Tensors as PEFT wrote them when experts were linear layers, over transformers 4."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    at = "base_model.model.model.layers"

    def pair(key: str, inputs: int, outputs: int) -> None:
        tensors[f"{key}.lora_A.weight"] = 0.3 * torch.randn(4, inputs, generator=generator)
        tensors[f"{key}.lora_B.weight"] = 0.3 * torch.randn(outputs, 4, generator=generator)

    for layer in range(2):
        for expert in range(4):
            for name, (inputs, outputs) in names.items():
                pair(f"{at}.{layer}.{parent}.experts.{expert}.{name}", inputs, outputs)
        pair(f"{at}.{layer}.self_attn.q_proj", 64, 64)
        for name in extra:
            pair(f"{at}.{layer}.{parent}.{name}", 64, 4)
    return tensors


OLD: dict[str, tuple[str, dict[str, tuple[int, int]], str, list[str]]] = {
    "mixtral": ("mixtral", {"w1": (64, 96), "w2": (96, 64), "w3": (64, 96)}, "block_sparse_moe", ["gate"]),
    "qwen3_moe": (
        "qwen3_moe", {"gate_proj": (64, 32), "down_proj": (32, 64), "up_proj": (64, 32)}, "mlp", [],
    ),
}  # fmt: skip


def write_old(folder: Path, tensors: dict[str, Tensor], targets: list[str]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**told, "bias": "none"}))


@pytest.mark.parametrize("name", OLD)
def test_an_adapter_of_experts_by_number_is_what_peft_makes_of_it(name: str, tmp_path: Path) -> None:
    family, names, _, extra = OLD[name]
    write_old(tmp_path / "old", per_expert(*OLD[name]), ["q_proj", *names, *extra])
    truth = theirs(PeftModel.from_pretrained(tiny_model(family), tmp_path / "old"))
    base = loaded(tmp_path / "old", family)
    assert relative(ours(base), truth) < LOGITS_APART
    assert relative(truth, ours(base, None)) > 1e-2


def test_what_lacks_an_expert_or_one_of_two_is_named(tmp_path: Path) -> None:
    family, names, _, extra = OLD["mixtral"]
    tensors = per_expert(*OLD["mixtral"])
    some = {key: tensor for key, tensor in tensors.items() if ".experts.2.w1" not in key}
    write_old(tmp_path / "some", some, ["q_proj", *names, *extra])
    with pytest.raises(AdapterError, match=r"lora_A of w1 lacks those of 2"):
        loaded(tmp_path / "some", family)
    half = {key: tensor for key, tensor in tensors.items() if ".w3." not in key}
    write_old(tmp_path / "half", half, ["q_proj", "w1", "w2", *extra])
    with pytest.raises(AdapterError, match=r"w1.*and not at w3"):
        loaded(tmp_path / "half", family)


def test_factors_that_peft_once_wrote_turned_round(tmp_path: Path) -> None:
    """PEFT 0.18: ParamWrapper took every parameter as [E, in, out]."""
    model = by_peft("mixtral", BOTH)
    truth = theirs(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, turned = load_file(file), {}
    for key, tensor in tensors.items():
        inside, other = ".experts." in key, key.replace("lora_A", "lora_B")
        if inside and "lora_A" in key:
            b = tensors[other]
            turned[key] = b.reshape(len(b), -1, 4).permute(2, 1, 0).reshape(-1, len(b)).contiguous()
            turned[other] = tensor.reshape(4, -1, tensor.shape[1]).permute(2, 1, 0).flatten(1).contiguous()
        elif not inside:
            turned[key] = tensor
    assert shapes(turned) != shapes(tensors)
    save_file(turned, file, metadata={"format": "pt"})
    assert relative(ours(loaded(tmp_path, "mixtral")), truth) < LOGITS_APART


def test_the_families_that_peft_converts() -> None:
    known, patterns = conversion._MOE_TARGET_MODULE_MAPPING, conversion._MODEL_TO_CONVERSION_PATTERN  # type: ignore[attr-defined]
    expected = {
        family: known[pattern] for family, pattern in patterns.items() if pattern in known
    }  # fmt: skip
    by_type = {family: names for family, names in expected.items() if family.islower()}  # the others are classes
    assert {family: dict(names) for family, names in OLD_NAMES.items()} == by_type


def refused(family: str, **values: Any) -> str:
    with pytest.raises(AdapterError) as error:
        Adapters(tiny_base(family).module).add("a", AdapterConfig(**values))
    return str(error.value)


def test_what_cannot_be_is_named() -> None:
    told = refused("mixtral", target_parameters=["experts.gate_proj"])
    assert "target_parameters names 'experts.gate_proj'" in told
    assert "experts.gate_up_proj" in told
    assert "mlp.gate.weight" in told
    assert "input_layernorm.weight" in refused("mixtral", target_parameters=["input_layernorm.weight"])
    told = refused("mixtral", use_dora=True)
    assert "use_dora goes into linear layers" in told
    assert "[k_proj, o_proj, q_proj, v_proj]" in told
    told = refused("gpt_oss", target_modules=["q_proj", "gate_up_proj"])
    assert "a parameter here (model.layers.0.mlp.experts.gate_up_proj)" in told
    assert "pissa" in refused("qwen3_moe", init_lora_weights="pissa")
    assert "w1, which mixtral holds in one parameter with w3" in refused("mixtral", target_modules=["w1", "q_proj"])
    told = refused("llama", target_modules=["q_proj"], target_parameters=["q_proj.weight"])
    assert "name it once" in told
    assert "matches no target module" in refused("mixtral", rank_pattern={"experts.up_proj": 3})
    with pytest.raises(ValueError, match="list"):
        AdapterConfig(target_parameters="experts.down_proj")


def test_dropout_is_left_to_the_linear_layers(tmp_path: Path) -> None:
    """PEFT has none beside parameters, and refuses a folder that says so."""
    base = tiny_base("mixtral")
    adapters = added(base, a=config({**ALL, "lora_dropout": 0.3}))
    write_adapter(tmp_path, adapters, "a", HERE)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    expected = ours(base)
    adapters.train("a")
    assert relative(logits(base, learning_batch(sequences(), "a")), expected) > 1e-3
    adapters.train("a", False)
    assert relative(theirs(PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path)), ours(base)) < LOGITS_APART


def test_what_is_adapted_is_said() -> None:
    def told(family: str, values: dict[str, Any]) -> list[str]:
        return told_of_experts(Adapters(tiny_base(family).module).bare().seen, config(values))  # type: ignore[arg-type]

    (line,) = told("mixtral", ALL)
    assert line.endswith("mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.weight")
    (line,) = told("gpt_oss", ALL)
    assert "experts stay as they are: mlp.experts.down_proj, mlp.experts.gate_up_proj;" in line
    assert len(told("qwen3_moe", {**BOTH, "target_parameters": [DOWN], "lora_dropout": 0.1})) == 2
    assert told("llama", ALL) == []


def test_a_routers_part_is_lora_of_its_weight() -> None:
    base = tiny_base("mixtral")
    adapters = added(base, a=config({"target_modules": ["gate"], "target_parameters": None}))
    assert {type(part) for part in adapters.parts("a").values()} == {RouterLora}
    before = base.module.model.layers[0].mlp.gate.weight.clone()
    randomise(adapters, "a", 5)
    assert torch.equal(base.module.model.layers[0].mlp.gate.weight, before)


def test_experts_cannot_be_saved_whole_and_a_router_can() -> None:
    assert "adapt them with target_parameters" in refused(
        "mixtral", target_modules=["q_proj"], modules_to_save=["experts"]
    )
    base = tiny_base("mixtral")
    before = ours(base, None)
    adapters = Adapters(base.module)
    adapters.add("a", config({"target_modules": ["q_proj"], "modules_to_save": ["gate"]}))
    assert relative(ours(base), before) < LOGITS_APART
    randomise(adapters, "a")
    assert relative(ours(base), before) > 1e-3


def test_what_has_no_delta_of_one_matrix_is_not_combined(tmp_path: Path) -> None:
    base = tiny_base("mixtral")
    adapters = added(base, a=config(BOTH))
    write_adapter(tmp_path, adapters, "a", HERE)
    bare = adapters.bare()
    with pytest.raises(AdapterError, match=r"one: it adapts parameters of .*experts \(target_parameters\)"):
        changes_of("one", read_adapter(tmp_path), bare, lambda name: base.module.get_parameter(name))
