"""mlx-lm's adapters: y + scale · (x A) B with A [in, r] and B [r, out], both transposed beside PEFT's; `m` is DoRA's
length of each row. Source: mlx-lm, `tuner/lora.py` and `tuner/dora.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topwork.adapters.lowrank import LowRankUpdate
from topwork.adapters.method import Bare
from topwork.common.errors import AdapterError, quoted
from topwork.export.lowered import Lowered
from topwork.export.preflight import is_tied
from topwork.quantization.kinds import EMBEDDINGS

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


@dataclass(frozen=True)
class MlxAdapter:
    """The plain form, and with DoRA the length of each row by the path of its module; the base as mlx-lm calls it."""

    lowered: Lowered
    lengths: dict[str, Tensor]
    base: str | None


def mlx_adapter(called: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], bare: Bare | None) -> MlxAdapter:
    """What an adapter's tensors say. `bare` is the base, None where it was not named.

    Raises AdapterError for what is no LoRA or DoRA of linear layers and embeddings.
    """
    scale = _scale(called, config)
    pairs = {name.rpartition(".")[0] for name in tensors}
    updates, lengths = {}, {}
    for path in sorted(pairs):
        own = {name.rpartition(".")[2]: tensor.float() for name, tensor in tensors.items() if _is_of(name, path)}
        _check(called, path, own)
        updates[path] = _update(called, path, own, scale, bare)
        if "m" in own:
            lengths[path] = own["m"].flatten()
    if lengths and lengths.keys() != updates.keys():
        raise AdapterError(f"{called} has DoRA's lengths at some modules alone, which one PEFT adapter cannot have")
    if config.get("fine_tune_type") == "dora" and not lengths:
        raise AdapterError(f"{called} says it is DoRA and holds no lengths (…m)")
    rank = max(update.rank for update in updates.values())
    base = config.get("model")
    plain = Lowered({path: update.padded(rank) for path, update in updates.items()}, rank)
    return MlxAdapter(plain, lengths, base if isinstance(base, str) else None)


def _scale(called: str, config: Mapping[str, Any]) -> float:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"{called} is of fine_tune_type {quoted(kind)}: its file holds weights of the base itself, not an adapter; "
            "fuse it there (mlx_lm.fuse) and take the model"
        )
    given = config.get("lora_parameters")
    scale = given.get("scale") if isinstance(given, Mapping) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise AdapterError(
            f"{called} does not say by what its update is multiplied (adapter_config.json: lora_parameters.scale), and "
            "it is not guessed"
        )
    assert isinstance(given, Mapping)
    alpha, rank = given.get("alpha"), given.get("rank")
    if alpha is not None and alpha != rank:
        raise AdapterError(
            f"{called} has an alpha of {alpha!r} beside its scale {scale:g} and rank {rank!r}: mlx-lm once multiplied "
            "by scale · alpha / rank and now multiplies by scale alone, and the file does not tell which of them wrote "
            "it; take alpha out of adapter_config.json, and let lora_parameters.scale be what it was trained with"
        )
    return float(scale)


def _is_of(name: str, path: str) -> bool:
    return name.rpartition(".")[0] == path


def _check(called: str, path: str, own: Mapping[str, Tensor]) -> None:
    unknown = sorted(own.keys() - {"lora_a", "lora_b", "m"})
    if unknown or not {"lora_a", "lora_b"} <= own.keys():
        told = f"{path}.{unknown[0]}" if unknown else f"{path} without one of lora_a and lora_b"
        raise AdapterError(f"{called} holds {quoted(told)}; LoRA and DoRA of mlx-lm have lora_a, lora_b and m")
    a, b = own["lora_a"], own["lora_b"]
    if a.dim() == 3:
        raise AdapterError(f"{called} adapts experts at once ({path}); PEFT has no plain form for these")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != len(b):
        raise AdapterError(f"{called}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, which are no product")


def _update(called: str, path: str, own: Mapping[str, Tensor], scale: float, bare: Bare | None) -> LowRankUpdate:
    name = path.rpartition(".")[2]
    module = bare.modules.get(path) if bare is not None else None
    embedding = isinstance(module, EMBEDDINGS) if module is not None else name in _EMBEDDINGS
    if embedding:
        if bare is None:
            raise AdapterError(
                f"{called} adapts the embedding {path}, which mlx-lm applies to a tied head as well; name the base "
                "with --model, so that this is known"
            )
        if is_tied(bare) or "m" in own:
            what = "as DoRA" if "m" in own else "and its head is tied to it, where mlx-lm applies it as well"
            raise AdapterError(f"{called} adapts the embedding {path}, {what}; PEFT has no form for that")
    a, b = own["lora_a"].t().contiguous(), own["lora_b"].t().contiguous()
    return LowRankUpdate(a, torch.tensor(scale) * b, scale, embedding)
