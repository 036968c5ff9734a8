"""A combined adapter as a PEFT folder of the plainest kind: LoRA of one rank, lora_alpha = r, so that the scale is one
and no reader can take it otherwise; no patterns, no rsLoRA, exact target modules.

Beside it stand `topwork.json` (the base's id and fingerprint) and `combine.json`: method, settings, sources with the
hashes of their content, and what the rank left out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from topwork.adapters.config import LoraConfig
from topwork.adapters.files import PREFIX, Grafted, names_of
from topwork.adapters.method import Bare
from topwork.adapters.methods.lora.embedding import EmbeddingLora
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.methods.lora.method import LORA
from topwork.adapters.module import AdapterModule
from topwork.adapters.peft_format import BaseId, SavedAdapter, saved_adapter
from topwork.common.errors import RequestError
from topwork.common.files import write_folder, write_json, write_text
from topwork.merging.combine.driver import Combined
from topwork.merging.deltas import LowRankDelta
from topwork.quantization.kinds import EMBEDDINGS, features

RECORD, TEMPLATE = "combine.json", "chat_template.jinja"


@dataclass(frozen=True)
class Folder:
    """What a PEFT folder holds: adapter_config.json, the tensors, topwork.json."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    own: dict[str, Any]

    def saved(self, called: str) -> SavedAdapter:
        """As it would be read from disk."""
        return saved_adapter(self.config, self.tensors, self.own, called)


def folder_of(combined: Combined, bare: Bare, base: BaseId, dtype: torch.dtype) -> Folder:
    """The folder's content, every pair padded with zeros to one rank. Raises RequestError where `dtype` cannot hold a
    value."""
    state: dict[str, Tensor] = {}
    for path, delta in combined.deltas.items():
        b, a = _padded(delta.b, combined.rank, 1), _padded(delta.a, combined.rank, 0)
        if isinstance(bare.modules[path], EMBEDDINGS):
            state |= {f"{path}.lora_embedding_A": b.t(), f"{path}.lora_embedding_B": a.t()}
        else:
            state |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    state |= {f"{path}.{name}": values for (path, name), values in combined.whole.items()}
    if combined.tokens is not None:
        state[f"{combined.tokens[0]}.token_adapter.trainable_tokens_delta"] = combined.tokens[2]
    state = {key: _cast(key, state[key], dtype) for key in sorted(state)}
    config = _config(combined, bare)
    parts = {path: _part(bare.modules[path]) for path in combined.deltas}
    keys = LORA.files.keys(Grafted(config, parts, state, bare.modules, bare.config, bare.seen.text))
    return Folder(
        {**keys, "base_model_name_or_path": base.name},
        LORA.files.to_file(state),
        {"base_model": base.name, "base_fingerprint": base.fingerprint},
    )


def rounding(combined: Combined, folder: Folder) -> float:
    """‖ΔW as it is written - ΔW‖ / ‖ΔW‖ over all modules in factors: what a 16-bit type takes."""
    lost, whole = 0.0, 0.0
    for path, delta in combined.deltas.items():
        keys = [f"{PREFIX}{path}.lora_{letter}.weight" for letter in "BA"]
        if keys[0] in folder.tensors:
            b, a = (folder.tensors[key].double() for key in keys)
        else:
            a, b = (folder.tensors[f"{PREFIX}{path}.lora_embedding_{letter}"].double().t() for letter in "BA")
        apart = LowRankDelta(torch.cat([b, -delta.b], 1), torch.cat([a, delta.a]))
        lost, whole = lost + apart.norm() ** 2, whole + delta.norm() ** 2
    return math.sqrt(lost / whole) if whole else 0.0


def write_combined(
    out: Path, folder: Folder, record: Mapping[str, Any], template: str | None = None, replace: bool = False,
    more: Callable[[Path], None] = lambda _: None,
) -> None:  # fmt: skip
    """Put it at `out`, whole or not at all; `more` writes what else is to stand there. Raises RunError where `out`
    holds something (unless `replace`) or the disk is full."""

    def fill(place: Path) -> None:
        (place / "adapter_model.safetensors").write_bytes(save(folder.tensors, metadata={"format": "pt"}))
        write_json(place / "adapter_config.json", folder.config)
        write_json(place / "topwork.json", folder.own)
        write_json(place / RECORD, dict(record))
        if template is not None:
            write_text(place / TEMPLATE, template)
        more(place)

    write_folder(out, fill, replace)


def _config(combined: Combined, bare: Bare) -> LoraConfig:
    return LoraConfig(
        r=combined.rank,
        lora_alpha=float(combined.rank),
        target_modules=names_of(combined.deltas, bare.modules),
        modules_to_save=sorted({path for path, _ in combined.whole}) or None,
        trainable_token_indices=None if combined.tokens is None else list(combined.tokens[1]),
    )


def _part(module: nn.Module) -> AdapterModule:
    """What the files' keys look at: which kind a module has."""
    inputs, outputs = features(module)
    with torch.device("meta"):
        if isinstance(module, EMBEDDINGS):
            return EmbeddingLora(inputs, outputs, 1, 1.0)
        return Lora(inputs, outputs, 1, 1.0)


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _cast(key: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    cast = values.detach().to(dtype).contiguous()
    if not bool(torch.isfinite(cast).all()):
        told = str(dtype).removeprefix("torch.")
        raise RequestError(f"{key} has values that {told} cannot hold; leave --dtype out, which writes float32")
    return cast
