"""What `ensure_weight_tying` leaves out of a config: PEFT names the embedding alone, and its file has the head with it.
Free of torch: names are read from the file's header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topwork.adapters.config import AdapterConfig, LoraConfig
from topwork.adapters.names import own_names, split_name
from topwork.adapters.targets import matching

LONGEST_HEADER = 1 << 26


def with_tied_head(config: AdapterConfig, raw: Mapping[str, Any], file: Path) -> AdapterConfig:
    """Options of an adapter_config.json that name the head too, where PEFT kept it with the embedding."""
    if not raw.get("ensure_weight_tying") or not isinstance(config, LoraConfig):
        return config
    found = [split_name(key) for key in own_names(dict.fromkeys(tensor_names(file)), str(file)).tensors]
    saved, targets = config.saved_modules, config.target_modules
    whole = [path for path, part in found if part == "weight" and not any(f"{name}." in f"{path}." for name in saved)]
    change: dict[str, Any] = {"modules_to_save": [*config.saved_modules, *whole]} if whole else {}
    if isinstance(targets, list):
        adapted = [path for path, part in found if part == "lora_A.weight" and not matching([path], targets)]
        change |= {"target_modules": [*targets, *adapted]} if adapted else {}
    return config.model_copy(update=change)


def tensor_names(file: Path) -> list[str]:
    """Of a safetensors file; none of what is no such file, which its reader will tell."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length <= LONGEST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []
