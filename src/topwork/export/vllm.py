"""vLLM's own rules for a PEFT folder (0.32: `lora/peft_helper.py`, `lora_model.py`), stated again, so that a folder is
known to be taken without a vLLM at hand.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from topwork.common.errors import RunError
from topwork.export.peft import CONFIG, TENSORS
from topwork.export.readers import VLLM_RANKS

REQUIRED = ("r", "lora_alpha", "target_modules")
REFUSED = ("use_dora", "lora_bias", "modules_to_save", "alora_invocation_tokens", "layer_replication", "use_bdlora",
           "use_qalora")  # fmt: skip
"""Keys whose presence it refuses."""
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Beginnings that leave the base as it is."""
TENSOR = re.compile(r"base_model\.model\.(?P<path>.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")


def served_rank(rank: int) -> int:
    """The least --max-lora-rank that holds this rank. ValueError over the largest (the preflight has refused it)."""
    return min(allowed for allowed in VLLM_RANKS if allowed >= rank)


def check_as_vllm(folder: Path, max_lora_rank: int) -> None:
    """RunError with all that vLLM would refuse of a written folder, or would read otherwise than PEFT does."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    wrong = [f"{key} is missing" for key in REQUIRED if key not in config] or _wrong(config, max_lora_rank)
    with safe_open(folder / TENSORS, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    wrong += [f"{key} is no tensor that it expects" for key in shapes if not TENSOR.fullmatch(key)]
    wrong += [
        f"{key} has rank {shape[axis]}, not r = {config['r']}"
        for key, shape in shapes.items()
        if shape[axis := 0 if key.endswith(("lora_A.weight", "lora_embedding_A")) else 1] != config.get("r")
    ]
    if wrong:
        raise RunError(f"vLLM would not take what was written: {'; '.join(wrong[:8])}. This is a defect of the export")


def _wrong(config: Mapping[str, Any], max_lora_rank: int) -> list[str]:
    wrong = [f"{key} is set" for key in REFUSED if config.get(key)]
    if config.get("bias", "none") != "none":
        wrong.append(f"bias is {config['bias']!r}")
    if (init := config.get("init_lora_weights", True)) not in INITS:
        wrong.append(f"init_lora_weights is {init!r}")
    if not isinstance(config["lora_alpha"], int):
        wrong.append(f"lora_alpha {config['lora_alpha']!r} is no whole number")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        wrong.append("patterns are set, which older versions overlook")
    if not 0 < config["r"] <= max_lora_rank:
        wrong.append(f"r is {config['r']}, over --max-lora-rank {max_lora_rank}")
    return wrong
