"""A model's weights as llama.cpp wants them: planned by their shapes, then fetched, turned and packed one at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from topwork.common.errors import ModelError
from topwork.export.gguf.families import gguf_name, permuted, rotary_heads
from topwork.export.gguf.hparams import Hparams
from topwork.export.gguf.types import Stored, packed, stored_as
from topwork.models.lazy import LazyModel

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TABLES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
"""Ends of keys of old checkpoints that hold no weights: tables that are computed."""


@dataclass(frozen=True)
class Planned:
    """A weight of the file: its name there, the checkpoint's key, its shape, its type, and how to get it."""

    name: str
    key: str
    shape: tuple[int, ...]
    stored: Stored
    fetch: Callable[[], Tensor]

    def data(self) -> np.ndarray:
        """Its bytes. Raises ModelError as `packed` does."""
        return packed(self.fetch(), self.stored.type, self.key)


def planned(model: LazyModel, hparams: Hparams, wanted: str) -> list[Planned]:
    """Every weight of the file. Nothing is read but where a head may be the embedding over again.

    Raises ModelError for a weight that has no place, and for a model without an embedding.
    """
    if EMBEDDING not in model.tensors:
        raise ModelError(f"{model.name} has no {EMBEDDING}; is it a causal language model's whole checkpoint?")
    tied = HEAD not in model.tensors or _is_embedding_again(model, hparams)
    found = list(_weights(model, hparams, wanted, tied))
    for name, values in hparams.factors.items():
        found.append(Planned(name, name, tuple(values.shape), Stored("f32"), partial(_given, values)))
    return found


def _given(values: Tensor) -> Tensor:
    return values


def _weights(model: LazyModel, hparams: Hparams, wanted: str, tied: bool) -> Iterator[Planned]:
    head = EMBEDDING if tied else HEAD
    for key, lazy in model.tensors.items():
        if key.endswith(_TABLES) or (tied and key == HEAD):
            continue
        name = gguf_name(hparams.family.architecture, hparams.blocks, key)
        if key.endswith(".bias") and key.split(".")[-2] not in hparams.family.biases:
            raise ModelError(
                f"this model has the bias {key}, which llama.cpp's {hparams.family.architecture!r} does not read; it "
                "is not written as GGUF. Export it as hf or vllm instead"
            )
        stored = stored_as(name, lazy.shape, wanted, key == head)
        yield Planned(name, key, lazy.shape, stored, _turned(model, hparams, key, name))


def _turned(model: LazyModel, hparams: Hparams, key: str, name: str) -> Callable[[], Tensor]:
    # what a config.json leaves out is in the keys
    config = {**model.config, "num_key_value_heads": hparams.keys["attention.head_count_kv"]}
    fetch, heads = model.tensors[key].fetch, rotary_heads(config, key)
    if heads is not None:
        return lambda: permuted(fetch(), heads)
    if hparams.family.norm_offset and "norm" in name:
        return lambda: fetch().float() + hparams.family.norm_offset
    return fetch


def _is_embedding_again(model: LazyModel, hparams: Hparams) -> bool:
    """Whether the head is the embedding's copy, as tied models may be saved; the one place where two are in memory."""
    if not model.config.get("tie_word_embeddings") and hparams.family.head == "any":
        return False
    same = torch.equal(model.tensors[HEAD].fetch(), model.tensors[EMBEDDING].fetch())
    if not same and hparams.family.head == "tied":
        raise ModelError(
            f"{model.name} has a head of its own, and llama.cpp's {hparams.family.architecture!r} takes the embedding "
            "for it: the file would be another model. Export it as hf or vllm instead"
        )
    return same
