"""Fast layers: which layers get them, and that they change nothing but speed and memory."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from data.family_tokenizers import build_tokenizer
from reference.families import added, learning_batch, sequences, tiny_model
from reference.measure import GRADIENTS_APART, LOGITS_APART, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.devices import CACHED_KERNELS
from topwork.models import fast
from topwork.models.base import Base
from topwork.models.fast import FastLayer
from topwork.models.load import as_base
from topwork.models.recognise import is_fast
from topwork.ops.batch import Batch, Labels, Segment

WHOLE = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "olmo3",
    "smollm3", "exaone4",
}  # fmt: skip
HALF = {"mixtral": "MLP (MixtralSparseMoeBlock)", "qwen3_moe": "MLP (Qwen3MoeSparseMoeBlock)"}
PLAIN = ("gpt2", "opt", "phi", "starcoder2", "stablelm", "cohere")
LORA = AdapterConfig(r=4, lora_alpha=8)
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"o_proj": 3}},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "a saved norm": {"modules_to_save": ["post_attention_layernorm"]},
    "a saved MLP": {"modules_to_save": ["mlp"], "target_modules": ["q_proj", "o_proj"]},
    "a saved projection": {"modules_to_save": ["k_proj"], "target_modules": ["q_proj", "down_proj"]},
}


def based(model: PreTrainedModel, told: list[str] | None = None, **options: Any) -> Base:
    return as_base(model, None, "tiny", [].append if told is None else told.append, **options)  # type: ignore[arg-type]


def fast_layers(base: Base) -> list[FastLayer]:
    return [module for module in base.module.modules() if isinstance(module, FastLayer)]


def gradients(base: Base, adapters: Adapters, batch: Batch, names: tuple[str, ...]) -> list[Tensor]:
    """(log-probabilities, gradients of every adapter tensor), dropout on where the adapter has any."""
    for name in names:
        adapters.train(name)
    logprobs = base.log_probabilities(batch)
    (logprobs * batch.labels.loss_weights).sum().backward()
    for name in names:
        adapters.train(name, False)
    learned = [parameter for name in names for parameter in adapters.parameters(name).values()]
    return [logprobs.detach(), *(p.grad for p in learned if p.grad is not None)]


@pytest.mark.parametrize("family", sorted(WHOLE))
def test_a_family_built_as_llama_is_fast_in_every_part(family: str) -> None:
    told: list[str] = []
    base = based(tiny_model(family), told)
    assert [layer.attention_part is not None and layer.mlp_part is not None for layer in fast_layers(base)] == [
        True
    ] * 2
    assert not [line for line in told if "plain" in line]
    assert [layer.is_last for layer in fast_layers(base)] == [False, True]


@pytest.mark.parametrize("family", sorted(HALF))
def test_what_stays_plain_is_said(family: str) -> None:
    told: list[str] = []
    assert len(fast_layers(based(tiny_model(family), told))) == 2
    assert told == [f"{family}: runs on plain modules, slower: {HALF[family]} in 2 of 2 layers"]


@pytest.mark.parametrize("family", PLAIN)
def test_a_family_built_otherwise_runs_plain_and_says_so(family: str) -> None:
    told: list[str] = []
    assert not fast_layers(based(tiny_model(family), told))
    assert "plain modules" in told[-1]


@pytest.mark.parametrize("family", sorted(WHOLE | HALF.keys()))
def test_fast_is_plain_with_adapters(family: str) -> None:
    """Two adapters and the bare base in one batch."""
    model, parts = tiny_model(family), sequences()
    results = []
    for quick in (True, False):
        base = based(copy.deepcopy(model), fast=quick)
        targets = {"target_modules": ["q_proj", "o_proj", "v_proj"]} if family in HALF else {}
        adapters = added(base, a=LORA, b=AdapterConfig(r=3, lora_alpha=3, **targets))
        batch = learning_batch(parts)
        cut = batch.cu_seqlens
        segments = (Segment(0, cut[2], "a"), Segment(cut[2], cut[3], None), Segment(cut[3], cut[4], "b"))
        results.append(gradients(base, adapters, replace(batch, segments=segments), ("a", "b")))
    assert bool(fast_layers(base)) is False
    for one, other in zip(*results, strict=True):
        assert relative(one, other, 1e-6) < GRADIENTS_APART


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_every_kind_of_adapter_on_fast_layers(options: str, dropout: float) -> None:
    """With dropout both draw the same, also where the last layer has only the learned rows."""
    results = []
    for quick in (True, False):
        base = based(tiny_model("llama"), fast=quick)
        config = AdapterConfig.model_validate({"r": 4, "lora_alpha": 8, "lora_dropout": dropout, **OPTIONS[options]})
        adapters = added(base, a=config)
        results.append(gradients(base, adapters, learning_batch(sequences(), "a"), ("a",)))
    for one, other in zip(*results, strict=True):
        assert relative(one, other, 1e-6) < GRADIENTS_APART


@pytest.mark.parametrize("options", ["lora", "a saved norm", "a saved MLP", "a saved projection"])
def test_a_fresh_adapter_is_the_base_to_the_bit_in_bfloat16(options: str) -> None:
    """Where an adapter makes a part run as plain modules, that part rounds as the fast one did."""
    base = based(tiny_model("llama").bfloat16())
    adapters, batch = Adapters(base.module), learning_batch(sequences(), "a")
    bare = base.log_probabilities(replace(batch, segments=(Segment(0, len(batch.tokens), None),)))
    adapters.add("a", AdapterConfig.model_validate({"r": 4, **OPTIONS[options]}))
    assert torch.equal(base.log_probabilities(batch), bare)


def test_weights_of_a_group_are_one_product() -> None:
    """q, k and v and gate and up stand behind one another in memory, so two layers have four products of the base."""
    base, batch = based(tiny_model("llama")), learning_batch(sequences())
    counted = []
    for apart in (False, True):
        if apart:
            for layer in fast_layers(base):
                for weight in layer.joined():
                    weight.data = weight.data.clone()
        with profile() as seen, torch.no_grad():
            base.hidden(batch)
        counted.append(sum(event.count for event in seen.key_averages() if event.key == "aten::mm"))
    assert counted == [2 * 4, 2 * 7]


def test_taken_out_again_the_base_is_as_before() -> None:
    base = based(tiny_model("llama"))
    batch = learning_batch(sequences(), "a")
    names = [name for name, _ in base.module.named_parameters()]
    bare = base.log_probabilities(replace(batch, segments=(Segment(0, len(batch.tokens), None),)))
    adapters = added(base, a=LORA)
    assert not torch.equal(base.log_probabilities(batch), bare)
    adapters.remove("a")
    again = base.log_probabilities(replace(batch, segments=(Segment(0, len(batch.tokens), None),)))
    assert torch.equal(again, bare)
    assert [name for name, _ in base.module.named_parameters()] == names


def test_names_and_weights_are_those_of_the_plain_model() -> None:
    model = tiny_model("llama")
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    after = dict(based(model).module.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)


class Doubled(nn.Module):
    """Stands in for an activation that no table knows."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sin(x)


def _other_activation(layer: nn.Module) -> None:
    layer.mlp.act_fn = Doubled()  # type: ignore[union-attr]


def _other_norm(layer: nn.Module) -> None:
    size = layer.input_layernorm.weight.numel()  # type: ignore[union-attr, operator]
    layer.input_layernorm = nn.LayerNorm(size)


def _other_forward(layer: nn.Module) -> None:
    plain = layer.forward
    layer.forward = lambda *given, **named: 1.5 * plain(*given, **named)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (_other_activation, {"MLP (LlamaMLP)"}),
        (_other_norm, {"attention (LlamaAttention)"}),
        (_other_forward, {"all of it (LlamaDecoderLayer)"}),
    ],
)
def test_a_layer_is_chosen_by_what_it_does(change: Any, left: set[str]) -> None:
    """A llama that is none stays plain where it differs, and computes what it did."""
    models = tiny_model("llama"), tiny_model("llama")
    for model in models:
        change(model.model.layers[0])
    told: list[str] = []
    batch = learning_batch(sequences())
    expected = based(models[0], fast=False).log_probabilities(batch)
    base = based(models[1], told)
    assert told == [f"llama: runs on plain modules, slower: {part} in 1 of 2 layers" for part in left]
    assert relative(base.log_probabilities(batch), expected) < 1e-5


def test_the_last_layer_computes_only_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    base = based(tiny_model("llama"))
    adapters = added(base, a=LORA, b=LORA)
    batch = learning_batch(sequences())
    cut = batch.cu_seqlens
    some = torch.tensor([0, 5, cut[1], cut[3] + 2, cut[3] + 3, cut[4] - 1])
    batch = replace(
        batch, labels=Labels(some, batch.tokens[some], torch.ones(len(some))),
        segments=(Segment(0, cut[1], "a"), Segment(cut[1], cut[2], None), Segment(cut[2], cut[4], "b")),
    )  # fmt: skip
    rows: list[int] = []
    plain = fast.project

    def counted(x: Tensor, *others: Any, **options: Any) -> Tensor:
        rows.append(len(x))
        return plain(x, *others, **options)

    monkeypatch.setattr(fast, "project", counted)
    narrow = gradients(base, adapters, batch, ("a", "b"))
    assert rows == [cut[4]] * 4 + [cut[4]] + [len(some)] * 3
    fast_layers(base)[-1].is_last = False
    for parameter in (*adapters.parameters("a").values(), *adapters.parameters("b").values()):
        parameter.grad = None
    for one, other in zip(narrow, gradients(base, adapters, batch, ("a", "b")), strict=True):
        assert relative(one, other, 1e-6) < 1e-5


def test_hidden_states_of_all_tokens_are_still_to_be_had() -> None:
    base, batch = based(tiny_model("llama")), learning_batch(sequences())
    whole = base.hidden(batch)
    assert whole.shape[0] == len(batch.tokens)
    assert relative(base.hidden_rows(batch, batch.labels.positions), whole[batch.labels.positions]) < LOGITS_APART


def outliers(model: PreTrainedModel, size: float = 300.0) -> PreTrainedModel:
    """Values in the residual beside which what a layer adds is little, as in real models."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = size  # type: ignore[union-attr, index]
    return model


@pytest.mark.parametrize("family", ["ernie4_5", "glm4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_way_of_rotating_is_noticed(family: str, dtype: torch.dtype) -> None:
    """Theirs turns neighbours, not halves."""
    told: list[str] = []
    model = outliers(tiny_model(family)).to(dtype)
    expected = based(copy.deepcopy(model), fast=False).hidden(learning_batch(sequences())).float()
    base = based(model, told)
    assert all(layer.attention_part is None for layer in fast_layers(base))
    assert "attention" in told[-1]
    assert relative(base.hidden(learning_batch(sequences())).float(), expected) < (
        1e-4 if dtype == torch.float32 else 0.1
    )


def test_queries_scaled_by_position_are_noticed() -> None:
    """Ministral 3 scales them from a position on that few tokens never reach."""
    rope = {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
    }  # fmt: skip
    told: list[str] = []
    base = based(tiny_model("ministral3", rope_parameters=rope), told)
    assert all(layer.attention_part is None for layer in fast_layers(base))
    assert "attention (Ministral3Attention)" in told[-1]


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_fast_layers_beside_plain_ones_in_bfloat16(family: str) -> None:
    base = based(tiny_model(family).bfloat16())
    batch = learning_batch(sequences())
    plain = based(tiny_model(family).bfloat16(), fast=False)
    assert relative(base.log_probabilities(batch), plain.log_probabilities(batch)) < 0.05


class Scaled(LlamaDecoderLayer):
    """Has a tensor of its own, which no wiring knows."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return self.scale * super().forward(*given, **named)


def test_a_layer_with_tensors_of_its_own_stays_plain() -> None:
    model = tiny_model("llama")
    model.model.layers[1] = Scaled(model.config, 1)
    base = based(model)
    assert [type(layer).__name__ for layer in base.module.model.layers] == ["FastLayer", "Scaled"]
    assert "model.layers.1.scale" in base.module.state_dict()


@pytest.mark.parametrize("family", ["olmo2", "qwen3"])
def test_weights_put_in_later_are_used(family: str) -> None:
    """Norms of heads and sinks are looked up in every pass."""
    base, batch = based(tiny_model(family)), learning_batch(sequences())
    state = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in base.module.state_dict().items()}
    base.module.load_state_dict(state, assign=True)
    plain = tiny_model(family)
    plain.load_state_dict(state, assign=True)
    expected = based(plain, fast=False).log_probabilities(batch)
    assert relative(base.log_probabilities(batch), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_base_that_is_cast_later(dtype: torch.dtype) -> None:
    base, batch = based(tiny_model("llama").bfloat16()), learning_batch(sequences())
    base.module.to(dtype)
    plain = based(tiny_model("llama").bfloat16(), fast=False)
    plain.module.to(dtype)
    difference = relative(base.log_probabilities(batch), plain.log_probabilities(batch))
    assert difference < (1e-5 if dtype == torch.float32 else 1e-2)


LOADED = """
import os, sys
from topwork.models.load import load_base
from topwork.models.config import ModelConfig
base = load_base(ModelConfig(model_name_or_path=sys.argv[1], device="cpu"), lambda _: None)
print(type(base.module.model.layers[0]).__name__)
print(".safetensors" in open("/proc/self/maps").read())
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_loaded_base_holds_no_file_beside_its_weights(tmp_path: Path) -> None:
    """Joined weights were copied out of the mapped file, so all of it must go; and kernels are not kept for ever."""
    tokenizer = build_tokenizer("smollm2")
    for written in (tiny_model("llama", vocab_size=len(tokenizer)).bfloat16(), tokenizer):  # cast, it is not mapped
        written.save_pretrained(tmp_path)
    unset = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["FastLayer", "False", f"{CACHED_KERNELS} {CACHED_KERNELS}"]


@pytest.mark.parametrize(
    ("family", "quick", "whole"),
    [("llama", True, True), ("llama", False, False), ("mixtral", True, False), ("gpt2", True, False)],
)
def test_a_model_is_fast_where_every_part_of_it_is(family: str, quick: bool, whole: bool) -> None:
    """Memory is planned with it."""
    assert is_fast(based(tiny_model(family), fast=quick).module) is whole
