"""PEFT folders for PEFT and for the servers that read its plain form."""

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import PREFIX, Grafted, has_conv1d, names_of, peft_keys
from topwork.adapters.fitting import Parts, state_of
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import BaseId, write_grafted
from topwork.common.files import write_bytes, write_json
from topwork.export.lowered import Lowered

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_kept(folder: Path, config: AdapterConfig, parts: Parts, bare: Bare, base: BaseId) -> None:
    """An adapter with all that it is, for PEFT itself: of PiSSA and OLoRA the difference from what they began as."""
    write_grafted(folder, Grafted(config, parts, state_of(parts), bare.modules, bare.config), bare, base)


def write_plain(folder: Path, adapter: Lowered, bare: Bare, base: str | None) -> None:
    """The plain form of a LoRA: fp32, one rank, lora_alpha = r, targets by name. The same adapter gives the same
    bytes."""
    write_bytes(folder / TENSORS, save(plain_tensors(adapter), metadata={"format": "pt"}))
    write_json(folder / CONFIG, plain_config(adapter, bare, base))


def plain_tensors(adapter: Lowered) -> dict[str, Tensor]:
    """Its tensors by PEFT's names, sorted."""
    tensors = {}
    for path, update in adapter.updates.items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if update.embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{path}.{a}"] = update.a.contiguous()
        tensors[f"{PREFIX}{path}.{b}"] = update.b.contiguous()
    return dict(sorted(tensors.items()))


def plain_config(adapter: Lowered, bare: Bare | None, base: str | None) -> dict[str, Any]:
    """Its adapter_config.json: nothing in it that a reader may overlook. Where `bare` is not known, its targets are
    whole paths."""
    paths = list(adapter.updates)
    return {
        **peft_keys("LORA"), "base_model_name_or_path": base, "bias": "none", "alpha_pattern": {}, "rank_pattern": {},
        "exclude_modules": None, "fan_in_fan_out": bare is not None and has_conv1d(bare.modules, paths),
        "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "lora_alpha": adapter.alpha,
        "lora_bias": False, "lora_dropout": 0.0, "modules_to_save": None, "r": adapter.rank,
        "target_modules": names_of(paths, bare.modules) if bare is not None else sorted(paths),
        "trainable_token_indices": None, "use_dora": False, "use_rslora": False,
    }  # fmt: skip
