"""LoRA adapters as GGUF files, for llama.cpp and Ollama.

llama.cpp adds alpha / r · B A to a weight, r being B's columns and alpha one number for the whole file. The plain form
of a LoRA (`lowered.py`) has its scale in B and alpha = r, so nothing of rsLoRA, alpha_pattern or rank_pattern is left
for it to overlook. Names, and the rows of q and k, are the base file's (`families.py`). Source: llama.cpp's
`llama-adapter.cpp`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topwork.adapters.lowrank import LowRankUpdate
from topwork.common.errors import AdapterError, RequestError, did_you_mean
from topwork.export.gguf.families import family_of, gguf_name, permuted, rotary_heads
from topwork.export.gguf.package import gguf_package
from topwork.export.lowered import Lowered

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
EMBEDDING = "token_embd.weight"
HEAD = "lm_head"
Log = Callable[[str], None]


def write_gguf_adapter(
    lowered: Lowered, config: Mapping[str, Any], out: Path, type: str = "f32", name: str | None = None
) -> None:
    """Write an adapter as one GGUF file.

    lowered  its plain form
    config   the base's config.json: the architecture, the number of layers and of heads
    type     of A and B in the file: f32, or f16 and bf16, which halve it and round
    name     what the file calls itself

    Raises ModelError for a family that llama.cpp has under no name here, AdapterError for a module that a GGUF base has
    no weight for (a tied head), and for values that do not fit `type`; RequestError for an unknown type.
    """
    if type not in TYPES:
        raise RequestError(f"--type {type}: an adapter is written as {', '.join(TYPES)}{did_you_mean(type, TYPES)}")
    tensors = gguf_tensors(lowered, config)
    for called, tensor in tensors.items():
        if not torch.isfinite(tensor.to(TYPES[type])).all():
            wider = "look whether its training broke" if type == "f32" else "export with --type f32"
            raise AdapterError(f"{called} holds values that {type} cannot; {wider}")
    gguf = gguf_package()
    writer = gguf.GGUFWriter(out, family_of(config).architecture)
    writer.add_type("adapter")
    if name is not None:
        writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(lowered.alpha))
    for called, tensor in tensors.items():
        _add(gguf, writer, called, tensor.to(TYPES[type]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(lowered: Lowered, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A and B by their names in the file, as numpy and torch see them: `.lora_a` [r, in] (of the embedding [V, r]),
    `.lora_b` [out, r]."""
    architecture, blocks = family_of(config).architecture, int(config["num_hidden_layers"])
    tensors = {}
    for path, update in lowered.updates.items():
        if path == HEAD and config.get("tie_word_embeddings"):
            raise AdapterError(
                f"the adapter has an update at {path}, and this base's head is its embedding: a GGUF file of it has no "
                "output.weight that the update could go to; merge it instead (topwork export … --format gguf)"
            )
        base = gguf_name(architecture, blocks, f"{path}.weight")
        tensors[f"{base}.lora_a"], tensors[f"{base}.lora_b"] = _factors(path, update, base, config)
    return tensors


def _factors(
    path: str, update: LowRankUpdate, base: str, config: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    if update.embedding:
        if base != EMBEDDING:
            raise AdapterError(f"{path} is an embedding, and llama.cpp updates that of the tokens only")
        return update.a.T.contiguous(), update.b
    heads = rotary_heads(config, f"{path}.weight")
    return update.a, update.b if heads is None else permuted(update.b, heads)


def _add(gguf: Any, writer: Any, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.bfloat16:  # numpy has none
        data, kind = tensor.contiguous().view(torch.int16).numpy().view(np.uint8), gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, data, raw_dtype=kind)
        return
    writer.add_tensor(name, tensor.contiguous().numpy())
