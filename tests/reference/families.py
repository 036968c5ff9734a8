"""Tiny random models of a family, and the measure of how far its flat batch is from each sequence alone.

The other side is transformers' own forward pass (`eager` attention) of the very same weights, one sequence at a time.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, bare_modules
from topwork.adapters.methods.lora.experts import ExpertsLora
from topwork.adapters.methods.lora.lora import Lora
from topwork.common.seeds import hashed
from topwork.models.base import Base
from topwork.models.load import as_base
from topwork.ops.batch import Batch, Labels, batch_of

VOCABULARY, WINDOW, CONTEXT = 99, 5, 64
LENGTHS = (13, 1, 7, 24)
"""Longer than the sliding window, and one of a single token."""

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": WINDOW, "num_local_experts": 4,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_embd": 64, "n_layer": 2, "n_head": 4,
    "n_positions": CONTEXT, "n_inner": 96, "ffn_dim": 96, "word_embed_proj_dim": 64, "query_pre_attn_scalar": 16,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
OWN: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "layer_types": MIXED},
    "qwen3": {"use_sliding_window": True, "layer_types": MIXED},
    "qwen3_moe": {"use_sliding_window": True},
    "smollm3": {"use_sliding_window": True, "layer_types": MIXED, "no_rope_layers": [1, 0]},
    "gemma2": {"layer_types": MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"layer_types": MIXED},
    "gpt_oss": {"layer_types": MIXED},
    "cohere2": {"layer_types": MIXED, "logit_scale": 0.25},
    "cohere": {"logit_scale": 0.25},
    "exaone4": {"layer_types": MIXED},
    "olmo3": {"layer_types": MIXED},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "bloom": {"seq_length": CONTEXT},
    "falcon": {"alibi": True},
    "deepseek_v3": {
        "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "q_lora_rank": 24,
        "kv_lora_rank": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4, "max_position_embeddings": CONTEXT},
    "qwen2_vl_text": {"use_sliding_window": True, "layer_types": MIXED, "rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
}  # fmt: skip
"""What makes a family differ from llama, switched on and small enough to be seen."""
_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
PICTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text", {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        {"mm_tokens_per_image": 4, "image_token_index": 98, "boi_token_index": 97, "eoi_token_index": 96},
    ),
    "llava": ("llama", {**_TOWER, "model_type": "clip_vision_model"}, {"image_token_index": 98}),
    "mistral3": ("mistral", {**_TOWER, "model_type": "pixtral"}, {"image_token_index": 98}),
    "qwen2_vl": (
        "qwen2_vl_text", {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
        {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl_text",
        {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2,
         "patch_size": 14, "fullatt_block_indexes": [0]},
        {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95},
    ),
}  # fmt: skip
"""Models that read pictures too: their text part, their vision part, and their own values."""


def tiny_model(family: str, **values: Any) -> PreTrainedModel:
    """A random model of two layers, fp32, seeded, without attention dropout; `values` go before the sizes above."""
    config = AutoConfig.for_model(family, **tiny_values(family, **values))
    config.get_text_config().attention_dropout = 0.0
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if family in PICTURES else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "sinks" in name:  # norms of one and biases of zero would hide mistakes
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_values(family: str, **values: Any) -> dict[str, Any]:
    """A config's values for it; of a model that reads pictures too `values` are its text part's."""
    if family in PICTURES:
        text, vision, own = PICTURES[family]
        return {"text_config": {"model_type": text, **tiny_values(text, **values)}, "vision_config": vision, **own}
    known = AutoConfig.for_model(family).to_dict()
    fitting = {key: value for key, value in SIZES.items() if key in known}
    return {**fitting, **OWN.get(family, {}), **values}


def tiny_base(family: str = "llama", dtype: torch.dtype = torch.float32, name: str = "tiny", **values: Any) -> Base:
    """The same as a frozen base on flat batches, without a tokenizer."""
    return as_base(tiny_model(family, **values).to(dtype), None, name, lambda _: None)  # type: ignore[arg-type]


def sequences(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def learning_batch(parts: Sequence[Tensor], adapter: str | None = None, seed: int = 0) -> Batch:
    """A batch in which every token but each sequence's first is learned, with uneven weights; for dropout its
    sequences have seeds of their own."""
    batch = batch_of(list(parts), adapter).with_dropout_seeds([hashed(seed, number) for number in range(len(parts))])
    starts = torch.tensor(batch.cu_seqlens[:-1])
    rows = torch.tensor([i for i in range(len(batch.tokens) - 1) if i + 1 not in starts], dtype=torch.int64)
    weights = 0.5 + torch.rand(len(rows), generator=torch.Generator().manual_seed(seed))
    return replace(batch, labels=Labels(rows, batch.tokens[rows + 1], weights))


def chosen_labels(batch: Batch, chosen: Tensor) -> Labels:
    """Some of a batch's labels, by a mask or their numbers."""
    labels = batch.labels
    return Labels(labels.positions[chosen], labels.targets[chosen], labels.loss_weights[chosen])


def alone(model: PreTrainedModel, parts: Sequence[Tensor]) -> Tensor:
    """Logits [T, V] of transformers' own forward, each sequence in a call of its own."""
    return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])


def randomise(adapters: Adapters, name: str, seed: int = 1) -> None:
    """Give a fresh adapter a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters(name).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def added(base: Base, **configs: AdapterConfig) -> Adapters:
    """Adapters by name, every one with weights of its own that change something."""
    adapters = Adapters(base.module)
    for number, (name, config) in enumerate(configs.items()):
        adapters.add(name, config, seed=number)
        randomise(adapters, name, seed=number)
    return adapters


def logits(base: Base, batch: Batch) -> Tensor:
    """Of every token, without a gradient."""
    with torch.no_grad():
        return base.logits(batch, torch.arange(len(batch.tokens)))


def batch_differences(family: str, **values: Any) -> dict[str, float]:
    """Relative differences of the logits, of the base's gradients and of a LoRA adapter's gradients.

    Raises topwork's ModelError where the family is refused.
    """
    theirs = tiny_model(family, **values)
    base = as_base(copy.deepcopy(theirs), None, family, lambda _: None)  # type: ignore[arg-type]
    parts = sequences()
    batch = learning_batch(parts)
    with torch.no_grad():
        logits = relative(base.logits(batch, torch.arange(len(batch.tokens))), alone(theirs, parts))
    whole = relative(*_base_gradients(base, theirs, batch, parts))
    return {"logits": logits, "gradients": whole, "adapter gradients": _adapter_difference(base, theirs, batch, parts)}


def _base_gradients(
    base: Base, theirs: PreTrainedModel, batch: Batch, parts: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    found = []
    for model in (base.module, theirs):
        model.requires_grad_(True)
        logprobs = base.log_probabilities(batch) if model is base.module else _their_logprobs(theirs, batch, parts)
        (batch.labels.loss_weights * logprobs).sum().backward()
        found.append([p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()])
        model.zero_grad()
        model.requires_grad_(False)
    return found[0], found[1]


def _adapter_difference(base: Base, theirs: PreTrainedModel, batch: Batch, parts: Sequence[Tensor]) -> float:
    """Gradients of a LoRA on every linear layer: ours through the batch, theirs by the weight that merging gives."""
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, lora_alpha=8))
    randomise(adapters, "a")
    own = replace(batch, segments=tuple(replace(s, adapter="a") for s in batch.segments))
    gradient = -batch.labels.loss_weights
    (gradient * base.log_probabilities(own, gradient)).sum().backward()
    ours = [parameter.grad for parameter in adapters.parameters("a").values()]
    merged = _merged_weights(base, theirs, adapters)
    logprobs = _their_logprobs(theirs, batch, parts, merged)
    expected = torch.autograd.grad((gradient * logprobs).sum(), list(adapters.parameters("a").values()))
    return relative(ours, expected)


def _merged_weights(base: Base, theirs: PreTrainedModel, adapters: Adapters) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    modules = bare_modules(base.module)
    for path, part in adapters.parts("a").items():
        own = theirs.get_submodule(path)
        if isinstance(part, ExpertsLora):
            merged |= {f"{path}.{name}": own.get_parameter(name) + expert_delta(part, name) for name in part.names}
            continue
        assert isinstance(part, Lora)
        delta = part.scaling * (part.lora_B @ part.lora_A)
        merged[f"{path}.weight"] = own.get_parameter("weight") + (
            delta.T if isinstance(modules[path], Conv1D) else delta
        )
    return merged


def expert_delta(part: ExpertsLora, name: str) -> Tensor:
    """What a LoRA adds to an experts' parameter, as it is held; by PEFT's formula (ParamWrapper.get_delta_weight)."""
    a, b = part.lora_A[name], part.lora_B[name]
    a, b = a.reshape(part.experts, -1, a.shape[-1]), b.reshape(len(b), -1, part.experts)
    return part.scalings[part.names.index(name)] * torch.einsum(
        "o r e, e r i -> e i o" if part.transposed else "o r e, e r i -> e o i", b, a
    )


def _their_logprobs(
    model: PreTrainedModel, batch: Batch, parts: Sequence[Tensor], merged: dict[str, Tensor] | None = None
) -> Tensor:
    call = {"use_cache": False}
    logits = torch.cat([
        torch.func.functional_call(model, merged or {}, kwargs={"input_ids": part[None], **call}).logits[0]
        for part in parts
    ])  # fmt: skip
    return torch.log_softmax(logits[batch.labels.positions].float(), -1).gather(-1, batch.labels.targets[:, None])[:, 0]
