"""An adapter's file as one base takes it: names by the base's paths, without copies of the base's own tensors, and with
options that name what the file alone tells of: a head that PEFT saved with the embedding it is tied to
(`ensure_weight_tying`), modules that it wrote because they had grown.

What no base takes is refused as what it is: empty shards, NaN, a classifier's head, a vocabulary of another size.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.adapters.config import PEFT_TARGETS, AdapterConfig, LoraConfig, Saving
from topwork.adapters.method import Bare
from topwork.adapters.names import on_modules, split_name
from topwork.adapters.other_weights import as_whole, can_be_whole
from topwork.adapters.ranks import refuse_other_ranks
from topwork.adapters.settling import modules_of, settled
from topwork.adapters.targets import ALL_LINEAR, matching
from topwork.common.errors import AdapterError
from topwork.quantization.kinds import embedding_shape

Stored = Callable[[str, str], Tensor | None]
"""A base's own tensor by a module's path and its name there; None where there is none."""
OTHER_HEADS = {
    "score": "a classifier's head", "classifier": "a classifier's head", "qa_outputs": "a head for questions",
    "v_head": "a value head", "value_head": "a value head", "regression_head": "a head for regression",
}  # fmt: skip
"""Modules of models that write no text, by the names that transformers and TRL give them."""
_BELOW, _ROWS = "base_layer.", "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Grown:
    """A tensor of the embedding or the head with other rows than the base's: its name, its rows, and the base's."""

    key: str
    rows: int
    base_rows: int


def placed_on(
    bare: Bare, config: AdapterConfig, tensors: Mapping[str, Tensor], called: str, stored: Stored | None,
    without_copies: bool = False,
) -> tuple[AdapterConfig, dict[str, Tensor], tuple[str, ...]]:  # fmt: skip
    """Options and tensors (by our names, `names.own_names`) of an adapter that is `called` so, as this base takes them,
    and notes of what was read otherwise than it stands there.

    stored          gives the base's own tensors, beside which PEFT may have written equal ones; None where the base is
                    a skeleton: a copy, which then may have been trained, is refused
    without_copies  leaves such copies out unseen

    Raises AdapterError, which names what it is, for what no base or not this one can take.
    """
    refuse_unusable(tensors, called)
    named, moved = on_modules(tensors, bare.modules)
    _refuse_other_heads(named, bare, called)
    if isinstance(config, Saving) and (found := grown(named, bare)) is not None:
        raise AdapterError(_told_grown(found, called))
    config, notes = settled_on(bare, config, named, moved, called)
    if not isinstance(config, Saving):
        return config, named, notes
    named = _without_tied_rows(named, bare)
    below = base_copies(named, config, bare)
    if without_copies:
        named = {key: tensor for key, tensor in named.items() if key not in below}
    elif stored is None:
        if below:
            raise AdapterError(
                f"{called}: its file holds the base's own {below[0]}, which may have been trained; save it without "
                "(PEFT: save_pretrained(…, save_embedding_layers=False))"
            )
    else:
        config, named = _compared(config, named, bare, stored, called)
    return *_with_whole_modules(config, named, bare, called), notes


def settled_on(
    bare: Bare, config: AdapterConfig, tensors: Mapping[str, Tensor], moved: Mapping[str, str], called: str
) -> tuple[AdapterConfig, tuple[str, ...]]:
    """Options as they are meant in this base (`settling.py`), with notes. `tensors` are by its names already, `moved`
    is what `on_modules` tells of that. Raises AdapterError where no module is left, or tensors have other ranks."""
    if isinstance(config, Saving):
        config = _with_tied_lora(_renamed(config, moved), tensors, bare, called)
    config, notes = settled(bare.seen, config, modules_of(tensors))
    refuse_other_ranks(bare.seen, config, tensors, called)
    told = [f"{theirs} in its file is {ours} in this base" for theirs, ours in sorted(moved.items())[:1]]
    return config, (*told, *notes)


def refuse_unusable(tensors: Mapping[str, Tensor], called: str) -> None:
    """AdapterError for tensors that no base takes: empty ones or single rows, as sharded training leaves them, and
    values that are not finite."""
    shards = sorted(key for key, tensor in tensors.items() if not tensor.numel() or _is_flat_factor(key, tensor))
    if shards:
        shape = list(tensors[shards[0]].shape)
        raise AdapterError(
            f"{called} holds {len(shards)} of {len(tensors)} tensors as shards (first {shards[0]}, of shape {shape}): "
            "DeepSpeed ZeRO-3 or FSDP saved them on one process without gathering the others'; save it again from "
            "there (deepspeed.zero.GatheredParameters, or a full state dict), or make it whole with their own script"
        )
    broken = sorted(key for key, tensor in tensors.items() if not _is_finite(tensor))
    if broken:
        raise AdapterError(
            f"{called} holds NaN or infinite values ({len(broken)} tensors, first {broken[0]}); its training broke, "
            "take an earlier checkpoint"
        )


def grown(tensors: Mapping[str, Tensor], bare: Bare) -> Grown | None:
    """An embedding's or a head's tensor with other rows than this base's, though as wide: a changed vocabulary."""
    for path in (bare.embedding, bare.head):
        if path is None:
            continue
        rows, width = embedding_shape(bare.modules[path])
        b, a = tensors.get(f"{path}.lora_embedding_B"), tensors.get(f"{path}.lora_A.weight")
        sides: dict[str, tuple[int, Tensor | None]] = {
            "weight": (0, None), f"{_BELOW}weight": (0, None), "lora_embedding_A": (1, b), "lora_B.weight": (0, a)
        }  # fmt: skip
        for part, (axis, other) in sides.items():
            tensor = tensors.get(f"{path}.{part}")
            if tensor is None or tensor.dim() != 2:
                continue
            wide = tensor.shape[1] if other is None else other.shape[0 if axis else -1]
            if tensor.shape[axis] != rows and wide == width:
                return Grown(f"{path}.{part}", tensor.shape[axis], rows)
    return None


def base_copies(tensors: Mapping[str, Tensor], config: AdapterConfig, bare: Bare) -> list[str]:
    """Names of what PEFT may have written of the base's own tensors, beside an adapter of the module that has them."""
    return sorted(key for key, (_, part) in _base_copies(tensors, config, bare).items() if part.startswith(_BELOW))


def _told_grown(found: Grown, called: str) -> str:
    told = f"{called} is of a vocabulary of {found.rows:,} ({found.key}), and this base's has {found.base_rows:,}"
    if found.rows < found.base_rows:
        return f"{told}: the base was grown or padded since; load it onto the base as it was"
    return (
        f"{told}: tokens were added before it was trained. Grow the base to {found.rows:,} rows as was done there "
        "(resize_token_embeddings, with its tokenizer), or name the base that it was trained on"
    )


def _is_finite(tensor: Tensor) -> bool:
    known = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # numbers of 8 bits are not asked
    return bool(torch.isfinite(known).all())


def _is_flat_factor(key: str, tensor: Tensor) -> bool:
    return tensor.dim() < 2 and key.endswith((".lora_A.weight", ".lora_B.weight"))


def _refuse_other_heads(tensors: Mapping[str, Tensor], bare: Bare, called: str) -> None:
    for key, tensor in tensors.items():
        path = split_name(key, bare.modules)[0]
        found = next((name for name in path.split(".") if name in OTHER_HEADS), None)
        if found is not None and path not in bare.modules:
            raise AdapterError(
                f"{called} holds {OTHER_HEADS[found]} ({key}, {list(tensor.shape)}), and this base writes text with a "
                "head over its vocabulary: it was trained to do something else, and is of no use here without it"
            )


def _renamed(config: Saving, moved: Mapping[str, str]) -> Saving:
    """Options with modules by this base's paths, where they name them by the paths of their own."""
    changes: dict[str, object] = {}
    for field in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
        names = getattr(config, field, None)
        if isinstance(names, list) and any(name in moved for name in names):
            changes[field] = [moved.get(name, name) for name in names]
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field, None) or {}
        if any(name in moved for name in pattern):
            changes[field] = {moved.get(name, name): value for name, value in pattern.items()}
    return config.model_copy(update=changes) if changes else config


def _base_copies(
    tensors: Mapping[str, Tensor], config: AdapterConfig, bare: Bare
) -> dict[str, tuple[str, str]]:  # fmt: skip
    """The tensors of modules' own parameters that the options tell nothing of, with their path and what they are
    there."""
    if not isinstance(config, Saving):
        return {}
    endings = tuple(config.saved_modules)
    saved = tuple(f"{path}." for path in bare.modules if endings and path.endswith(endings))
    biases = getattr(config, "bias", "none")
    found = {}
    for key in tensors:
        path, part = split_name(key, bare.modules)
        own = part.removeprefix(_BELOW)
        told = own == "bias" and (biases == "all" or (biases != "none" and part != own))
        if own in ("weight", "bias") and path in bare.modules and not told and not key.startswith(saved or ("\0",)):
            found[key] = (path, part)
    return found


def _without_tied_rows(tensors: dict[str, Tensor], bare: Bare) -> dict[str, Tensor]:
    """Without the trained rows of a tied head, where they are the embedding's once more."""
    first, again = (tensors.get(f"{path}.{_ROWS}") for path in (bare.embedding, bare.head))
    if not bare.seen.tied or first is None or again is None or not torch.equal(first, again):
        return tensors
    return {key: tensor for key, tensor in tensors.items() if key != f"{bare.head}.{_ROWS}"}


def _compared(
    config: Saving, tensors: Mapping[str, Tensor], bare: Bare, stored: Stored, called: str
) -> tuple[Saving, dict[str, Tensor]]:  # fmt: skip
    """Without copies that are equal to the base's own, which say nothing new. Rows of tokens that are trained may
    differ: they take the place of the base's. LoRA over another weight than the base's is a module trained whole."""
    left, rows, others = dict(tensors), _trained_rows(config, bare), []
    ends = (bare.embedding, bare.head) if bare.seen.tied else (bare.embedding,)
    for key, (path, part) in _base_copies(tensors, config, bare).items():
        weight, tensor = stored(path, part.removeprefix(_BELOW)), tensors[key]
        if weight is not None and weight.shape == tensor.shape:
            same = weight == tensor.to(weight.dtype)
            if rows and path in ends and tensor.dim() == 2:
                same[rows] = True
            if bool(same.all()):
                del left[key]
                continue
        if can_be_whole(config, tensors, path, bare):
            others.append(path)
        elif part.startswith(_BELOW):
            raise AdapterError(
                f"{called}: its file holds {key}, the base's own, with other values than this base has; it was trained "
                "on another base, or on this one with tokens added to it. Load it onto that base"
            )
    return as_whole(config, left, others, bare) if others and isinstance(config, LoraConfig) else (config, left)


def _trained_rows(config: Saving, bare: Bare) -> list[int]:
    """The ids of the tokens whose rows are trained."""
    found = getattr(config, "trainable_token_indices", None) or []
    ids = {token for some in found.values() for token in some} if isinstance(found, Mapping) else set(found)
    rows = embedding_shape(bare.modules[bare.embedding])[0] if bare.embedding is not None else 0
    return sorted(token for token in ids if 0 <= token < rows)


def _with_whole_modules(
    config: Saving, tensors: dict[str, Tensor], bare: Bare, called: str
) -> tuple[Saving, dict[str, Tensor]]:
    """With modules that the file holds whole among those that are saved. PEFT sets the base's own to what stands there,
    of a tied pair both at once."""
    parts: dict[str, set[str]] = {}
    for path, part in _base_copies(tensors, config, bare).values():
        parts.setdefault(path, set()).add(part)
    whole = {
        path: names for path, names in parts.items()
        if names >= {name for name, _ in bare.modules[path].named_parameters(recurse=False)}
    }  # fmt: skip
    if bare.seen.tied:
        tensors = _with_both_ends(whole, tensors, bare, called)
    if not whole:
        return config, tensors
    names = [*config.saved_modules, *(path for path in whole if path not in config.saved_modules)]
    return config.model_copy(update={"modules_to_save": names}), tensors


def _with_both_ends(
    whole: dict[str, set[str]], tensors: dict[str, Tensor], bare: Bare, called: str
) -> dict[str, Tensor]:  # fmt: skip
    """With head and embedding of a tied pair where one of them is among what the file holds `whole`, and the other is
    not in it: there was one weight."""
    keys = [f"{path}.weight" for path in (bare.embedding, bare.head)]
    there = [key for key in keys if key in tensors]
    found = [str(path) for path in (bare.embedding, bare.head) if path in whole]
    if len(found) == 2 and not torch.equal(tensors[keys[0]], tensors[keys[1]]):
        raise AdapterError(
            f"{called} holds {keys[0]} and {keys[1]} with other values, and in this base they are one weight: it was "
            "trained on a base that keeps them apart (tie_word_embeddings: false). Load it onto that"
        )
    if not found or len(there) == 2:
        return tensors
    whole |= {str(path): {"weight"} for path in (bare.embedding, bare.head)}
    return {**tensors, **dict.fromkeys(keys, tensors[there[0]])}


def _with_tied_lora(config: Saving, tensors: Mapping[str, Tensor], bare: Bare, called: str) -> Saving:
    """With the head among the targets, where the file has the embedding's LoRA for it as well, turned: so PEFT keeps
    the two together (`ensure_weight_tying`), and names the embedding alone."""
    head, embedding = bare.head, bare.embedding
    a, b = (tensors.get(f"{head}.lora_{letter}.weight") for letter in "AB")
    rows, columns = (tensors.get(f"{embedding}.lora_embedding_{letter}") for letter in "AB")
    if not isinstance(config, LoraConfig) or a is None or b is None or rows is None or columns is None or head is None:
        return config
    targets = config.target_modules
    if targets in (ALL_LINEAR, PEFT_TARGETS) or matching([head], targets):
        return config
    if bare.seen.tied and not (torch.equal(a, columns.t()) and torch.equal(b, rows.t())):
        raise AdapterError(
            f"{called} holds LoRA of {head} that is not the one of {embedding} turned, and names {embedding} alone: in "
            "this base they are one weight. It was trained on a base that keeps them apart; load it onto that"
        )
    chosen = [*targets, head] if isinstance(targets, list) else f"(?:{targets})|{re.escape(head)}"
    return config.model_copy(update={"target_modules": chosen})
