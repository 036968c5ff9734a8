"""The formulas of planning memory against what is really allocated and kept, of tiny models."""

from typing import Any

import pytest
import torch

from reference.compiler import NATIVE
from reference.families import added, learning_batch, sequences, tiny_base
from reference.kept import kept_bytes_per_token as measured_per_token
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.sizes import tensor_sizes
from topwork.models import fast
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.config import ModelConfig
from topwork.models.recognise import is_fast
from topwork.models.structure_of import structure_of
from topwork.objectives.sft import Sft
from topwork.ops import parts, workspace
from topwork.plan.base import structure_named
from topwork.quantization.config import QuantizationConfig
from topwork.training import memory_pass
from topwork.training.memory import PassShape, Setup, peak
from topwork.training.memory_layers import given_bytes, layers_of, total
from topwork.training.memory_pass import copies_gradient_bytes, layer_need, logits_bytes, pass_need
from topwork.training.memory_process import CUDA_ALLOCATOR_BYTES, CUDA_CONTEXT_BYTES
from topwork.training.memory_setup import Member
from topwork.training.step import Learner, train_step

WIDE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "n_embd": 128, "n_inner": 256, "ffn_dim": 256,
    "word_embed_proj_dim": 128,
}  # fmt: skip
LORA: dict[str, Any] = {"r": 2}
METHODS: dict[str, dict[str, Any]] = {
    "dropout": {**LORA, "lora_dropout": 0.1}, "DoRA": {**LORA, "use_dora": True}, "IA3": {"method": "ia3"},
    "PiSSA": {**LORA, "init_lora_weights": "pissa"},
}  # fmt: skip
MODULES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"}, "DoRA with dropout": {**LORA, "use_dora": True, "lora_dropout": 0.1},
    "a saved MLP": {**LORA, "modules_to_save": ["mlp"]},
}  # fmt: skip


def kept(family: str, dtype: torch.dtype, count: int = 0, **options: Any) -> tuple[float, float]:
    """Bytes a token between a short and a long batch: (by autograd's hooks, by the formulas)."""
    base = tiny_base(family, **WIDE, dtype=dtype)
    structure, adapter = structure_of(base.module, is_fast(base.module)), AdapterConfig(**options)
    adapters = Adapters(base.module)
    adapters.add("a", adapter)
    adapters.train("a")
    checkpoint_layers(base, count)
    short, long = (learning_batch(sequences([length] * 2), "a") for length in (8, 24))
    told = str(dtype).removeprefix("torch.")
    setup = Setup(structure, told, QuantizationConfig(), (Member(adapter, "adamw", tensor_sizes(structure, adapter)),))
    formulas = [planned_kept(setup, len(batch), count) for batch in (short, long)]
    last_norm = 4 * structure.hidden + 4 if structure.family not in ("gpt2", "opt", "phi") else 0
    last_norm = last_norm or dtype.itemsize * (structure.hidden + 2)
    per_token = (formulas[1] - formulas[0]) / (len(long) - len(short))
    return measured_per_token(base, short, long), per_token + last_norm


def planned_kept(setup: Setup, tokens: int, count: int) -> int:
    """All rows go through all layers, as where hidden states are asked for."""
    shape, layers = PassShape(tokens, tokens, tokens), layers_of(setup)
    needs = total(layer_need(layer, shape) for layer in layers[count:])
    return needs.saved + needs.heap + tokens * given_bytes(setup.structure, setup.value_bytes, count)


@pytest.mark.skipif(not NATIVE, reason="plain torch keeps no logarithms of the softmax")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3", "granite", "smollm3"])
def test_what_fast_layers_keep_is_what_the_formula_says(family: str, dtype: torch.dtype) -> None:
    found, expected = kept(family, dtype, **LORA)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "starcoder2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_what_plain_layers_keep_is_near(family: str) -> None:
    found, expected = kept(family, torch.bfloat16, **LORA)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.skipif(not NATIVE, reason="plain torch keeps no logarithms of the softmax")
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_methods_keep(family: str, options: dict[str, Any]) -> None:
    found, expected = kept(family, torch.bfloat16, **options)
    if family == "llama" and options == METHODS["DoRA"]:
        expected -= 2 * 2 * WIDE["hidden_size"]  # down's products, which hooks do not see (`ops/project.py`)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_what_is_kept_where_parts_run_as_modules_is_near(options: dict[str, Any]) -> None:
    found, expected = kept("llama", torch.bfloat16, **options)
    assert 0.93 * found < expected < 1.15 * found


@pytest.mark.skipif(not NATIVE, reason="plain torch keeps no logarithms of the softmax")
@pytest.mark.parametrize(("family", "count"), [("llama", 1), ("llama", 2), ("gpt2", 1), ("gpt2", 2)])
def test_of_a_checkpointed_layer_what_it_was_given_is_kept(family: str, count: int) -> None:
    found, expected = kept(family, torch.bfloat16, count, **LORA)
    assert found == pytest.approx(expected, rel=0.05)


def test_without_a_workspace_a_gated_units_gradient_has_memory_of_its_own() -> None:
    """A checkpointed layer has none, nor has a GPU; and beside gains, which look at gate and up again, it is not in
    place."""
    structure, shape = structure_of(tiny_base("llama", **WIDE).module, fast=True), PassShape(40, 40, 40)

    def handed_on(options: dict[str, Any], again: bool, **more: Any) -> int:
        adapter = AdapterConfig(**options)
        member = Member(adapter, "adamw", tensor_sizes(structure, adapter))
        setup = Setup(structure, "bfloat16", QuantizationConfig(), (member,), **more)
        return layer_need(layers_of(setup)[0], shape, again).handoff

    both = 40 * 2 * 2 * WIDE["intermediate_size"]
    assert handed_on(LORA, again=False) < both
    assert handed_on(LORA, again=True) == both
    assert handed_on(LORA, again=False, device="cuda") == both
    assert handed_on(METHODS["DoRA"], again=False) == both


@pytest.mark.parametrize("options", [LORA, METHODS["dropout"], METHODS["DoRA"], METHODS["IA3"]], ids=str)
@pytest.mark.skipif(not NATIVE, reason="plain torch writes to memory of its own")
def test_a_passs_blocks_are_what_the_formula_says(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a step's pass, which hold what hooks do not see, too; a chunk of logits lies in the scratch."""
    monkeypatch.setattr(workspace, "LEAST_BLOCK", 1)
    if options.get("lora_dropout"):  # which takes less in one step, on AMX: the formula is that of single steps
        monkeypatch.setattr(fast, "decoder_layer_of", lambda *_: None)
        monkeypatch.setattr(fast, "feedforward_of", lambda *_: None)
    base, adapter = tiny_base("llama", **WIDE, dtype=torch.bfloat16), AdapterConfig(**options)
    structure = structure_of(base.module, is_fast(base.module))
    adapters = added(base, a=adapter)
    adapters.train("a")
    member = Member(adapter, "adamw", tensor_sizes(structure, adapter))
    setup = Setup(structure, "bfloat16", QuantizationConfig(), (member,))
    batch = learning_batch(sequences([100, 100]), "a")
    parameters = list(adapters.parameters("a").values())
    train_step(base, [Learner("a", Sft(), parameters, torch.optim.SGD(parameters, lr=0.1), 1.0)], [batch])
    own, shape = base.workspace, PassShape(len(batch), len(batch.labels), 100)
    assert own is not None
    need, (logits, _) = pass_need(setup, shape, 0), logits_bytes(setup, shape)
    assert sum(map(len, own._saved)) == pytest.approx(need.saved, rel=0.02)
    found = [sum(map(len, blocks)) for blocks in (own._scratch, own._handoff, own._handback)]
    assert found == pytest.approx([max(need.scratch, logits), need.handoff, need.handback], rel=0.1)


def test_a_small_layers_packed_weights_are_dense_together() -> None:
    assert memory_pass.OPENED_BYTES == parts.MOST_OPENED
    structure, adapter = structure_named(ModelConfig(model_name_or_path="smollm2-135m")), AdapterConfig(**LORA)
    member, shape = Member(adapter, "adamw", tensor_sizes(structure, adapter)), PassShape(512, 256, 512)
    for device, dtype, expected in (
        ("cpu", "bfloat16", (3 * 576 * 1536 + 2 * 576 * (576 + 192)) * 2),
        ("cpu", "float32", 2 << 20),
    ):
        bare, packed = (
            pass_need(Setup(structure, dtype, QuantizationConfig(load_in_4bit=four), (member,), device), shape, 0)  # type: ignore[arg-type]
            for four in (False, True)
        )
        assert packed.scratch - bare.scratch == expected


def test_a_gpus_process_is_cudas_context_where_nobody_measured_it() -> None:
    structure, adapter = structure_named(ModelConfig(model_name_or_path="smollm2-135m")), AdapterConfig(**LORA)
    member = Member(adapter, "adamw", tensor_sizes(structure, adapter))
    shape = PassShape(512, 256, 512)
    for device, measured, expected in (("cuda", None, CUDA_CONTEXT_BYTES), ("cuda", 5, 5)):
        setup = Setup(structure, "bfloat16", QuantizationConfig(), (member,), device, process_bytes=measured)  # type: ignore[arg-type]
        parts = peak(setup, shape).parts
        assert parts["process"] == expected
        assert parts["allocator"] == CUDA_ALLOCATOR_BYTES


def test_modules_trained_whole_pass_their_gradient_in_both_types() -> None:
    structure = structure_named(ModelConfig(model_name_or_path="smollm2-135m"))
    table = structure.by_path[str(structure.embedding)].weights
    for options, expected in (
        ({"method": "full"}, (2 + 4) * table),  # the head is the embedding's copy: two gradients, then their sum
        ({"modules_to_save": ["embed_tokens"]}, 2 * table),
        ({}, 0),
    ):
        adapter = AdapterConfig(**options)
        member = Member(adapter, "adamw", tensor_sizes(structure, adapter))
        setup = Setup(structure, "bfloat16", QuantizationConfig(), (member,))
        assert copies_gradient_bytes(setup) == expected
