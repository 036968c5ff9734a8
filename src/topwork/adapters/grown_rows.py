"""Rows of a vocabulary that grew, where PEFT wrote embedding and head whole beside an adapter that trains neither.

`save_pretrained` does so once `vocab_size` is another than the base's. What the copies say beyond the base is their
last rows; these become rows of the adapter, as `trainable_token_indices` are: the base is nobody's own.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from topwork.adapters.config import LoraConfig
from topwork.adapters.method import Bare
from topwork.common.errors import AdapterError

Stored = Callable[[str, str], Tensor | None]
"""As `on_base.Stored`."""
ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's name of trained rows, behind a module's path."""
_COPIES = ("base_layer.weight", "weight")


def with_grown_rows(
    config: LoraConfig, tensors: Mapping[str, Tensor], bare: Bare, stored: Stored, called: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Options and tensors, by our names, with the last rows of such copies among the rows that are trained, and without
    the copies. One that differs from the base in other rows stays, for whoever knows what it is."""
    left, named = _tied_once(config, tensors, bare, called), rows_by_path(config, bare)
    found = dict(named)
    for path in _ends(bare):
        key = next((f"{path}.{part}" for part in _COPIES if f"{path}.{part}" in left), None)
        if key is None or _is_adapted(path, config, left):
            continue
        ids = _last_rows(stored(path, "weight"), left[key], named.get(path, []))
        if ids:
            before = [left[f"{path}.{ROWS}"]] if path in named else []
            left[f"{path}.{ROWS}"] = torch.cat([*before, left[key][ids].to(before[0] if before else torch.float32)])
            found[path] = [*named.get(path, []), *ids]
            del left[key]
    return (config, left) if found == named else (_with_rows(config, found, bare), left)


def rows_by_path(config: LoraConfig, bare: Bare) -> dict[str, list[int]]:
    """Ids of the tokens whose rows are trained, by the path of the embedding and of a head of its own."""
    named = config.trainable_token_indices
    if not isinstance(named, Mapping):
        return {} if not named or bare.embedding is None else {bare.embedding: list(named)}
    return {
        path: list(ids) for path in _ends(bare) for name, ids in named.items()
        if path == name or path.endswith("." + name)
    }  # fmt: skip


def _ends(bare: Bare) -> list[str]:
    paths = (bare.embedding, None if bare.seen.tied else bare.head)
    return [path for path in paths if path is not None]


def _tied_once(config: LoraConfig, tensors: Mapping[str, Tensor], bare: Bare, called: str) -> dict[str, Tensor]:
    """Without what a head says once more of rows, or of the weight, that it shares with the embedding."""
    left = dict(tensors)
    if (
        not bare.seen.tied
        or _is_adapted(str(bare.embedding), config, left)
        or _is_adapted(str(bare.head), config, left)
    ):
        return left
    for part in (ROWS, *_COPIES):
        one, other = (left.get(f"{path}.{part}") for path in (bare.embedding, bare.head))
        if one is None or other is None or (part != ROWS and one.shape != other.shape):
            continue
        if torch.equal(one, other):
            del left[f"{bare.head}.{part}"]
        elif part == ROWS:
            raise AdapterError(
                f"{called} holds other rows of tokens for {bare.head} than for {bare.embedding}, and in this base they "
                "are one weight: it was trained on a base that keeps them apart (tie_word_embeddings: false)"
            )
    return left


def _is_adapted(path: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the module is trained whole, or has LoRA over what stands there."""
    whole = config.saved_modules and path.endswith(tuple(config.saved_modules))
    return bool(whole) or any(key.startswith(f"{path}.lora_") for key in tensors)


def _last_rows(own: Tensor | None, copy: Tensor, trained: list[int]) -> list[int]:
    """The rows, up to the last, that are others than the base's; none where others before them are, too."""
    if own is None or own.shape != copy.shape or own.dim() != 2:
        return []
    differ = (own != copy.to(own.dtype)).any(1)
    differ[[token for token in trained if token < len(differ)]] = False
    ids = differ.nonzero().flatten().tolist()
    first = len(differ) - 1
    while first > 0 and (bool(differ[first]) or first in trained):
        first -= 1
    return ids if ids and first < ids[0] else []


def _with_rows(config: LoraConfig, found: Mapping[str, list[int]], bare: Bare) -> LoraConfig:
    alone = list(found) == [bare.embedding]
    named = found[str(bare.embedding)] if alone else {path.rpartition(".")[2]: ids for path, ids in found.items()}
    return config.model_copy(update={"trainable_token_indices": named})
