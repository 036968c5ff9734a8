"""LoRA and its kin as a method: which parts go where, and PEFT's LORA folders.

rsLoRA is another scale, DoRA `dora.py`, biases `biases.py`, other beginnings `inits.py`, parts at embeddings
`embedding.py`. What began
with PiSSA or OLoRA is written as the LoRA of rank 2 r that it is, with the ranks and alphas that keep its scale.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from topwork.adapters.config import PEFT_TARGETS, LoraConfig
from topwork.adapters.files import Files, Grafted, has_conv1d, peft_keys, sorted_or_none
from topwork.adapters.method import Bare, Method, Original, Plan, Planned, Preset
from topwork.adapters.methods.bitfit import Bias
from topwork.adapters.methods.lora.bias_places import other_biases
from topwork.adapters.methods.lora.biases import BiasedDora, BiasedLora
from topwork.adapters.methods.lora.dora import Dora
from topwork.adapters.methods.lora.embedding import EmbeddingLora, TiedTokens, TrainedTokens
from topwork.adapters.methods.lora.inits import PAIRS, FromWeight, LoftQ
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.methods.lora.patterns import without_overlaps
from topwork.adapters.methods.lora.places import Target, Tokens, lora_places
from topwork.adapters.module import AdapterModule
from topwork.adapters.peft_options import LORA_FIELDS, lora_options
from topwork.adapters.targets import ALL_LINEAR, listed, matching
from topwork.common.errors import AdapterError
from topwork.quantization.linear import QuantizedLinear


def lora_plan(bare: Bare, config: LoraConfig) -> Plan:
    """LoRA in every target, with DoRA's lengths and biases, or begun from the base's weights; and trained tokens."""
    targets, tokens = lora_places(bare.seen, config)

    def at(target: Target) -> Planned:
        return Planned(
            lambda: _part(bare, config, target), sum(target.sizes(config.use_dora)), _scaling(config, target)
        )

    plan = {target.path: at(target) for target in targets}
    if tokens is not None:
        plan |= _token_plan(tokens, config.trainable_token_indices or [])
    return plan | _bias_plan(bare, config, plan)


def _part(bare: Bare, config: LoraConfig, target: Target) -> AdapterModule:
    inputs, outputs = target.inputs, target.outputs
    scaling = _scaling(config, target)
    if target.is_embedding:
        return EmbeddingLora(inputs, outputs, target.r, scaling)
    init, dropout = config.init_lora_weights, config.lora_dropout
    if init == "loftq":
        return LoftQ(inputs, outputs, target.r, scaling, dropout, _original(bare))
    if isinstance(init, str) and init in PAIRS:
        return FromWeight(inputs, outputs, target.r, scaling, dropout, init)
    if target.biases:
        biased = BiasedDora if config.use_dora else BiasedLora
        part = biased(inputs, outputs, target.r, scaling, dropout, init == "gaussian")
        return part.with_biases(bare.modules[target.path], target.biases)
    kind = Dora if config.use_dora else Lora
    return kind(inputs, outputs, target.r, scaling, dropout, init == "gaussian")


def _scaling(config: LoraConfig, target: Target) -> float:
    return target.alpha / (math.sqrt(target.r) if config.use_rslora else target.r)


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


def _token_plan(tokens: Tokens, indices: Sequence[int]) -> Plan:
    """Trained rows of the embedding, which a head tied to it shares."""
    rows = cache(lambda: TrainedTokens(indices, tokens.width))  # one part, which the head's looks at
    own = tuple(indices)
    plan = {tokens.path: Planned(rows, len(own) * tokens.width, own)}
    return plan if tokens.head is None else plan | {tokens.head: Planned(lambda: TiedTokens(rows()), 0, own)}


def _bias_plan(bare: Bare, config: LoraConfig, plan: Plan) -> Plan:
    """The biases of modules that have no other part."""

    def at(path: str) -> Planned:
        module = bare.modules[path]
        return Planned(lambda: Bias(module), bare.seen.by_path[path].tensors[-1])

    return {path: at(path) for path in other_biases(bare.seen, config, plan)}


def _keys(adapter: Grafted[LoraConfig]) -> dict[str, Any]:
    config, modules = adapter.config, adapter.modules
    targets = [path for path, part in adapter.parts.items() if isinstance(part, Lora | EmbeddingLora)]
    written = _written_targets(config, targets, modules)
    by_path = written == sorted(targets)  # the list is the choice; PEFT would choose among it once more
    return {
        **peft_keys("LORA"),
        **{field: getattr(config, field) for field in LORA_FIELDS},
        **_ranks(config, targets),
        "target_modules": written,
        "layers_to_transform": None if by_path else config.layers_to_transform,
        "layers_pattern": None if by_path else config.layers_pattern,
        "modules_to_save": sorted_or_none(config.modules_to_save),
        "fan_in_fan_out": has_conv1d(modules, targets),
        "init_lora_weights": config.init_lora_weights if config.init_lora_weights == "gaussian" else True,
    }


def _ranks(config: LoraConfig, targets: Sequence[str]) -> dict[str, Any]:
    """Ranks and alphas of what is in the file: twice the rank with the same scale, where the base lacks a part."""
    twice = config.init_lora_weights in PAIRS
    alphas = (math.sqrt(2) if config.use_rslora else 2) if twice else 1
    ranks = 2 if twice else 1
    rank_pattern = without_overlaps(config.rank_pattern, targets, config.r)
    alpha_pattern = without_overlaps(config.alpha_pattern, targets, config.lora_alpha)
    return {
        "r": ranks * config.r,
        "rank_pattern": {key: ranks * r for key, r in rank_pattern.items()},
        "lora_alpha": alphas * config.lora_alpha,
        "alpha_pattern": {key: alphas * alpha for key, alpha in alpha_pattern.items()},
    }


def _written_targets(config: LoraConfig, paths: list[str], modules: Mapping[str, nn.Module]) -> str | list[str]:
    """all-linear is written out, as names where the names alone say it, and so is what PEFT takes by the family. PEFT
    takes no layers beside a regular expression: whole paths then."""
    if config.target_modules not in (ALL_LINEAR, PEFT_TARGETS):
        asked = listed(modules, config.target_modules)
        if isinstance(asked, list):
            return sorted(asked)
        return sorted(paths) if config.layers_to_transform is not None else asked
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
