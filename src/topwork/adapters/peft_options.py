"""What an `adapter_config.json` says, as a recipe's options. Free of torch, so that a recipe may begin from one.

Where it says nothing, or null, PEFT's defaults count and not those of recipes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from topwork.adapters.config import CONFIGS, PEFT_TARGETS, BitFitConfig, FullConfig, LoraConfig
from topwork.adapters.config import AdapterConfig as Config
from topwork.adapters.methods.readonly.forms import FORMS
from topwork.adapters.peft_keys import COMMON, IA3, KEYS, LORA, Key, check_keys
from topwork.adapters.peft_options_other import OTHER_KEYS, loha_options, lokr_options, oft_options, vera_options
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
_IA3_FIELDS = ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")
_TOLD_DEFAULTS = ("r", "lora_alpha")
"""What decides the arithmetic and is told where it is left out."""
_CAUSAL = (None, "CAUSAL_LM")


def lora_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Of PEFT's LORA. Raises AdapterError."""
    check_keys(raw, LORA, called)
    left_out = {"target_modules": PEFT_TARGETS, **{name: LORA[name].default for name in _TOLD_DEFAULTS}}
    fields = {**left_out, **_given(raw, LORA_FIELDS)}
    _check_scale(fields, called)
    if fields.get("lora_dropout") == 1:  # nothing would be learned by it; nothing of what was learned hangs on it
        fields["lora_dropout"] = 0.0
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
    if isinstance(tokens, dict) and len(tokens) == 1 and next(iter(tokens)).rpartition(".")[2] in EMBEDDING_NAMES:
        fields["trainable_token_indices"] = next(iter(tokens.values()))
    return fields


def ia3_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Of PEFT's IA3. Raises AdapterError."""
    check_keys(raw, IA3, called)
    return {"target_modules": PEFT_TARGETS, **_given(raw, _IA3_FIELDS)}


def prefix_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Of PEFT's PREFIX_TUNING and CARTRIDGE. Raises AdapterError."""
    return _virtual_options(raw, called)


def prompt_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Of PEFT's PROMPT_TUNING, P_TUNING and CPT. Raises AdapterError."""
    return _virtual_options(raw, called)


def _virtual_options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
    kind = str(raw.get("peft_type"))
    check_keys(raw, KEYS[kind] if kind in KEYS else OTHER_KEYS[kind], called)
    if raw.get("num_virtual_tokens") is None:
        raise AdapterError(
            f"{called} does not say num_virtual_tokens, for which PEFT has no default; write it into "
            "adapter_config.json: prompt_embeddings has a row for each"
        )
    return _given(raw, ("num_virtual_tokens",))


def own_names(kind: type[Config]) -> list[str]:
    """The options that files of a method write which PEFT has no form for."""
    return sorted(kind.model_fields.keys() - NOT_METHODS_OWN)


def own_options(kind: type[Config]) -> Callable[[Mapping[str, Any], str], dict[str, Any]]:
    """What such files say."""
    names = own_names(kind)
    known = {**COMMON, **{name: Key(None, "read") for name in (*names, "topwork_method")}}

    def options(raw: Mapping[str, Any], called: str) -> dict[str, Any]:
        check_keys(raw, known, called)
        return _given(raw, names)

    return options


_BY_TYPE: dict[str, tuple[str, Callable[[Mapping[str, Any], str], dict[str, Any]]]] = {
    "LORA": ("lora", lora_options), "IA3": ("ia3", ia3_options), "PREFIX_TUNING": ("prefix", prefix_options),
    "PROMPT_TUNING": ("prompt", prompt_options), "VERA": ("vera", vera_options), "LOHA": ("loha", loha_options),
    "LOKR": ("lokr", lokr_options), "OFT": ("oft", oft_options), "P_TUNING": ("prompt", prompt_options),
    "CPT": ("prompt", prompt_options), "CARTRIDGE": ("prefix", prefix_options),
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
    return described(CONFIGS[method], kind if own is None else method, read(raw, called), called)


def described(kind: type[Config], named: str, options: Mapping[str, Any], called: str) -> Config:
    """Options that were read. Raises AdapterError for values that a method `named` so cannot have."""
    try:
        return kind(**options)
    except ValidationError as error:
        told = "; ".join(
            f"{'.'.join(map(str, wrong['loc'])) or 'it'} is {quoted(wrong['input'])} ({wrong['msg']})"
            for wrong in error.errors()[:5]
        )
        raise AdapterError(f"{called} does not describe {_a(named)} adapter: {told}") from error


def reading_notes(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """What is to be said of a config that can be read."""
    notes = []
    known = KEYS.get(str(raw.get("peft_type")), {})
    absent = [name for name in _TOLD_DEFAULTS if name in known and raw.get(name) is None]
    if absent:
        values = ", ".join(f"{name}: {known[name].default}" for name in absent)
        notes.append(f"adapter_config.json does not say {' or '.join(absent)}; PEFT's own defaults count, {values}")
    if raw.get("lora_dropout") == 1:
        notes.append("lora_dropout is 1, by which nothing would be learned; it is read as 0")
    if raw.get("task_type") not in _CAUSAL:
        notes.append(f"task_type is {quoted(raw['task_type'])}; it is read as a causal language model's adapter")
    return tuple(notes)


def _given(raw: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: raw[name] for name in sorted(names) if raw.get(name) is not None}


def _check_scale(fields: Mapping[str, Any], called: str) -> None:
    """In words of our own, and before patterns and ranks are looked at: a scale of nothing is no adapter, and one that
    is no number is none either."""
    alpha = fields["lora_alpha"]
    finite = not isinstance(alpha, float) or math.isfinite(alpha)
    if isinstance(alpha, int | float) and not (finite and alpha > 0 and alpha is not True):
        raise AdapterError(
            f"{called}: lora_alpha is {quoted(alpha)}, and the update is scaled by lora_alpha / r; expected a number "
            "above 0, the one that it was trained with"
        )


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOaeio' else 'a'} {noun}"
