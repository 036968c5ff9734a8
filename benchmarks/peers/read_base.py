"""Writing a model in small shards, and the peak of reading it. Prints one JSON line.

python -m peers.read_base split MODEL FOLDER SHARD_MIB      (in benchmarks/)
python -m peers.read_base read FOLDER QUANTIZATION_JSON
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from topwork.common.devices import peak_memory_bytes
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import weight_bytes

CPU = torch.device("cpu")


def split(model: str, folder: str, shard_mib: str) -> dict[str, int]:
    base = load_base(ModelConfig(model_name_or_path=model, device="cpu"), quiet)
    base.module.save_pretrained(folder, max_shard_size=int(shard_mib) * 2**20)
    base.tokenizer.save_pretrained(folder)
    sizes = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    return {"count": len(sizes), "largest_bytes": max(sizes)}


def read(folder: str, options: str) -> dict[str, float]:
    quantization = QuantizationConfig.model_validate_json(options)
    warm_up(folder, quantization)
    reset_peak()
    before, start = peak_memory_bytes(CPU), time.perf_counter()
    base = load_base(ModelConfig(model_name_or_path=folder, device="cpu"), quiet, quantization)
    seconds = time.perf_counter() - start
    return {
        "weights_bytes": weight_bytes(base.module),
        "peak_bytes": peak_memory_bytes(CPU) - before,
        "seconds": seconds,
    }


def warm_up(tokenizer: str, quantization: QuantizationConfig) -> None:
    """Everything that reading imports and builds, with a model of no size; the tokenizer is the real one."""
    tiny = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, dtype="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        LlamaForCausalLM(tiny).to(torch.bfloat16).save_pretrained(work)
        for path in Path(tokenizer).glob("*token*"):
            (Path(work) / path.name).write_bytes(path.read_bytes())
        load_base(ModelConfig(model_name_or_path=work, device="cpu"), quiet, quantization)


def reset_peak() -> None:
    """The kernel's own mark of the largest resident size, where it lets itself be reset."""
    Path("/proc/self/clear_refs").write_text("5")


def quiet(_: str) -> None:
    """Nobody reads along."""


if __name__ == "__main__":
    print(json.dumps({"split": split, "read": read}[sys.argv[1]](*sys.argv[2:])))
