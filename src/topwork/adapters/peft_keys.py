"""Every key of an `adapter_config.json`, and what becomes of it here: PEFT 0.21.2's, and those of others that change
nothing. A key that stands in no table may change the arithmetic: set to anything, it is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from topwork.common.errors import AdapterError, quoted

What = Literal["read", "idle", "refused"]


@dataclass(frozen=True)
class Key:
    """What PEFT takes where the key is left out, and whether it is read, says nothing of what an adapter computes, or
    is refused where it is set to something else."""

    default: Any
    what: What


def _keys(what: What, **defaults: Any) -> dict[str, Key]:
    return {name: Key(default, what) for name, default in defaults.items()}


COMMON = {
    **_keys("read", peft_type=None, base_model_name_or_path=None),
    **_keys("idle", task_type=None, auto_mapping=None, peft_version=None, revision=None, inference_mode=False),
}
"""Of every method."""
LORA = {
    **COMMON,
    **_keys(
        "read", r=8, target_modules=None, exclude_modules=None, lora_alpha=8, lora_dropout=0.0, use_rslora=False,
        modules_to_save=None, init_lora_weights=True, layers_to_transform=None, layers_pattern=None, rank_pattern={},
        alpha_pattern={}, trainable_token_indices=None, use_dora=False, bias="none", lora_bias=False,
        target_parameters=None,
    ),
    # how training began, or went backward; which Megatron; what the base's own layers tell (fan_in_fan_out) and the
    # file's tensors do (ensure_weight_tying)
    **_keys(
        "idle", fan_in_fan_out=False, megatron_config=None, megatron_core="megatron.core", loftq_config={},
        eva_config=None, corda_config=None, lora_ga_config=None, qalora_group_size=16, runtime_config={},
        ensure_weight_tying=False,
    ),
    **_keys(
        "refused", layer_replication=None, velora_config=None,
        alora_invocation_tokens=None, use_qalora=False, use_bdlora=None, arrow_config=None, kasa_config=None,
        monteclora_config=None,
    ),
}  # fmt: skip
IA3 = {
    **COMMON,
    **_keys("read", target_modules=None, exclude_modules=None, feedforward_modules=None, modules_to_save=None),
    **_keys("idle", fan_in_fan_out=False, init_ia3_weights=True),
}
_VIRTUAL = {
    **COMMON,
    **_keys("read", num_virtual_tokens=None),
    **_keys("idle", token_dim=None, num_attention_heads=None, num_layers=None),
    **_keys("refused", num_transformer_submodules=1, modules_to_save=None),
}
PREFIX_TUNING = {
    **_VIRTUAL,
    # a file's keys and values are those after the projection
    **_keys("idle", init_weights=None, encoder_hidden_size=None, prefix_projection=False),
}
PROMPT_TUNING = {
    **_VIRTUAL,
    **_keys(
        "idle", prompt_tuning_init="RANDOM", prompt_tuning_init_text=None, tokenizer_name_or_path=None,
        tokenizer_kwargs=None,
    ),
}  # fmt: skip
KEYS: Mapping[str, Mapping[str, Key]] = {
    "LORA": LORA, "IA3": IA3, "PREFIX_TUNING": PREFIX_TUNING, "PROMPT_TUNING": PROMPT_TUNING
}  # fmt: skip
"""By `peft_type`."""
OTHERS = {"merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "swift_type", "tokenizer_name_or_path"}
"""Keys that PEFT does not write any more (up to 0.2), never did (ms-swift) or not of every method, and that say nothing
of what an adapter computes."""


def check_keys(raw: Mapping[str, Any], known: Mapping[str, Key], called: str) -> None:
    """Raises AdapterError, which names what is `called` so, for keys that are refused or not known, where they are set
    to something that may change what is computed."""
    refused = sorted(name for name, key in known.items() if key.what == "refused" and _is_set(raw.get(name), key))
    if refused:
        values = {name: quoted(raw[name]).strip("'") for name in refused}
        told = ", ".join(name if raw[name] is True else f"{name}={value}" for name, value in values.items())
        raise AdapterError(f"{called} uses {told}, which cannot be read; {_READABLE}")
    strange = sorted(name for name in raw.keys() - known.keys() - OTHERS if _is_set(raw[name], Key(None, "refused")))
    if strange:
        told = ", ".join(f"{quoted(name)} to {quoted(raw[name])}" for name in strange[:5])
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        by = raw.get("peft_version")
        raise AdapterError(
            f"{called} sets {told}{more}, which is not known here"
            f"{f' (PEFT {quoted(by)} wrote it)' if by else ''}; what it changes can't be told, so the adapter is not "
            "read. Where it says nothing of what is computed, take the key out of adapter_config.json"
        )


_READABLE = "LoRA, rsLoRA, DoRA, IA3, and a decoder's virtual tokens alone can"


def _is_set(value: Any, key: Key) -> bool:
    """Whether it is something else than nothing and than what is taken where it is left out."""
    return not (value is None or value is False or value in ("", [], {}) or value == key.default)
