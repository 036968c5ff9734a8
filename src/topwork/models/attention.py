"""The attention function that Topwork gives to transformers, and how a model is set to use it.

Hugging Face models hand their queries, keys and values to a function looked up by name. Ours reads the current batch
and keeps its sequences apart; what it cannot do is refused by name and not left out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from topwork.common.errors import ModelError
from topwork.ops.attention import flat_attention
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.context import current, current_batch

FLAT = "topwork_flat"
"""The name under which transformers finds the function."""

KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
HARMLESS = {"position_ids", "cache_position", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k"}


def use_flat_attention(model: PreTrainedModel) -> None:
    """Set `model` to flat attention. Raises ModelError naming what stands in the way, where it cannot be."""
    config = model.config.get_text_config()
    family = config.model_type
    strange = sorted(set(getattr(config, "layer_types", None) or []) - KNOWN_LAYER_TYPES)
    if strange:
        raise ModelError(
            f"{family}: layers of type {', '.join(strange)} carry state from one sequence of a batch to the next; "
            "only full and sliding-window attention can be trained. Choose a base without them."
        )
    if getattr(config, "attention_chunk_size", None):
        raise ModelError(f"{family}: chunked attention (attention_chunk_size) is not supported; choose another base.")
    if not type(model)._can_set_attn_implementation():
        raise ModelError(
            f"{family}: its attention is not exchangeable in transformers (no AttentionInterface), so sequences of a "
            "batch cannot be kept apart; choose another base."
        )
    AttentionInterface.register(FLAT, flat_attention_forward)
    model.set_attn_implementation(FLAT)


def flat_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' contract: query [1, H, T, D], key and value [1, H_kv, T, D] -> ([1, T, H, D], no weights)."""
    _refuse_unknown(module, attention_mask, dropout, is_causal, kwargs)
    batch, context = current_batch(), current()
    rule = AttentionRule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if context.virtual:
        k, v = context.with_prefix(module.layer_idx, k, v)  # type: ignore[arg-type]
    value_size = v.shape[-1]
    if value_size != q.shape[-1]:
        v = torch.nn.functional.pad(v, (0, q.shape[-1] - value_size))
    if context.cache is not None:
        out = context.cache.attend(module, q, k, v, rule, s_aux)
    else:
        out = flat_attention(q, k, v, batch.cu_seqlens, rule, s_aux)
    return out[None, ..., :value_size], None


def _refuse_unknown(
    module: nn.Module, mask: Tensor | None, dropout: float, is_causal: bool | None, others: dict[str, Any]
) -> None:
    name = type(module).__name__
    if mask is not None:
        raise ModelError(f"{name} brings an attention mask of its own; flat batches take none. Choose another base.")
    if dropout:
        raise ModelError(f"{name} asks for attention dropout {dropout}; a frozen base runs without. Call model.eval().")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{name} attends in both directions; only causal language models can be trained.")
    unknown = sorted(key for key, value in others.items() if isinstance(value, Tensor) and key not in HARMLESS)
    if unknown:
        raise ModelError(f"{name} passes {', '.join(unknown)} to its attention, which flat batches do not know.")
