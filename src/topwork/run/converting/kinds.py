"""What a file or a folder of somebody else's is: told by what stands in it, not by what it is called."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from topwork.adapters.other_makes import CONFIG
from topwork.common.errors import RequestError

Kind = Literal["gguf model", "gguf adapter", "mlx adapter", "peft adapter"]
_LONGEST_HEADER = 1 << 26
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""Of a zip file as torch.save writes it, and of bare pickles."""
LOOKED_FOR = (
    "a GGUF file (a model or a LoRA adapter), a folder of mlx-lm's (adapters.safetensors with tensors …lora_a and "
    "…lora_b), or a PEFT folder (adapter_config.json and tensors …lora_A… and …lora_B…)"
)


@dataclass(frozen=True)
class Found:
    """kind    what it is
    file    the file that holds its tensors
    config  its adapter_config.json's values; empty where it has none
    """

    kind: Kind
    file: Path
    config: dict[str, Any]


def recognised(place: Path, log: Any = lambda _: None) -> Found:
    """What there is at a place. Raises RequestError, saying what was looked for, where it is nothing of that."""
    if not place.exists():
        raise RequestError(f"there is nothing at {place}; give {LOOKED_FOR}")
    if place.is_file():
        return _of_file(place)
    files = sorted(path for path in place.iterdir() if path.is_file())
    readable = [path for path in files if _is_gguf(path) or _tensor_names(path) is not None]
    known = [found for found in map(_known, readable) if found is not None]
    if len(known) == 1:
        return known[0]
    if len(known) > 1:
        raise RequestError(f"{place} holds {', '.join(each.file.name for each in known)}; give one of them")
    return _inside(place, files, log)


def _of_file(path: Path) -> Found:
    found = _known(path) if _is_gguf(path) or _tensor_names(path) is not None else None
    if found is None:
        _refuse_pickle(path)
        raise RequestError(f"{path} is nothing that can be converted; give {LOOKED_FOR}")
    return found


def _known(path: Path) -> Found | None:
    if _is_gguf(path):
        return Found("gguf adapter" if _holds_adapter(path) else "gguf model", path, {})
    names, config = _tensor_names(path) or [], _config(path.parent)
    if any(name.endswith((".lora_a", ".lora_b")) for name in names):
        return Found("mlx adapter", path, config)
    if config.get("peft_type") is not None or any(".lora_A" in name or ".ia3_l" in name for name in names):
        return Found("peft adapter", path, config)
    if "lora_parameters" in config:
        return Found("mlx adapter", path, config)
    return None


def _inside(place: Path, files: list[Path], log: Any) -> Found:
    """PEFT puts an adapter that is called other than `default` into a folder of its name, a run one into `adapter`."""
    inner = sorted(path.parent for path in place.glob(f"*/{CONFIG}"))
    if len(inner) == 1:
        log(f"{place} holds the adapter {inner[0].name!r}, in a folder of its name")
        return recognised(inner[0])
    if inner:
        raise RequestError(f"{place} holds {len(inner)} adapters; give one of them: {', '.join(map(str, inner))}")
    for path in files:
        _refuse_pickle(path)
    if (place / "config.json").is_file():
        raise RequestError(
            f"{place} is a Hugging Face model's folder, which is read as it is; nothing is to be converted"
        )
    names = ", ".join(path.name for path in files[:5]) or "nothing"
    raise RequestError(f"{place} is nothing that can be converted (there is {names}); give {LOOKED_FOR}")


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(PICKLE_STARTS):
        raise RequestError(
            f"{path} is pickled, and reading a pickle runs code: it is never read here. Where you trust it, write its "
            "tensors as safetensors first: safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'adapter_model.safetensors'), and convert that"
        )


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _holds_adapter(path: Path) -> bool:
    from topwork.export.gguf.adapter_file import field, open_gguf

    return bool(field(open_gguf(path), "general.type", "model") == "adapter")


def _tensor_names(path: Path) -> list[str] | None:
    """None for what is no safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, path.stat().st_size - 8):
            return None
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return None
    return [name for name in header if name != "__metadata__"] if isinstance(header, dict) else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
