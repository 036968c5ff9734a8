"""PEFT's LORA folders: LoRA, rsLoRA, DoRA. What began with PiSSA or OLoRA is written as the LoRA of rank 2 r that it is
(`adapters/inits.py`), with the ranks and alphas that keep its scale."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from topwork.adapters.config import AdapterConfig
from topwork.adapters.embedding import EMBEDDING_NAMES, EmbeddingLora
from topwork.adapters.formats.format import Format, has_conv1d, peft_keys, sorted_or_none
from topwork.adapters.graft import Adapters, bare_modules
from topwork.adapters.inits import PAIRS
from topwork.adapters.lora import Lora
from topwork.adapters.targets import matching
from topwork.common.errors import AdapterError

SHARED_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights",
    "trainable_token_indices",
)  # fmt: skip
CHANGE_THE_BASE = ("pissa_niter", "loftq", "corda", "lora_ga")
"""Beginnings that PEFT takes out of the base, other than those that are found again from it (PiSSA, OLoRA)."""
UNSUPPORTED = (
    "lora_bias", "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip


def _keys(adapters: Adapters, name: str) -> dict[str, Any]:
    config = adapters.configs[name]
    modules = bare_modules(adapters.model)
    targets = [path for path, part in adapters.parts(name).items() if isinstance(part, Lora | EmbeddingLora)]
    written = _written_targets(config, targets, modules)
    by_path = written == sorted(targets)  # the list is the choice; PEFT would choose among it once more
    return {
        **peft_keys("LORA"),
        **{field: getattr(config, field) for field in SHARED_FIELDS},
        **_ranks(config),
        "target_modules": written,
        "layers_to_transform": None if by_path else config.layers_to_transform,
        "layers_pattern": None if by_path else config.layers_pattern,
        "modules_to_save": sorted_or_none(config.modules_to_save),
        "bias": "none",
        "fan_in_fan_out": has_conv1d(modules, targets),
        "init_lora_weights": config.init_lora_weights if config.init_lora_weights == "gaussian" else True,
        "lora_bias": False,
    }


def _ranks(config: AdapterConfig) -> dict[str, Any]:
    """Ranks and alphas of what is in the file: twice the rank with the same scale, where the base lacks a part."""
    twice = config.init_lora_weights in PAIRS
    alphas = (math.sqrt(2) if config.use_rslora else 2) if twice else 1
    ranks = 2 if twice else 1
    return {
        "r": ranks * config.r,
        "rank_pattern": {key: ranks * r for key, r in config.rank_pattern.items()},
        "lora_alpha": alphas * config.lora_alpha,
        "alpha_pattern": {key: alphas * alpha for key, alpha in config.alpha_pattern.items()},
    }


def _written_targets(config: AdapterConfig, paths: list[str], modules: Mapping[str, nn.Module]) -> str | list[str]:
    """all-linear is written out, as names where the names alone say it. PEFT takes no layers beside a regular
    expression: whole paths then."""
    if isinstance(config.target_modules, list):
        return sorted(config.target_modules)
    if config.target_modules != "all-linear":
        return sorted(paths) if config.layers_to_transform is not None else config.target_modules
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if set(matching(modules, names)) == set(paths) else sorted(paths)


def _options(raw: Mapping[str, Any], folder: str) -> dict[str, Any]:
    present = [key for key in UNSUPPORTED if raw.get(key)]
    if raw.get("bias", "none") != "none":
        present.append(f"bias={raw['bias']}")
    if present:
        raise AdapterError(f"{folder} uses {', '.join(present)}, which cannot be read; LoRA, rsLoRA and DoRA can")
    fields = {key: raw[key] for key in SHARED_FIELDS if key in raw and raw[key] is not None}
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGE_THE_BASE):
        raise AdapterError(
            f"{folder} began with init_lora_weights: {init}, for which PEFT changes the base's weights in a way that "
            "its file does not tell; save it as an ordinary LoRA (PEFT: save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)), and load that"
        )
    if init not in (True, "gaussian", *PAIRS):
        fields["init_lora_weights"] = True  # the weights are in the file; how they began does not matter
    tokens = fields.get("trainable_token_indices")
    if isinstance(tokens, dict):  # by module
        if len(tokens) != 1 or next(iter(tokens)).rpartition(".")[2] not in EMBEDDING_NAMES:
            raise AdapterError(f"{folder} trains tokens of {sorted(tokens)}; those of the input embedding can be read")
        fields["trainable_token_indices"] = next(iter(tokens.values()))
    return fields


LORA = Format("LORA", _keys, _options)
