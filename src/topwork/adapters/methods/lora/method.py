"""LoRA and its kin as a method: which parts go where, and PEFT's LORA folders.

rsLoRA is another scale, DoRA `dora.py`, other beginnings `inits.py`, parts at embeddings `embedding.py`. What began
with PiSSA or OLoRA is written as the LoRA of rank 2 r that it is, with the ranks and alphas that keep its scale.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from topwork.adapters.config import LoraConfig
from topwork.adapters.files import Files, Grafted, has_conv1d, peft_keys, sorted_or_none
from topwork.adapters.method import Bare, Method, Original, Plan, Planned, Preset
from topwork.adapters.methods.lora.dora import Dora
from topwork.adapters.methods.lora.embedding import (
    EmbeddingLora,
    TiedTokens,
    TrainedTokens,
    check_tokens,
    refuse_both,
    refuse_more_than_lora,
)  # fmt: skip
from topwork.adapters.methods.lora.inits import PAIRS, FromWeight, LoftQ
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.module import AdapterModule
from topwork.adapters.peft_options import LORA_FIELDS, lora_options
from topwork.adapters.targets import EMBEDDINGS, LINEAR, embedding_shape, features, find_targets, matching, near_names
from topwork.common.errors import AdapterError
from topwork.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class Target:
    """One module that gets an A and a B: its path, its rank and its alpha."""

    path: str
    r: int
    alpha: float


def lora_plan(bare: Bare, config: LoraConfig) -> Plan:
    """LoRA in every target, with DoRA's lengths, or begun from the base's weights; and trained tokens."""
    paths = find_targets(bare.modules, bare.head, config, (*LINEAR, *EMBEDDINGS))
    targets = _ranked(paths, config)
    refuse_more_than_lora([path for path in paths if isinstance(bare.modules[path], EMBEDDINGS)], config)
    _refuse_large_ranks(bare, config, targets)

    def at(target: Target) -> Planned:
        inputs, outputs = features(bare.modules[target.path])
        lengths = outputs if config.use_dora else 0
        return Planned(lambda: _part(bare, config, target), target.r * (inputs + outputs) + lengths)

    plan = {target.path: at(target) for target in targets}
    tokens = _token_plan(bare, config)
    refuse_both(plan.keys() & tokens.keys())
    return plan | tokens


def _ranked(paths: Sequence[str], config: LoraConfig) -> list[Target]:
    """Each path with its rank and alpha. A pattern that matches nothing would be ignored silently, and the run would
    not be the one asked for: AdapterError."""

    patterns = {key: _ending(key) for key in (*config.rank_pattern, *config.alpha_pattern)}

    def matches(key: str, path: str) -> bool:
        return patterns[key].match(path) is not None

    def of(path: str, pattern: Mapping[str, Any], default: Any) -> Any:
        return next((value for key, value in pattern.items() if matches(key, path)), default)

    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if not any(matches(key, path) for path in paths):
                raise AdapterError(f"{name} has {key!r}, which matches no target module{near_names(key, paths)}")
    return [
        Target(path, of(path, config.rank_pattern, config.r), of(path, config.alpha_pattern, config.lora_alpha))
        for path in paths
    ]


def _ending(key: str) -> re.Pattern[str]:
    """As PEFT looks for it."""
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise AdapterError(f"{key!r} in rank_pattern or alpha_pattern is no regular expression ({error})") from error


def _part(bare: Bare, config: LoraConfig, target: Target) -> AdapterModule:
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


def _refuse_large_ranks(bare: Bare, config: LoraConfig, targets: Sequence[Target]) -> None:
    """Weights have no more directions than rows or columns."""
    for target in targets if isinstance(config.init_lora_weights, str) else ():
        most = min(features(bare.modules[target.path]))
        if target.r > most and config.init_lora_weights != "gaussian":
            raise AdapterError(
                f"init_lora_weights: {config.init_lora_weights} takes r directions of a weight, and that of "
                f"{target.path} has {most}, fewer than r = {target.r}; lower r, there by rank_pattern"
            )


def _token_plan(bare: Bare, config: LoraConfig) -> Plan:
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


def _keys(adapter: Grafted[LoraConfig]) -> dict[str, Any]:
    config, modules = adapter.config, adapter.modules
    targets = [path for path, part in adapter.parts.items() if isinstance(part, Lora | EmbeddingLora)]
    written = _written_targets(config, targets, modules)
    by_path = written == sorted(targets)  # the list is the choice; PEFT would choose among it once more
    return {
        **peft_keys("LORA"),
        **{field: getattr(config, field) for field in LORA_FIELDS},
        **_ranks(config),
        "target_modules": written,
        "layers_to_transform": None if by_path else config.layers_to_transform,
        "layers_pattern": None if by_path else config.layers_pattern,
        "modules_to_save": sorted_or_none(config.modules_to_save),
        "bias": "none",
        "fan_in_fan_out": has_conv1d(modules, targets),
        "init_lora_weights": config.init_lora_weights if config.init_lora_weights == "gaussian" else True,
        "lora_bias": False,
    }


def _ranks(config: LoraConfig) -> dict[str, Any]:
    """Ranks and alphas of what is in the file: twice the rank with the same scale, where the base lacks a part."""
    twice = config.init_lora_weights in PAIRS
    alphas = (math.sqrt(2) if config.use_rslora else 2) if twice else 1
    ranks = 2 if twice else 1
    return {
        "r": ranks * config.r,
        "rank_pattern": {key: ranks * r for key, r in config.rank_pattern.items()},
        "lora_alpha": alphas * config.lora_alpha,
        "alpha_pattern": {key: alphas * alpha for key, alpha in config.alpha_pattern.items()},
    }


def _written_targets(config: LoraConfig, paths: list[str], modules: Mapping[str, nn.Module]) -> str | list[str]:
    """all-linear is written out, as names where the names alone say it. PEFT takes no layers beside a regular
    expression: whole paths then."""
    if isinstance(config.target_modules, list):
        return sorted(config.target_modules)
    if config.target_modules != "all-linear":
        return sorted(paths) if config.layers_to_transform is not None else config.target_modules
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if set(matching(modules, names)) == set(paths) else sorted(paths)


LORAPLUS_RATIO = 16
"""How much faster B learns than A in LoRA+."""
PLAIN = {
    "adapter.use_rslora": False, "adapter.use_dora": False, "adapter.init_lora_weights": True,
    "training.loraplus_lr_ratio": None,
}  # fmt: skip
"""What a recipe may have set, and a preset begins without."""
PRESETS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"adapter.use_rslora": True},
    "dora": {"adapter.use_dora": True},
    "lora+": {"training.loraplus_lr_ratio": LORAPLUS_RATIO},
    "pissa": {"adapter.init_lora_weights": "pissa"},
    "olora": {"adapter.init_lora_weights": "olora"},
}
LORA = Method(
    LoraConfig,
    lora_plan,
    Files("LORA", _keys, lora_options),
    {name: Preset(PLAIN | changes) for name, changes in PRESETS.items()},
)
"""LoRA, rsLoRA, DoRA, LoRA+, and other beginnings."""
