"""Rotary positions as llama.cpp is told of them.

Llama 3's scaling and longrope's are tensors in the file, by which each frequency is divided; they are taken from
transformers' own tables (`modeling_rope_utils`), so that no second formula can differ from the one that was trained
with. linear and YaRN are keys.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from topwork.common.errors import ModelError
from topwork.export.gguf.families import Family

_KNOWN = {
    "default": {"rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings"},
    "linear": {"rope_theta", "rope_type", "type", "factor", "partial_rotary_factor"},
    "yarn": {
        "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
        "truncate", "attention_factor", "partial_rotary_factor",
    },
}  # fmt: skip
"""What each scaling that is written as keys may ask for; the scalings written as tensors come whole."""


@dataclass(frozen=True)
class Rope:
    """Keys (`rope.…`), keys for layers that slide, tensors by name (fp32 [D/2]), and what is to be told."""

    keys: dict[str, Any]
    sliding: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def rope_of(config: Any, family: Family, head: int) -> Rope:
    """Of transformers' config object. Raises ModelError for a scaling that this architecture does not read."""
    parameters = config.rope_parameters
    full, sliding = parameters.get("full_attention", parameters), parameters.get("sliding_attention")
    kind = full["rope_type"]
    if kind not in family.rope_types:
        raise ModelError(
            f"this model scales its rotary frequencies by {kind!r}, which llama.cpp's {family.architecture!r} does not "
            f"read (it reads {', '.join(family.rope_types)}): the file would be another model"
        )
    strange = set(full) - _KNOWN.get(kind, set(full)) - {key for key, value in full.items() if value is None}
    if strange:
        raise ModelError(f"rotary scaling {kind!r} with {', '.join(sorted(strange))} has no place in a GGUF file")
    partial = float(full.get("partial_rotary_factor") or 1.0)
    if partial != 1.0 and family.architecture != "phi3":
        raise ModelError(f"partial_rotary_factor {partial} is not written for {family.architecture!r}")
    dimensions = int(head * partial)
    keys: dict[str, Any] = {"rope.dimension_count": dimensions, "rope.freq_base": float(full["rope_theta"])}
    if kind == "longrope":
        return _longrope(config, keys, dimensions)
    factors = {"rope_freqs.weight": _llama3(config, full, dimensions)} if kind == "llama3" else {}
    return Rope({**keys, **_scaling(kind, full)}, _sliding(sliding), factors)


def _scaling(kind: str, full: dict[str, Any]) -> dict[str, Any]:
    if kind not in ("linear", "yarn"):
        return {}
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind == "yarn":
        if full.get("attention_factor") is not None or full.get("truncate") is False:
            raise ModelError(
                "YaRN with an attention_factor of its own, or truncate: false, has no place in a GGUF file"
            )
        keys["rope.scaling.original_context_length"] = int(full["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if full.get(name) is not None:
                keys[f"rope.scaling.yarn_{name}"] = float(full[name])
    return keys


def _sliding(sliding: dict[str, Any] | None) -> dict[str, Any]:
    """Layers that slide may turn by a base of their own, unscaled."""
    if sliding is None:
        return {}
    if sliding["rope_type"] != "default":
        raise ModelError(
            f"layers that slide scale their rotary frequencies by {sliding['rope_type']!r}, not read there"
        )
    return {"rope.freq_base_swa": float(sliding["rope_theta"])}


def _unscaled(theta: float, dimensions: int) -> Tensor:
    return theta ** -(torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions)


def _llama3(config: Any, full: dict[str, Any], dimensions: int) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (_unscaled(full["rope_theta"], dimensions) / scaled.double()).float()


def _longrope(config: Any, keys: dict[str, Any], dimensions: int) -> Rope:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    full = config.rope_parameters
    original = int(full["original_max_position_embeddings"])
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    factors = {
        f"rope_factors_{which}.weight": torch.tensor(full[f"{which}_factor"], dtype=torch.float32)
        for which in ("long", "short")
    }
    if any(len(values) != dimensions // 2 for values in factors.values()):
        raise ModelError(f"longrope's factors are not {dimensions // 2} each, as many as rotary frequencies")
    keys["rope.scaling.original_context_length"] = original
    keys["rope.scaling.attn_factor"] = float(attention)
    told = (
        f"longrope: llama.cpp takes the factors of long texts where its context is set above {original} tokens, "
        f"transformers where a text is longer; ask it for a context of {original} (-c {original}) for shorter ones"
    )
    return Rope(keys, factors=factors, notes=(told,))
