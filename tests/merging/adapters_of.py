"""Adapters of a tiny base on disk, with weights that change something, and how they are read again."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.families import randomise
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, bare_base
from topwork.adapters.peft_format import BaseId, read_adapter, write_adapter
from topwork.merging.changes import Changes, changes_of
from topwork.models.base import Base

CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 3, "lora_alpha": 5, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"k_proj": 64.0}, "exclude_modules": ["v_proj"],
    },
    "one layer by regex": {"r": 2, "target_modules": r"model\.layers\.1\..*(q|o)_proj"},
    "embedding": {"r": 3, "target_modules": ["embed_tokens", "v_proj"]},
    "head": {"r": 3, "target_modules": ["lm_head", "v_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "ia3": {"method": "ia3"},
    "saved": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    "tokens": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 17, 40]},
}  # fmt: skip


def write_one(folder: Path, base: Base, options: dict[str, Any], seed: int = 1, name: str = "tiny") -> Path:
    """A random adapter of these options."""
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**options))
    randomise(adapters, "a", seed)
    write_adapter(folder, adapters, "a", BaseId(name))
    adapters.remove("a")
    return folder


def changes(folder: Path, base: Base) -> Changes:
    """As the driver takes it."""
    weights = dict(base.module.named_parameters(remove_duplicate=False))

    def read(name: str) -> Tensor:
        return weights[name].detach().float()

    return changes_of(folder.name, read_adapter(folder), bare_base(base.module), read)


@torch.no_grad()
def dense(changed: Changes) -> dict[str, Tensor]:
    """Every change by the parameter's name, as the model lays it out."""
    found = {f"{path}.weight": changed.of_parameter(path, "weight") for path in changed.adapted}
    found |= {f"{path}.{name}": changed.of_parameter(path, name) for path, name in changed.whole}
    return {name: delta.double() for name, delta in found.items() if delta is not None}
