"""What an `adapter_config.json` says, as a recipe's options. Free of torch, so that a recipe may begin from one."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from topwork.adapters.config import (
    CONFIGS,
    BitFitConfig,
    FullConfig,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    OftConfig,
    ReadOnlyConfig,
    VeraConfig,
)
from topwork.adapters.config import AdapterConfig as Config
from topwork.adapters.methods.readonly.forms import FORMS
from topwork.common.errors import AdapterError, quoted, shortened

NOT_METHODS_OWN = {"method", "init_from"}
"""Fields of every method's options that are no part of what an adapter is."""
LORA_FIELDS = LoraConfig.model_fields.keys() - NOT_METHODS_OWN
"""Options that PEFT has by the same names: all."""
EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "embed_in")
"""What families call their input embedding."""
FROM_WEIGHT = ("pissa", "olora")
"""Beginnings that are found again from the base's weights."""
_CHANGE_THE_BASE = ("pissa_niter", "loftq", "corda", "lora_ga")
"""Beginnings that PEFT takes out of the base, other than those."""
_UNSUPPORTED = (
    "lora_bias", "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
_PEFT_LEAVES_OUT = {"r": 8, "lora_alpha": 8}
"""What PEFT takes where adapter_config.json says nothing; a recipe's own defaults are others."""
_IA3_FIELDS = ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")


def lora_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Of PEFT's LORA. Raises AdapterError."""
    present = [key for key in _UNSUPPORTED if raw.get(key)]
    if raw.get("bias", "none") != "none":
        present.append(f"bias={raw['bias']}")
    if present:
        raise AdapterError(f"{called} uses {', '.join(present)}, which cannot be read; LoRA, rsLoRA and DoRA can")
    fields = {**_PEFT_LEAVES_OUT, **{key: raw[key] for key in LORA_FIELDS if raw.get(key) is not None}}
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGE_THE_BASE):
        raise AdapterError(
            f"{called} began with init_lora_weights: {init}, for which PEFT changes the base's weights in a way that "
            "its file does not tell; save it as an ordinary LoRA (PEFT: save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)), and load that"
        )
    if init not in (True, "gaussian", *FROM_WEIGHT):
        fields["init_lora_weights"] = True  # the weights are in the file; how they began does not matter
    tokens = fields.get("trainable_token_indices")
    if isinstance(tokens, dict):  # by module
        if len(tokens) != 1 or next(iter(tokens)).rpartition(".")[2] not in EMBEDDING_NAMES:
            raise AdapterError(f"{called} trains tokens of {sorted(tokens)}; those of the input embedding can be read")
        fields["trainable_token_indices"] = next(iter(tokens.values()))
    return fields


def ia3_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:  # noqa: ARG001
    """Of PEFT's IA3."""
    return {key: raw[key] for key in _IA3_FIELDS if raw.get(key) is not None}


def virtual_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Of PEFT's PREFIX_TUNING and PROMPT_TUNING. Raises AdapterError."""
    if raw.get("modules_to_save") or (raw.get("num_transformer_submodules") or 1) != 1:
        raise AdapterError(
            f"{called} has modules_to_save or num_transformer_submodules beside its virtual tokens, which cannot be "
            "read; a decoder's virtual tokens alone can"
        )
    return {"num_virtual_tokens": raw.get("num_virtual_tokens")}


def own_names(kind: type[Config]) -> list[str]:
    """The options that files of a method write which PEFT has no form for."""
    return sorted(kind.model_fields.keys() - NOT_METHODS_OWN)


def own_options(kind: type[Config]) -> Callable[[Mapping[str, Any], str], dict[str, Any]]:
    """What such files say."""
    names = own_names(kind)
    return lambda raw, _: {name: raw[name] for name in names if raw.get(name) is not None}


def targeted_options(kind: type[Config], *unsupported: str) -> Callable[[Mapping[str, Any], str], dict[str, Any]]:
    """Of a method whose options have PEFT's names and defaults: what the file says of them. Raises AdapterError for a
    folder that uses what is `unsupported`, trains biases or names no target."""
    names = own_names(kind)

    def read(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
        refuse_unread(raw, called, unsupported)
        return {name: raw[name] for name in names if raw.get(name) is not None}

    return read


def refuse_unread(raw: Mapping[str, Any], called: str, unsupported: Iterable[str] = ()) -> None:
    """AdapterError for a folder of a method other than LoRA that uses what cannot be read of it."""
    present = [key for key in unsupported if raw.get(key)]
    if raw.get("bias", "none") != "none":
        present.append(f"bias={raw['bias']}")
    if present:
        raise AdapterError(f"{called} uses {', '.join(present)}, which cannot be read of {raw.get('peft_type')}")
    if raw.get("target_modules") is None:
        raise AdapterError(f"{called} names no target_modules, which PEFT writes out; bring back its own config")


_PATTERNS = ("rank_pattern", "alpha_pattern")
vera_options = targeted_options(VeraConfig)
loha_options = targeted_options(LohaConfig, *_PATTERNS)
lokr_options = targeted_options(LokrConfig, *_PATTERNS)
oft_options = targeted_options(OftConfig)
"""Of PEFT's VERA, LOHA, LOKR and OFT."""


def readonly_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Of a method in `FORMS`. Raises AdapterError."""
    kind = str(raw.get("peft_type"))
    form = FORMS[kind]
    given = {key: raw[key] for key in (*form.defaults, *form.only) if raw.get(key) is not None}
    unread = [key for key, value in form.only.items() if (given.pop(key, value) or None) != (value or None)]
    unread += [f"{key}={given[key]}" for key, values in form.never.items() if given.get(key) in values]
    if unread:
        raise AdapterError(f"{called} uses {', '.join(unread)}, which cannot be read of {kind}")
    refuse_unread(raw, called)
    names = ReadOnlyConfig.model_fields.keys() - NOT_METHODS_OWN - {"peft_type", "options"}
    chosen = {name: raw[name] for name in names if raw.get(name) is not None}
    return {**chosen, "peft_type": kind, "options": {**form.defaults, **given}}


_BY_TYPE: dict[str, tuple[str, Callable[[Mapping[str, Any], str], dict[str, Any]]]] = {
    "LORA": ("lora", lora_options), "IA3": ("ia3", ia3_options), "PREFIX_TUNING": ("prefix", virtual_options),
    "PROMPT_TUNING": ("prompt", virtual_options), "VERA": ("vera", vera_options), "LOHA": ("loha", loha_options),
    "LOKR": ("lokr", lokr_options), "OFT": ("oft", oft_options),
    "P_TUNING": ("prompt", virtual_options), "CPT": ("prompt", virtual_options),
    "CARTRIDGE": ("prefix", virtual_options),
}  # fmt: skip
_BY_NAME = {"bitfit": own_options(BitFitConfig), "full": own_options(FullConfig)}


def config_in(raw: Mapping[str, Any], called: str) -> Config:
    """The options of one of the methods that ship. Raises AdapterError, which names what is `called` so."""
    kind, own = str(raw.get("peft_type")), raw.get("topwork_method")
    method, read = (str(own), _BY_NAME.get(str(own))) if own is not None else _BY_TYPE.get(kind, (kind, None))
    if read is None and kind in FORMS:
        raise AdapterError(
            f"{called} holds an adapter of peft_type {kind}, which is run, merged and served, and not trained on; "
            "begin a LoRA, on the base into which it is merged (topwork merge)"
        )
    if read is None:
        what = f"of method {quoted(own)}" if own is not None else f"of peft_type {shortened(kind, 80)}"
        known = ", ".join([*sorted(_BY_TYPE), *sorted(_BY_NAME)])
        raise AdapterError(f"{called} holds an adapter {what}; {known} can be read")
    try:
        return CONFIGS[method](method=method, **read(raw, called))
    except ValidationError as error:
        raise AdapterError(f"{called} does not describe a {method} adapter: {error}") from error
