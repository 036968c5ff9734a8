"""What a folder is that is no PEFT folder, or not whole: told by what is in it, with the way to one that is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topwork.common.errors import quoted

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "topwork.json"
"""A PEFT folder's files, and the one that stands beside them in Topwork's own."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".lora")
POINTER = b"version https://git-lfs"
"""How a Git LFS pointer begins, a few lines in the place of a large file."""
_SHARDS = "adapter_model-*-of-*.safetensors"
_CONVERT = "`topwork convert` makes a PEFT folder of it"


def other_make(folder: Path) -> str:
    """What a folder without a readable adapter is, or that it has none of the files that one has. No path is told."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickled = [name for name in names if name.endswith(PICKLED)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if "adapters.safetensors" in names:
        return f"it is a folder of mlx-lm's (adapters.safetensors); {_CONVERT}"
    if ggufs:
        return f"it holds {quoted(ggufs[0])}, an adapter or a model of llama.cpp's; {_CONVERT}"
    if "pytorch_lora_weights.safetensors" in names:
        return "it is an adapter of a diffusion model (pytorch_lora_weights.safetensors), which writes no text"
    if "config.json" in names and CONFIG not in names:
        return "it is a model's own folder (config.json), not an adapter's; give it as the base (--model)"
    if any(folder.glob(_SHARDS)):
        return f"its tensors are in several files ({_SHARDS}); put them into one {TENSORS} (PEFT: save_pretrained)"
    if pickled:
        return (
            f"it holds its tensors in {quoted(pickled[0])}, and reading a pickle runs code; save it again with PEFT's "
            "safe_serialization, or where you trust it write them as safetensors yourself: "
            f"safetensors.torch.save_file(torch.load(…, weights_only=True), '{TENSORS}')"
        )
    if inner:
        return f"it holds {', '.join(map(quoted, inner[:5]))} in folders of their own; give one of them"
    missing = [name for name in (CONFIG, TENSORS) if name not in names] or ["readable files"]
    return f"it has no {' and no '.join(missing)}, which a PEFT folder has"


def other_config(raw: Mapping[str, Any]) -> str | None:
    """Whose adapter_config.json it is, where it is not PEFT's."""
    if "peft_type" not in raw and raw.keys() & {"lora_parameters", "fine_tune_type"}:
        return f"is an adapter of mlx-lm's (adapter_config.json has lora_parameters); {_CONVERT}"
    return None


def pointer(file: Path) -> str | None:
    """That a file is a Git LFS pointer, and how to have it; None where it is not."""
    with file.open("rb") as opened:
        return told_pointer(file.name, opened.read(len(POINTER)))


def told_pointer(name: str, beginning: bytes) -> str | None:
    """The same of a file's first bytes, eight of which will do."""
    if len(beginning) < 8 or not POINTER.startswith(beginning[: len(POINTER)]):
        return None
    return (
        f"{name} is a Git LFS pointer, a note in the place of the file: fetch that (git lfs pull, or download it anew)"
    )
