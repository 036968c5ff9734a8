"""Adapters on disk: PEFT folders, `adapter_config.json` beside `adapter_model.safetensors`.

Keys, lists and tensors are sorted, so that one adapter always gives the same bytes. The base's id and fingerprint
stand in `topwork.json` beside them, which PEFT and vLLM do not read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, bare_modules
from topwork.adapters.lora import Lora
from topwork.adapters.targets import matching
from topwork.common.errors import AdapterError
from topwork.common.files import write_bytes, write_json

PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"
"""The release whose files these equal."""

SHARED_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "init_lora_weights",
)  # fmt: skip
UNSUPPORTED = (
    "use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class BaseId:
    """Which base an adapter was trained on; the fingerprint is None for adapters that others wrote."""

    name: str | None
    fingerprint: str | None = None


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from disk, not yet in a model."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    base: BaseId
    path: Path


def write_adapter(folder: Path, adapters: Adapters, name: str, base: BaseId) -> None:
    """Write adapter `name` as a PEFT folder; tensors in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + key: tensor.cpu().contiguous() for key, tensor in adapters.stored(name).items()}
    write_bytes(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", _peft_config(adapters, name, base))
    write_json(folder / "topwork.json", {"base_model": base.name, "base_fingerprint": base.fingerprint})


def read_adapter(folder: Path) -> SavedAdapter:
    """Read a PEFT folder, whoever wrote it. Raises AdapterError naming what is missing or not supported."""
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}; give a folder with adapter_config.json, or a run's folder")
    raw = _json(folder / "adapter_config.json")
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{folder} has no readable adapter_model.safetensors ({error}); .bin files are not read, because reading "
            "one runs code: save it again with PEFT's safe_serialization"
        ) from error
    own = _json(folder / "topwork.json") if (folder / "topwork.json").exists() else {}
    base = BaseId(raw.get("base_model_name_or_path"), own.get("base_fingerprint"))
    stripped = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    return SavedAdapter(_config(raw, folder), stripped, base, folder)


def load_adapter(adapters: Adapters, name: str, saved: SavedAdapter, base: BaseId, force: bool = False) -> str | None:
    """Graft an adapter read from disk under `name`. Returns a warning, or None.

    Another base than the one it was trained on is refused with both names, unless `force`.
    """
    warning = check_base(saved, base, force)
    adapters.add(name, saved.config)
    try:
        adapters.load(name, _without_base_copies(saved.tensors, adapters, name))
    except AdapterError:
        adapters.remove(name)
        raise
    return warning


def _without_base_copies(tensors: Mapping[str, Tensor], adapters: Adapters, name: str) -> dict[str, Tensor]:
    """PEFT writes the base's own head or embedding beside an adapter of them; an equal copy says nothing new."""
    own, modules = adapters.parameters(name), bare_modules(adapters.model)

    def repeats_base(key: str, tensor: Tensor) -> bool:
        path, _, kind = key.replace(".base_layer.", ".").rpartition(".")
        weight = getattr(modules.get(path), kind, None)
        if key in own or not isinstance(weight, Tensor) or weight.shape != tensor.shape:
            return False
        return bool((weight.cpu() == tensor.to(weight.dtype)).all())

    return {key: tensor for key, tensor in tensors.items() if not repeats_base(key, tensor)}


def check_base(saved: SavedAdapter, base: BaseId, force: bool = False) -> str | None:
    """AdapterError where the adapter is known to be another base's; a warning where nobody can tell."""
    theirs, ours = saved.base, base
    if theirs.fingerprint and ours.fingerprint:
        if theirs.fingerprint == ours.fingerprint:
            return None
        why = "their weights differ"
    elif theirs.name == ours.name:
        return None
    elif _is_hub_id(theirs.name) and _is_hub_id(ours.name):
        why = "their names differ"
    else:
        return f"{saved.path} names the base {theirs.name!r}; whether that is {ours.name!r} cannot be told from it"
    told = f"{saved.path} was trained on {theirs.name!r}, and this base is {ours.name!r} ({why})"
    if force:
        return told + "; loaded all the same, as you asked"
    raise AdapterError(f"{told}. Load it onto its own base, or pass force=True (--force) if you know them to be alike.")


def _is_hub_id(name: str | None) -> bool:
    return bool(name) and name.count("/") == 1 and not name.startswith((".", "/", "~"))  # type: ignore[union-attr]


def _peft_config(adapters: Adapters, name: str, base: BaseId) -> dict[str, Any]:
    config = adapters.configs[name]
    modules = bare_modules(adapters.model)
    targets = [path for path, part in adapters.parts(name).items() if isinstance(part, Lora)]
    written = _written_targets(config, targets, modules)
    by_path = written == sorted(targets)  # the list is the choice; PEFT would choose among it once more
    return {
        **{field: getattr(config, field) for field in SHARED_FIELDS},
        "target_modules": written,
        "layers_to_transform": None if by_path else config.layers_to_transform,
        "layers_pattern": None if by_path else config.layers_pattern,
        "modules_to_save": sorted(config.modules_to_save) if config.modules_to_save else None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(modules[path], Conv1D) for path in targets),
        "inference_mode": True,
        "lora_bias": False,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
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


def _config(raw: Mapping[str, Any], folder: Path) -> AdapterConfig:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder} holds a {kind} adapter; LORA can be read")
    present = [key for key in UNSUPPORTED if raw.get(key)]
    if raw.get("bias", "none") != "none":
        present.append(f"bias={raw['bias']}")
    if present:
        raise AdapterError(f"{folder} uses {', '.join(present)}, which cannot be read yet; plain LoRA and rsLoRA can")
    fields = {key: raw[key] for key in SHARED_FIELDS if key in raw and raw[key] is not None}
    if fields.get("init_lora_weights") not in (True, "gaussian"):
        fields["init_lora_weights"] = True  # the weights are in the file; how they began does not matter
    try:
        return AdapterConfig(**fields)
    except ValidationError as error:
        raise AdapterError(f"{folder / 'adapter_config.json'} does not describe a LoRA adapter: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error}); a PEFT folder has one") from error
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds no JSON object")
    return value
