"""What an `adapter_config.json` of PEFT's other methods says: every key, as in `peft_keys.py`, and the options of it.
Free of torch."""

from collections.abc import Callable, Mapping
from typing import Any

from topwork.adapters.config import (
    PEFT_TARGETS,
    AdapterConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
    ReadOnlyConfig,
    VeraConfig,
)
from topwork.adapters.methods.readonly.forms import FORMS, Form
from topwork.adapters.peft_keys import COMMON, LORA, PREFIX_TUNING, PROMPT_TUNING, Key, What, check_keys
from topwork.common.errors import AdapterError


def _as(what: What, **defaults: Any) -> dict[str, Key]:
    return {name: Key(default, what) for name, default in defaults.items()}


def _idle(names: str) -> dict[str, Key]:
    return {name: Key(None, "idle") for name in names.split()}


_TARGETED = {
    **COMMON,
    **_as(
        "read", target_modules=None, exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        modules_to_save=None,
    ),
    **_idle("init_weights fan_in_fan_out"),
    **_as("refused", bias="none"),
}  # fmt: skip
"""Of every method that goes into modules."""
_LYCORIS = {
    **_TARGETED,
    **_as("read", r=8, alpha=8),
    **_idle("rank_dropout module_dropout use_effective_conv2d rank_dropout_scale"),
    **_as("refused", rank_pattern={}, alpha_pattern={}),
}
_TRAINING = {
    "ADALORA": "target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight",
    "BOFT": "boft_n_butterfly_factor boft_dropout",  # files of another factor have another shape
    "DELORA": "delora_lambda lambda_pattern module_dropout",
    "GRALORA": "gralora_dropout",
    "HIRA": "hira_dropout",
    "MISS": "miss_dropout",
    "PVERA": "projection_prng_key pvera_dropout d_initial generator_seed",
    "SHIRA": "mask_type random_seed",
    "VBLORA": "vblora_dropout init_vector_bank_bound init_logits_std",
}
"""Keys of methods that are only read which say how they began and learned."""


def _form(kind: str, form: Form) -> dict[str, Key]:
    own = LORA if kind == "ADALORA" else {}
    return {**own, **_TARGETED, **_idle(_TRAINING.get(kind, "")), **_as("read", **form.only, **form.defaults)}


OTHER_KEYS: Mapping[str, Mapping[str, Key]] = {
    "VERA": {
        **_TARGETED, **_as("read", r=256, projection_prng_key=0, save_projection=True, vera_dropout=0.0, d_initial=0.1)
    },
    "LOHA": _LYCORIS,
    "LOKR": {**_LYCORIS, **_as("read", decompose_both=False, decompose_factor=-1)},
    "OFT": {
        **_TARGETED,
        **_as(
            "read", r=0, oft_block_size=32, coft=False, eps=6e-5, block_share=False, use_cayley_neumann=True,
            num_cayley_neumann_terms=5,
        ),
        **_idle("module_dropout"),
    },
    "P_TUNING": {
        **PROMPT_TUNING,
        **_idle("encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout"),
    },
    "CPT": {
        **PROMPT_TUNING,
        **_idle(
            "cpt_token_ids cpt_mask cpt_tokens_type_mask opt_weighted_loss_type opt_loss_decay_factor "
            "opt_projection_epsilon opt_projection_format_epsilon"
        ),
    },
    "CARTRIDGE": {**PREFIX_TUNING, **_idle("num_frozen_tokens")},
    **{kind: _form(kind, form) for kind, form in FORMS.items()},
}  # fmt: skip
"""By `peft_type`."""
Read = Callable[[Mapping[str, Any], str], dict[str, Any]]


def targeted_options(peft_type: str, kind: type[AdapterConfig]) -> Read:
    """Of a method whose options have PEFT's names and defaults: what the file says of them."""

    def read(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
        check_keys(raw, OTHER_KEYS[peft_type], called)
        return {"target_modules": PEFT_TARGETS, **_given(raw, kind, "method", "init_from")}

    return read


vera_options = targeted_options("VERA", VeraConfig)
loha_options = targeted_options("LOHA", LohaConfig)
lokr_options = targeted_options("LOKR", LokrConfig)
oft_options = targeted_options("OFT", OftConfig)


def readonly_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Of a method in `FORMS`. Raises AdapterError."""
    kind = str(raw.get("peft_type"))
    form = FORMS[kind]
    check_keys(raw, OTHER_KEYS[kind], called)
    given = {key: raw[key] for key in (*form.defaults, *form.only) if raw.get(key) is not None}
    unread = [key for key, value in form.only.items() if (given.pop(key, value) or None) != (value or None)]
    unread += [f"{key}={given[key]}" for key, values in form.never.items() if given.get(key) in values]
    if unread:
        raise AdapterError(f"{called} uses {', '.join(unread)}, which cannot be read of {kind}")
    options = {**form.defaults, **given}
    chosen = _given(raw, ReadOnlyConfig, "method", "init_from", "peft_type", "options")
    return {"target_modules": PEFT_TARGETS, **chosen, "peft_type": kind, "options": options}


def _given(raw: Mapping[str, Any], kind: type[AdapterConfig], *but: str) -> dict[str, Any]:
    return {name: raw[name] for name in sorted(kind.model_fields.keys() - set(but)) if raw.get(name) is not None}
