"""What other programs compute of a PEFT folder, stated anew from their sources, mistakes included."""

import json
import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

PREFIX = "base_model.model."


def scaled_by_config(folder: Path) -> dict[str, Tensor]:
    """alpha / r of the config for every module, whatever its own rank: SGLang 0.5.23 (`lora/lora.py`: self.scaling),
    and Ollama and llama.cpp's converter, which know one lora_alpha (`convert_lora_to_gguf.py`) and nothing of
    use_rslora, alpha_pattern or rank_pattern. [out, in] by path; an embedding's is [V, d]."""
    config = _config(folder)
    return {path: config["lora_alpha"] / config["r"] * update for path, update in _products(folder).items()}


def by_own_rank(folder: Path) -> dict[str, Tensor]:
    """alpha / r with each module's own rank: llama.cpp at run time (`llama-adapter.h`: get_scale)."""
    ranks = {
        key: tensor.shape[0] for key, tensor in load_file(folder / "adapter_model.safetensors").items() if _is_a(key)
    }
    own = {_path(key): rank for key, rank in ranks.items()}
    return {path: _config(folder)["lora_alpha"] / own[path] * update for path, update in _products(folder).items()}


def by_lorax(folder: Path, layers: int) -> dict[str, Tensor]:
    """LoRAX (`adapters/lora.py`: LoraWeights.load): a module's name that lacks one of the layers is dropped whole;
    where ranks are padded to 8 at least, the config's r becomes the padded one after the first name (#700)."""
    config, updates = _config(folder), _products(folder)
    names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".{}.", path) for path in updates))
    found, r = {}, config["r"]
    for name in names:
        paths = [name.format(layer) for layer in range(layers)]
        if not all(path in updates for path in paths):
            continue
        scale = config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)
        found |= {path: scale * updates[path] for path in paths}
        r = max(8, r)
    return found


def _config(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "adapter_config.json").read_text())
    return found


def _products(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if _is_a(key):
            b = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            found[_path(key)] = (b @ a).t() if "embedding" in key else b @ a
    return found


def _is_a(key: str) -> bool:
    return "lora_A" in key or "lora_embedding_A" in key


def _path(key: str) -> str:
    return key.removeprefix(PREFIX).partition(".lora_")[0]
