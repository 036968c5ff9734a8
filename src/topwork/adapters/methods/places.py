"""Where each method but LoRA (`lora/places.py`) puts its parts, and how large they are. Free of torch: a config is
enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topwork.adapters.config import OWN_TARGETS, BitFitConfig, FullConfig, Ia3Config, PrefixConfig, PromptConfig
from topwork.adapters.places import Module, Places, Sizes
from topwork.adapters.targets import (
    choose_modules,
    excluded_modules,
    find_targets,
    linear_names,
    matching,
    named_modules,
)
from topwork.common.errors import AdapterError

KEYS_VALUES = ("k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv")
"""Names of projections to keys and values; a fused one is scaled whole, queries too."""
MLP_LAST = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "fc_out", "w2")
"""Names of an MLP's last projection."""


@dataclass(frozen=True)
class CacheShape:
    """What attention keeps of a token: in each layer so many heads of keys, and as many of values, each `size` wide."""

    layers: int
    heads: int
    size: int

    @property
    def values(self) -> int:
        """Of one token in all layers."""
        return 2 * self.layers * self.heads * self.size


def ia3_sizes(base: Places, config: Ia3Config) -> Sizes:
    """A vector at every target, for its outputs or its inputs."""
    modules, targets = base.by_path, ia3_targets(base, config)
    return {path: (modules[path].columns if last else modules[path].rows,) for path, last in targets.items()}


def ia3_targets(base: Places, config: Ia3Config) -> dict[str, bool]:
    """Path -> whether its inputs are scaled, of the modules that `config` names or that IA3 is meant for.

    Raises AdapterError where a base has none that are known, or where `feedforward_modules` is no target; where it was
    one, but for what is left out, all scale their outputs, as in PEFT.
    """
    if config.targets == OWN_TARGETS:
        config = config.model_copy(update={"target_modules": own_names(base.by_path)})
    paths = [path for path in find_targets(base, config) if ".experts." not in path]
    asked = config.feedforward_modules
    if asked and not _scaling_inputs(named := named_modules(base, config), asked):
        raise AdapterError(
            f"feedforward_modules {asked!r} matches none of the {len(named)} target modules (first {named[0]}); name "
            "some of target_modules, or leave it out for the MLP's last layers"
        )
    last = set(matching(paths, list(MLP_LAST)) if asked is None else _scaling_inputs(paths, asked))
    return {path: path in last for path in paths}


def _scaling_inputs(paths: Sequence[str], asked: str | list[str]) -> list[str]:
    """Those that `feedforward_modules` means, a list by any ending, as in PEFT."""
    return matching(paths, asked) if isinstance(asked, str) else [path for path in paths if path.endswith(tuple(asked))]


def own_names(modules: Mapping[str, Module]) -> list[str]:
    """The names of a base's keys, values and last MLP layers."""
    linear = [path for path, module in modules.items() if module.kind == "linear"]
    found = [_there(linear, names) for names in (KEYS_VALUES, MLP_LAST)]
    if not all(found):
        raise AdapterError(
            f"method ia3 knows no {'keys and values' if not found[0] else 'last MLP layer'} in this base (names such "
            f"as {', '.join((KEYS_VALUES if not found[0] else MLP_LAST)[:4])}); give target_modules and "
            f"feedforward_modules yourself, out of {', '.join(linear_names(modules))}"
        )
    return [*found[0], *found[1]]


def _there(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    return [name for name in names if matching(paths, [name])]


def bitfit_sizes(base: Places, config: BitFitConfig) -> Sizes:
    """A copy of the bias of every target."""
    return {path: base.by_path[path].tensors[-1:] for path in bias_targets(base, config)}


def bias_targets(base: Places, config: BitFitConfig) -> list[str]:
    """Paths of the modules with a bias that `config` names, or of all. AdapterError where there is none."""
    biased = [path for path, module in base.by_path.items() if module.bias]
    if not biased:
        raise AdapterError(
            "method bitfit trains biases, and this base has none in its linear layers and norms (llama and most that "
            "followed it have none); take method lora or ia3, or a base with biases (gpt2, opt, phi, qwen2)"
        )
    if config.targets == OWN_TARGETS:
        names = sorted({path.rpartition(".")[2] for path in biased})
        config = config.model_copy(update={"target_modules": names})
    found = [path for path in choose_modules(base, config) if path in set(biased)]
    if not found:
        raise AdapterError(
            f"none of the modules that target_modules {config.target_modules!r} names has a bias; those with one are "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in biased}))}"
        )
    return found


def full_sizes(base: Places, config: FullConfig) -> Sizes:
    """A copy of every module; a head that is tied to the embedding shares its copy, and has its bias alone."""
    sizes = {path: base.by_path[path].tensors for path in whole_targets(base, config)}
    if shared_head(base, sizes):
        sizes[str(base.head)] = sizes[str(base.head)][1:]
    return sizes


def shared_head(base: Places, chosen: Mapping[str, Any]) -> bool:
    """Whether the head is trained as the embedding's copy."""
    return base.tied and base.head in chosen and base.embedding in chosen


def whole_targets(base: Places, config: FullConfig) -> list[str]:
    """Paths of every module with parameters of its own, but those left out.

    Raises AdapterError where one cannot be held as a copy: it is given more than the tokens' rows, or mixes them.
    """
    modules = base.by_path
    own = [path for path, module in modules.items() if module.tensors]
    out = excluded_modules(modules, config.exclude_modules, own)
    chosen = [path for path in own if path not in out]
    wrong = [path for path in chosen if not modules[path].by_row]
    if wrong:
        raise AdapterError(
            f"method full cannot train {wrong[0]} or {len(wrong) - 1} others: a copy can stand for modules that take "
            "every token's row by itself; leave these out with exclude_modules: "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in wrong}))}"
        )
    if not chosen:
        raise AdapterError(f"exclude_modules {config.exclude_modules!r} leaves nothing to train; loosen it")
    return chosen


def prompt_sizes(base: Places, config: PromptConfig) -> Sizes:
    """Learned embeddings before the text; the embedding's layer holds them."""
    path = virtual_place(base)
    return {path: (config.num_virtual_tokens * base.by_path[path].columns,)}


def prefix_sizes(base: Places, config: PrefixConfig) -> Sizes:
    """Learned keys and values of all layers before the text; the embedding's layer holds them too."""
    return {virtual_place(base): (config.num_virtual_tokens * cache_shape(base).values,)}


def virtual_place(base: Places) -> str:
    """The path whose layer holds learned tokens."""
    if base.embedding is None:
        raise AdapterError("prefix and prompt tuning need a base with an input embedding; this one has none")
    return base.embedding


def cache_shape(base: Places) -> CacheShape:
    """Raises AdapterError where its layers' keys and values are not all alike."""
    if any(base.config.get(key) for key in ("num_kv_shared_layers", "global_head_dim", "kv_lora_rank")):
        raise AdapterError(
            f"{base.family}'s layers do not all keep keys and values of one shape, and a learned prefix is one "
            "table for all; take prompt tuning or another method"
        )
    return CacheShape(base.layers, base.key_value_heads, base.head_dim)
