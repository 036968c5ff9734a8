"""For merge_memory.py: a base with random weights and an adapter of it, and their merge with what it took.

python -m peers.merge_base make FOLDER SHAPE RANK
python -m peers.merge_base merge FOLDER
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from random_base import write_weights
from safetensors.torch import save_file
from transformers import AutoTokenizer

from topwork.common.devices import peak_memory_bytes
from topwork.models.config import ModelConfig
from topwork.models.lazy import open_lazily
from topwork.models.skeleton import skeleton
from topwork.models.source import Source, find_source
from topwork.models.weights import quantizable, weight_shape
from topwork.plan.built import config_of


def make(folder: Path, shape: str, rank: int) -> dict[str, Any]:
    """Write FOLDER/base and FOLDER/adapter; their sizes."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = config_of(shape)
    small = find_source(ModelConfig(model_name_or_path="smollm2-135m"), lambda _: None)
    AutoTokenizer.from_pretrained(small.folder).save_pretrained(base)
    written = write_weights(base, config, 0)
    layers = {path: weight_shape(layer) for path, layer in quantizable(skeleton(config)).items()}
    torch.manual_seed(0)
    tensors = {}
    for path, (outputs, inputs) in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, inputs) / inputs**0.5
        tensors[f"base_model.model.{path}.lora_B.weight"] = 0.01 * torch.randn(outputs, rank)
    save_file(tensors, adapter / "adapter_model.safetensors")
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}), "base_model_name_or_path": str(base),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    model = open_lazily(Source(shape, str(base), None))
    return {
        "base_bytes": written,
        "shard_bytes": max(file.stat().st_size for file in base.glob("*.safetensors")),
        "largest_bytes": max(tensor.nbytes for tensor in model.tensors.values()),
        "merged_bytes": max(2 * outputs * inputs for outputs, inputs in layers.values()),
        "adapter_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def merge(folder: Path) -> dict[str, Any]:
    """Merge into FOLDER/out, and say what it took."""
    from topwork.run.merge import merge as fold

    torch.ones(512, 512) @ torch.ones(512, 512)  # what the libraries need is not counted
    start, clock = _status("VmRSS"), time.perf_counter()
    found = fold(folder / "adapter", folder / "out", check=0, log=lambda _: None)
    seconds = time.perf_counter() - clock
    return {
        "start_bytes": start,
        "peak_bytes": peak_memory_bytes(torch.device("cpu")) - start,
        "seconds": round(seconds, 1),
        "share": found["rounding"]["share"],
    }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    place = Path(sys.argv[2])
    print(json.dumps(make(place, sys.argv[3], int(sys.argv[4])) if sys.argv[1] == "make" else merge(place)))
