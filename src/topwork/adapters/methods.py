"""The adapter methods: for each, which parts a config puts at which modules of a base."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn

from topwork.adapters.bitfit import Bias, bias_targets
from topwork.adapters.config import AdapterConfig
from topwork.adapters.dora import Dora
from topwork.adapters.embedding import (
    EMBEDDINGS,
    EmbeddingLora,
    TiedTokens,
    TrainedTokens,
    check_tokens,
    embedding_shape,
    refuse_both,
    refuse_more_than_lora,
)  # fmt: skip
from topwork.adapters.ia3 import Ia3, ia3_targets
from topwork.adapters.inits import PAIRS, FromWeight, LoftQ, Original
from topwork.adapters.lora import Lora
from topwork.adapters.part import Part
from topwork.adapters.targets import Target, features, find_targets
from topwork.adapters.virtual import Prefix, Prompt, cache_shape, start_tokens, virtual_place
from topwork.adapters.whole import TiedHead, Whole, parameters_of, whole_targets
from topwork.common.errors import AdapterError
from topwork.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class Planned:
    """A part that is yet to be made, and how many parameters it trains."""

    make: Callable[[], Part]
    trained: int


Plan = dict[str, Planned]
"""By the path of the module where the part goes."""


@dataclass(frozen=True)
class Bare:
    """A base as if nothing were grafted: its modules by path, which of them are its embedding and its head, its Hugging
    Face config, and its tokenizer where one was given. `original` gives a quantized layer's weight as it was before,
    where somebody has it at hand."""

    modules: Mapping[str, nn.Module]
    embedding: str | None
    head: str | None
    config: Any = None
    tokenizer: Any = None
    original: Original | None = None


def lora_plan(bare: Bare, config: AdapterConfig) -> Plan:
    """LoRA in every target, with DoRA's lengths, or begun from the base's weights."""
    targets = find_targets(bare.modules, bare.head, config)
    refuse_more_than_lora(
        [target.path for target in targets if isinstance(bare.modules[target.path], EMBEDDINGS)], config
    )
    _refuse_large_ranks(bare, config, targets)

    def at(target: Target) -> Planned:
        inputs, outputs = features(bare.modules[target.path])
        lengths = outputs if config.use_dora else 0
        return Planned(lambda: _lora_part(bare, config, target), target.r * (inputs + outputs) + lengths)

    plan = {target.path: at(target) for target in targets}
    tokens = token_plan(bare, config)
    refuse_both(plan.keys() & tokens.keys())
    return plan | tokens


def _lora_part(bare: Bare, config: AdapterConfig, target: Target) -> Part:
    inputs, outputs = features(bare.modules[target.path])
    scaling = target.alpha / (math.sqrt(target.r) if config.use_rslora else target.r)
    if isinstance(bare.modules[target.path], EMBEDDINGS):
        return EmbeddingLora(inputs, outputs, target.r, scaling)
    init, dropout = config.init_lora_weights, config.lora_dropout
    if init == "loftq":
        return LoftQ(inputs, outputs, target.r, scaling, dropout, _original(bare))
    if isinstance(init, str) and init in PAIRS:
        return FromWeight(inputs, outputs, target.r, scaling, dropout, init)
    kind = Dora if config.use_dora else Lora
    return kind(inputs, outputs, target.r, scaling, dropout, init == "gaussian")


def _original(bare: Bare) -> Original:
    if not any(isinstance(module, QuantizedLinear) for module in bare.modules.values()):
        raise AdapterError(
            "init_lora_weights: loftq begins as what quantizing lost, and this base is not quantized; set "
            "quantization.load_in_4bit: true, or take init_lora_weights: true"
        )
    if bare.original is None:
        raise AdapterError(
            "init_lora_weights: loftq needs the weights as they were before quantizing, and they are not at hand; "
            "quantize an unquantized checkpoint while loading it (quantization.load_in_4bit: true), or take "
            "init_lora_weights: true"
        )
    return bare.original


def _refuse_large_ranks(bare: Bare, config: AdapterConfig, targets: Sequence[Target]) -> None:
    """Weights have no more directions than rows or columns."""
    for target in targets if isinstance(config.init_lora_weights, str) else ():
        most = min(features(bare.modules[target.path]))
        if target.r > most and config.init_lora_weights != "gaussian":
            raise AdapterError(
                f"init_lora_weights: {config.init_lora_weights} takes r directions of a weight, and that of "
                f"{target.path} has {most}, fewer than r = {target.r}; lower r, there by rank_pattern"
            )


def ia3_plan(bare: Bare, config: AdapterConfig) -> Plan:
    """A vector at every target, for its outputs or its inputs."""

    def at(path: str, scales_inputs: bool) -> Planned:
        inputs, outputs = features(bare.modules[path])
        return Planned(lambda: Ia3(inputs, outputs, scales_inputs), inputs if scales_inputs else outputs)

    return {path: at(path, last) for path, last in ia3_targets(bare.modules, bare.head, config).items()}


def bitfit_plan(bare: Bare, config: AdapterConfig) -> Plan:
    """A copy of the bias of every target."""

    def at(path: str) -> Planned:
        module = bare.modules[path]
        return Planned(lambda: Bias(module), module.get_parameter("bias").numel())

    return {path: at(path) for path in bias_targets(bare.modules, bare.head, config)}


def full_plan(bare: Bare, config: AdapterConfig) -> Plan:
    """A copy of every module; a head that is tied to the embedding shares its copy."""
    paths = whole_targets(bare.modules, config)
    plan = {path: _whole(bare.modules[path]) for path in paths}
    if bare.head in plan and bare.embedding in plan and bare.head != bare.embedding:
        head, embedding = bare.modules[bare.head], bare.modules[bare.embedding]
        if head.get_parameter("weight") is embedding.get_parameter("weight"):
            copied = cache(lambda: Whole(embedding))
            bias = getattr(head, "bias", None)
            plan[bare.embedding] = replace(plan[bare.embedding], make=copied)
            plan[bare.head] = Planned(lambda: TiedHead(head, copied()), 0 if bias is None else bias.numel())
    return plan


def _whole(module: nn.Module) -> Planned:
    return Planned(lambda: Whole(module), sum(parameters_of(module).values()))


def token_plan(bare: Bare, config: AdapterConfig) -> Plan:
    """Trained rows of the embedding, which a head tied to it shares."""
    if config.trainable_token_indices is None:
        return {}
    tokens = config.trainable_token_indices
    path = check_tokens(tokens, bare.modules, bare.embedding)
    width = embedding_shape(bare.modules[path])[1]
    rows = cache(lambda: TrainedTokens(tokens, width))  # one part, which the head's looks at
    plan = {path: Planned(rows, len(tokens) * width)}
    if bare.head is not None and bare.modules[bare.head].weight is bare.modules[path].weight:
        plan[bare.head] = Planned(lambda: TiedTokens(rows()), 0)
    return plan


def prompt_plan(bare: Bare, config: AdapterConfig) -> Plan:
    """Learned embeddings before the text; the embedding's layer holds them."""
    path, count = virtual_place(bare.embedding), config.num_virtual_tokens
    width = embedding_shape(bare.modules[path])[1]

    def make() -> Prompt:
        return Prompt(count, width, config.prompt_tuning_init, start_tokens(config, bare.tokenizer))

    return {path: Planned(make, count * width)}


def prefix_plan(bare: Bare, config: AdapterConfig) -> Plan:
    """Learned keys and values of all layers before the text; the embedding's layer holds them too."""
    path, count, shape = virtual_place(bare.embedding), config.num_virtual_tokens, cache_shape(bare.config)
    return {path: Planned(lambda: Prefix(count, shape), count * shape.values)}


METHODS: dict[str, Callable[[Bare, AdapterConfig], Plan]] = {
    "lora": lora_plan,
    "ia3": ia3_plan,
    "bitfit": bitfit_plan,
    "full": full_plan,
    "prefix": prefix_plan,
    "prompt": prompt_plan,
}
"""Method -> which parts it puts where."""
