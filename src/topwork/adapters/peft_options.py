"""What an `adapter_config.json` says, as a recipe's options. Free of torch, so that a recipe may begin from one."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from topwork.adapters.config import CONFIGS, BitFitConfig, FullConfig, LoraConfig
from topwork.adapters.config import AdapterConfig as Config
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
    "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora",
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


_BY_TYPE: dict[str, tuple[str, Callable[[Mapping[str, Any], str], dict[str, Any]]]] = {
    "LORA": ("lora", lora_options), "IA3": ("ia3", ia3_options), "PREFIX_TUNING": ("prefix", virtual_options),
    "PROMPT_TUNING": ("prompt", virtual_options),
}  # fmt: skip
_BY_NAME = {"bitfit": own_options(BitFitConfig), "full": own_options(FullConfig)}


def config_in(raw: Mapping[str, Any], called: str) -> Config:
    """The options of one of the methods that ship. Raises AdapterError, which names what is `called` so."""
    kind, own = str(raw.get("peft_type")), raw.get("topwork_method")
    method, read = (str(own), _BY_NAME.get(str(own))) if own is not None else _BY_TYPE.get(kind, (kind, None))
    if read is None:
        what = f"of method {quoted(own)}" if own is not None else f"of peft_type {shortened(kind, 80)}"
        known = ", ".join([*sorted(_BY_TYPE), *sorted(_BY_NAME)])
        raise AdapterError(f"{called} holds an adapter {what}; {known} can be read")
    try:
        return CONFIGS[method](method=method, **read(raw, called))
    except ValidationError as error:
        raise AdapterError(f"{called} does not describe a {method} adapter: {error}") from error
