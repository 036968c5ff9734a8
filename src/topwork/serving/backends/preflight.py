"""What vLLM takes of a configuration, found out before it is started: each adapter as it is, rewritten as the plain
LoRA that it is, or refused by name with the reason and what to do instead.

vLLM (0.32) reads PEFT's LoRA on linear layers, embeddings and heads. It refuses DoRA, whole modules, and beginnings
that change the base; IA3, soft prompts, biases and full fine-tuning it does not know. Scales and ranks by pattern older
ones ignore, so they are folded here, in fp32: B times s, all of one rank, lora_alpha = r. What it is given are folders
that were written here, of tensors that were checked (`adapters/foreign.py`); a stranger's folder it never sees.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from topwork.adapters.config import AdapterConfig, LoraConfig
from topwork.adapters.files import PREFIX, peft_keys
from topwork.adapters.foreign import ForeignAdapter
from topwork.adapters.method import Bare
from topwork.adapters.methods.lora.embedding import EmbeddingLora
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.peft_format import fitted_shapes
from topwork.adapters.targets import EMBEDDINGS
from topwork.common.errors import AdapterError
from topwork.common.files import write_folder, write_json

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
MERGE = "merge it (`topwork merge RUN OUT`) and serve the result as a base of its own, or serve it without vLLM"


@dataclass(frozen=True)
class Taken:
    """An adapter that vLLM will take.

    rank     the largest of its modules
    changes  what was done to it, for people; none where it is as it was
    """

    name: str
    content: str
    rank: int
    changes: tuple[str, ...]
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def key(self) -> str:
        """A name for exactly what vLLM is given: another content never comes under it."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        digest.update(save(self.tensors))
        return digest.hexdigest()[:24]

    def write(self, folder: Path) -> None:
        """The PEFT folder that vLLM reads, whole or not at all."""

        def fill(place: Path) -> None:
            (place / "adapter_model.safetensors").write_bytes(save(self.tensors, metadata={"format": "pt"}))
            write_json(place / "adapter_config.json", self.config)

        write_folder(folder, fill, replace=True)


def for_vllm(name: str, found: ForeignAdapter, bare: Bare, most: int = RANKS[-1]) -> Taken:
    """What vLLM is given of an adapter, on a base that may be a skeleton without weights.

    Raises AdapterError, with the adapter's name, the reason and what to do instead.
    """
    try:
        _refuse_other_methods(found.saved.config)
        config = found.saved.config
        assert isinstance(config, LoraConfig)
        parts = fitted_shapes(bare, found.saved)
        pairs = {path: _pair(path, part, bare) for path, part in parts.items()}
        rank = max(len(a) for a, _, _ in pairs.values())
        if rank > most:
            raise AdapterError(f"its rank {rank} is over {_limit(most)}")
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r} cannot be served by vLLM: {error}") from None
    changes = _changes(config, pairs, rank)
    tensors = {}
    for path, (a, b, scaling) in pairs.items():
        pair = _padded(a, b * scaling, rank) if changes else (a, b)
        plain = not isinstance(bare.modules[path], EMBEDDINGS)
        for letter, tensor in zip("AB", pair):
            key = f"lora_{letter}.weight" if plain else f"lora_embedding_{letter}"
            tensors[f"{PREFIX}{path}.{key}"] = tensor.contiguous()
    keys = _keys(sorted(pairs), rank, rank if changes else int(config.lora_alpha))
    return Taken(name, found.content, rank, changes, keys, tensors)


def allowed_rank(ranks: Sequence[int], asked: int | None = None) -> int:
    """The least --max-lora-rank that holds these ranks and what was asked for. Raises AdapterError over the largest."""
    needed = max([*ranks, asked or 1])
    for rank in RANKS:
        if rank >= needed:
            return rank
    raise AdapterError(f"rank {needed} is over {_limit(RANKS[-1])}")


def _limit(most: int) -> str:
    if most == RANKS[-1]:
        return f"the largest that vLLM takes, {most}; {MERGE}"
    return f"{most}, which this vLLM was started for; start it again with a larger vllm.max_lora_rank"


def _refuse_other_methods(config: AdapterConfig) -> None:
    if config.method in ("prefix", "prompt"):
        raise AdapterError(
            f"its method is {config.method}, learned tokens before the text, which vLLM does not know and which cannot "
            "be merged; serve it without vLLM"
        )
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"its method is {config.method}, and vLLM knows LoRA alone; {MERGE}")
    if config.use_dora:
        raise AdapterError(f"it is DoRA, which vLLM refuses; {MERGE}")
    if whole := config.modules_to_save:
        raise AdapterError(f"it holds whole modules (modules_to_save: {', '.join(whole)}), which vLLM refuses; {MERGE}")
    if (tokens := config.trainable_token_indices) is not None:
        raise AdapterError(
            f"it has {len(tokens)} tokens' own rows (trainable_token_indices), which vLLM lacks; {MERGE}"
        )
    if config.init_lora_weights in ("pissa", "olora", "loftq"):
        raise AdapterError(
            f"it began with init_lora_weights: {config.init_lora_weights} in PEFT, for a base that lacks a part; save "
            "it as an ordinary LoRA (PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)), or " + MERGE
        )


def _pair(path: str, part: Any, bare: Bare) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] in fp32 and their scale."""
    if path in (bare.head, bare.embedding) and _tied(bare):
        raise AdapterError(
            f"it adapts {path}, and this base's head is tied to its embedding, where vLLM has one module for both; "
            + MERGE
        )
    if isinstance(part, EmbeddingLora):
        return part.lora_embedding_A.detach().float(), part.lora_embedding_B.detach().float(), part.scaling
    if type(part) is Lora:
        return part.lora_A.detach().float(), part.lora_B.detach().float(), part.scaling
    raise AdapterError(f"{path} holds a {type(part).__name__}, which vLLM does not know; {MERGE}")


def _tied(bare: Bare) -> bool:
    head, embedding = (bare.modules[path] if path else None for path in (bare.head, bare.embedding))
    return head is not None and embedding is not None and head.weight is embedding.weight


def _changes(config: LoraConfig, pairs: Mapping[str, tuple[Tensor, Tensor, float]], rank: int) -> tuple[str, ...]:
    """What has to be done so that one rank and one whole lora_alpha say all."""
    found = []
    if config.use_rslora:
        found.append("its rsLoRA scale was folded into B")
    elif any(scaling != config.lora_alpha / rank for _, _, scaling in pairs.values()):
        found.append("its scales by module were folded into B")
    elif config.lora_alpha != int(config.lora_alpha):
        found.append("its lora_alpha, no whole number, was folded into B")
    if any(len(a) < rank for a, _, _ in pairs.values()):
        found.append(f"modules of lower ranks were padded to {rank}")
    return tuple(found)


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product of `rank`."""
    more = rank - len(a)
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), more)], 1)


def _keys(paths: Sequence[str], rank: int, alpha: int) -> dict[str, Any]:
    return {
        **peft_keys("LORA"), "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": 0.0, "modules_to_save": None, "r": rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}), "use_dora": False, "use_rslora": False,
    }  # fmt: skip
