"""An adapter read from disk as changes of its base: a delta for every module that it adapts, parameters of modules that
it trained whole, rows of tokens that it trained.

Factors and scales come from the adapter's parts, made one at a time on a skeleton of the base
(`adapters/lazy_parts.py`): rsLoRA, patterns and doubled ranks are told there. Only what is no product of factors needs
the base's weights, one module at a time: DoRA, IA3, whole modules, tokens' rows, and PEFT's PiSSA and OLoRA folders,
whose base lacks what they began as.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from topwork.adapters.config import LoraConfig
from topwork.adapters.foreign import content_of
from topwork.adapters.lazy_parts import LazyParts
from topwork.adapters.method import Bare
from topwork.adapters.methods.bitfit import Bias
from topwork.adapters.methods.factored import Factored
from topwork.adapters.methods.ia3 import Ia3
from topwork.adapters.methods.lora.biases import BiasedLora
from topwork.adapters.methods.lora.dora import Dora
from topwork.adapters.methods.lora.embedding import EmbeddingLora, HeadTokens, TrainedTokens
from topwork.adapters.methods.lora.experts import ExpertsLora, RouterLora
from topwork.adapters.methods.lora.inits import FromWeight
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.methods.lora.token_places import token_places
from topwork.adapters.methods.oft import Oft
from topwork.adapters.methods.readonly.method import ReadOnlyPart
from topwork.adapters.module import AdapterModule
from topwork.adapters.module_copy import ModuleCopy
from topwork.adapters.peft_format import SavedAdapter
from topwork.common.errors import AdapterError
from topwork.merging.deltas import Delta, DenseDelta, LowRankDelta

BaseWeights = Callable[[str], Tensor]
"""A parameter's name in the model (`model.norm.weight`) -> its values in fp32, laid out as the family holds them.
Raises AdapterError or ModelError where it is not to be had."""
Parameter = tuple[str, str]
"""A module's path, and a parameter's name in it."""
_INSTEAD = "merge it into the base (`topwork merge`), or train the task as LoRA"
_VIRTUAL = (
    "its learned tokens change no weight, so there is no delta of them; train the task as LoRA, or serve the adapters "
    "beside each other (`topwork serve`)"
)
NO_DELTA = {
    "prompt": _VIRTUAL,
    "prefix": _VIRTUAL,
    "bitfit": f"method bitfit changes biases alone, which a LoRA folder does not hold; {_INSTEAD}",
    "full": "method full changes every weight, which no low-rank adapter holds; train the task as LoRA, or combine the "
    "whole models",
}
"""Methods that are refused, and why."""


@dataclass(frozen=True)
class Changes:
    """One adapter.

    label     what people call it
    content   the SHA-256 of its options and tensors
    adapted   paths of the modules that have a delta, in the model's order
    whole     parameters of modules that it trained whole
    tokens    (the embedding's path, the ids) of the rows that it trained
    rank      its largest; None where it has no factors (IA3)
    """

    label: str
    content: str
    adapted: tuple[str, ...]
    whole: tuple[Parameter, ...]
    tokens: tuple[str, tuple[int, ...]] | None
    rank: int | None
    parts: LazyParts
    bare: Bare
    base: BaseWeights

    @torch.no_grad()
    def delta(self, path: str) -> Delta:
        """ΔW of a module that it adapts. Where that needs the base's weight it raises what `base` does."""

        def weight() -> Tensor:
            return rows_of(self.bare.modules[path], self.base(f"{path}.weight"))

        part = self.parts.part(path, weight)
        if isinstance(part, EmbeddingLora):
            a, b = part.lora_embedding_A.double(), part.lora_embedding_B.double()
            return LowRankDelta((part.scaling * a).t(), b.t())
        if isinstance(part, FromWeight):
            first, second = part.difference()
            return LowRankDelta(part.scaling * second.double(), first.double())
        if isinstance(part, Factored):
            a, b = part.factors()
            return LowRankDelta(part.scaling * b.double(), a.double())
        if isinstance(part, Lora) and not isinstance(part, Dora):
            return LowRankDelta(part.scaling * part.lora_B.double(), part.lora_A.double())
        before = weight()
        return DenseDelta(part.merged(before, None)[0] - before)

    def rank_at(self, path: str) -> int | None:
        """Of the factors of ΔW there; None where it has none (DoRA, IA3)."""
        part = self.parts.shapes[path]
        return None if isinstance(part, Dora) else _rank(part)

    @torch.no_grad()
    def of_parameter(self, path: str, name: str) -> Tensor | None:
        """How far a parameter lies from the base's, in fp32 and the base's layout: of a module that is trained whole,
        or the weight of one that is adapted. None where nothing changes it."""
        if (path, name) in self.whole:
            return self.parts.stored(path, name).float() - self.base(f"{path}.{name}")
        if path in self.adapted and name == "weight":
            return rows_of(self.bare.modules[path], self.delta(path).dense()).float()
        return None

    @torch.no_grad()
    def of_tokens(self) -> dict[int, Tensor]:
        """How far each trained token's row [d] lies from the base's, in fp32."""
        if self.tokens is None:
            return {}
        path, ids = self.tokens
        rows = self.parts.stored(path, TOKEN_ROWS).float() - self.base(f"{path}.weight")[list(ids)]
        return dict(zip(ids, rows))


ADAPTING = (Lora, EmbeddingLora, Ia3, Factored, Oft, ReadOnlyPart)
"""Parts that change the weight of a module which is the base's own."""
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's name of the trained rows, behind the embedding's path."""


def changes_of(label: str, saved: SavedAdapter, bare: Bare, base: BaseWeights) -> Changes:
    """`bare` may be a skeleton without weights, whose values `base` then gives where they are needed.

    Raises AdapterError, with `label`, for what does not fit the base, holds values that are not finite, or is no change
    of weights that an adapter can hold: virtual tokens, biases, full fine-tuning.
    """
    if saved.config.method in NO_DELTA:
        raise AdapterError(f"{label}: {NO_DELTA[saved.config.method]}")

    def stored(path: str, kind: str) -> Tensor | None:
        known = getattr(bare.modules.get(path), kind, None)
        return base(f"{path}.{kind}") if isinstance(known, Tensor) else None

    try:
        parts = LazyParts(bare, replace(saved, path=label), stored)
        for path, part in parts.shapes.items():
            _refuse_biases(path, part, bare.modules[path])
            _refuse_head_rows(path, part)
            _refuse_parameters(path, part)
    except AdapterError as error:
        raise AdapterError(str(error) if str(error).startswith(label) else f"{label}: {error}") from error
    config, shapes = parts.config, parts.shapes
    adapted = {path for path, part in shapes.items() if isinstance(part, ADAPTING)}
    copies = {path: part for path, part in shapes.items() if isinstance(part, ModuleCopy)}
    rows = next((path for path, part in shapes.items() if isinstance(part, TrainedTokens)), None)
    named = config.trainable_token_indices if isinstance(config, LoraConfig) else None
    ids = next((each.ids for each in token_places(bare.seen, named) if not each.is_head), ())
    ranks = [rank for part in shapes.values() if (rank := _rank(part)) is not None]
    return Changes(
        label,
        content_of(saved),
        tuple(path for path in bare.modules if path in adapted),
        tuple((path, name) for path, part in copies.items() for name in part.tensors()),
        None if rows is None else (rows, ids),
        max(ranks, default=None),
        parts,
        bare,
        base,
    )


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A linear layer's weight as [out, in], and back again: gpt2's Conv1D holds it as [in, out]."""
    return weight.t() if isinstance(module, Conv1D) else weight


def _rank(part: AdapterModule) -> int | None:
    if isinstance(part, FromWeight):
        return 2 * part.lora_A.shape[0]
    if isinstance(part, Lora):
        return part.lora_A.shape[0]
    return part.lora_embedding_A.shape[0] if isinstance(part, EmbeddingLora) else None


def _refuse_head_rows(path: str, part: AdapterModule) -> None:
    if isinstance(part, HeadTokens):
        raise AdapterError(
            f"it trained some tokens' rows of {path}, a head of its own, which are not combined; {_INSTEAD}"
        )


def _refuse_parameters(path: str, part: AdapterModule) -> None:
    if isinstance(part, ExpertsLora | RouterLora):
        raise AdapterError(
            f"it adapts parameters of {path} (target_parameters), experts or their router, which have no delta of one "
            f"matrix; {_INSTEAD}"
        )


def _refuse_biases(path: str, part: AdapterModule, module: nn.Module) -> None:
    """IA3 and RoAd in a layer with a bias change that as well."""
    if isinstance(part, BiasedLora | Bias):
        raise AdapterError(
            f"it trained the bias of {path} (bias, lora_bias), which no low-rank delta holds; {_INSTEAD}"
        )
    if isinstance(part, ReadOnlyPart) and "bias" in part.merges and getattr(module, "bias", None) is not None:
        raise AdapterError(f"RoAd turns the bias of {path} too, which a LoRA folder does not hold; {_INSTEAD}")
    if isinstance(part, Ia3) and not part.scales_inputs and getattr(module, "bias", None) is not None:
        raise AdapterError(f"IA3 scales the bias of {path} too, which a LoRA folder does not hold; {_INSTEAD}")
