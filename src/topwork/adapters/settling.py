"""An adapter that was read, on a base: what its config names there that matches nothing is left out and told, where a
recipe's would be refused. Free of torch.

PEFT is silent about such names, so folders have them: lists of usual names, patterns of another family. What is really
adapted is in the file, whose tensors have to fit afterwards.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from topwork.adapters.config import (
    OWN_TARGETS,
    PEFT_TARGETS,
    AdapterConfig,
    Excluding,
    Ia3Config,
    LoraConfig,
    Targeted,
)
from topwork.adapters.methods.lora.parameters import parameter_paths, with_parameters
from topwork.adapters.methods.lora.places import keys_of, ranked_paths
from topwork.adapters.peft_targets import BY_METHOD
from topwork.adapters.places import Places
from topwork.adapters.targets import (
    free_modules,
    idle_names,
    is_layer,
    is_whole_path,
    layer_of,
    layers_of,
)

Change = tuple[dict[str, Any], list[str]]
"""Options as they are settled, and what is to be said of that."""


def begun(base: Places, config: AdapterConfig) -> AdapterConfig:
    """The options of an adapter that begins with another's weights (`init_from`), whose config was read, not asked
    for: settled. Any other as it is."""
    return settled(base, config)[0] if config.init_from is not None else config


def settled(
    base: Places, config: AdapterConfig, held: Collection[str] = ()
) -> tuple[AdapterConfig, tuple[str, ...]]:  # fmt: skip
    """A config without what matches nothing in this base, and notes of what was left out.

    held  paths of the modules that the adapter's file has tensors of; a name of one of these is never left out, so that
          what does not fit is refused by it

    Raises AdapterError where no module is left that an adapter could go into.
    """
    notes: list[str] = []
    if isinstance(config, LoraConfig):
        config = with_parameters(base, config)
    for step in (_parameters, _targets, _excluded, _layers, _saved, _feedforward, _patterns):
        change, told = step(base, config, held)
        if change:
            config = config.model_copy(update=change)
        notes += told
    return config, tuple(notes)


def modules_of(keys: Iterable[str]) -> set[str]:
    """The paths of the modules that tensors of these names belong to, but for trained rows of an embedding."""
    own = [key for key in keys if ".token_adapter." not in key]
    return {_BEHIND.sub("", key) if _BEHIND.search(key) else key.rpartition(".")[0] for key in own} - {""}


_BEHIND = re.compile(r"\.(lora_|ia3_l|oft_R|gralora_|base_layer\.).*$")
"""What PEFT writes behind a module's path, where it is more than a parameter's name."""


def _parameters(base: Places, config: AdapterConfig, held: Collection[str]) -> Change:  # noqa: ARG001
    if not isinstance(config, LoraConfig) or not config.target_parameters:
        return {}, []
    names = config.target_parameters
    return _without("target_parameters", names, idle_names(list(parameter_paths(base)), names), None)


def _targets(base: Places, config: AdapterConfig, held: Collection[str]) -> Change:
    if not isinstance(config, Targeted):
        return {}, []
    names = config.target_modules
    if names == PEFT_TARGETS and base.family not in BY_METHOD.get(config.method, {}):
        there = sorted(set(held) & base.by_path.keys())
        if not there:
            return {}, []
        told = f"target_modules is left out, and PEFT has none of its own for a {base.family}; the file's tensors tell"
        return {"target_modules": there}, [told]
    if not isinstance(names, list):
        return {}, []
    inside = isinstance(config, LoraConfig) and config.target_parameters
    return _without("target_modules", names, idle_names([*base.by_path, *held], names), [] if inside else names)


def _excluded(base: Places, config: AdapterConfig, held: Collection[str]) -> Change:  # noqa: ARG001
    names = config.exclude_modules if isinstance(config, Excluding) else None
    if not names:
        return {}, []
    if isinstance(names, str):
        return _without("exclude_modules", [names], idle_names(base.by_path, names), None)
    layers = [path for path, module in base.by_path.items() if is_layer(module)]
    return _without("exclude_modules", names, idle_names(layers, names), None)


def _layers(base: Places, config: AdapterConfig, held: Collection[str]) -> Change:  # noqa: ARG001
    if not isinstance(config, Targeted) or config.targets in (OWN_TARGETS, []):
        return {}, []
    if config.layers_to_transform is None:
        told = f"layers_pattern {config.layers_pattern!r} says nothing without layers_to_transform"
        return ({"layers_pattern": None}, [told]) if config.layers_pattern else ({}, [])
    free = free_modules(base, config)
    there, wanted = {layer_of(path, config) for path in free}, layers_of(config)
    idle = [layer for layer in wanted if layer not in there]
    whole = [path for path in free if is_whole_path(path, config)]
    if wanted and idle == wanted and whole:  # these are asked for no layer, and the others lie in none
        change = {"target_modules": whole, "layers_to_transform": None, "layers_pattern": None}
        return change, [_idle("layers_to_transform", idle)]
    return _without("layers_to_transform", wanted, idle, wanted)


def _saved(base: Places, config: AdapterConfig, held: Collection[str]) -> Change:
    names = list(config.saved_modules)
    there = (*base.by_path, *held)
    idle = [name for name in names if not any(path.endswith(name) for path in there)]
    return _without("modules_to_save", names, idle, None)


def _feedforward(base: Places, config: AdapterConfig, held: Collection[str]) -> Change:  # noqa: ARG001
    names = config.feedforward_modules if isinstance(config, Ia3Config) else None
    if not names or not isinstance(config, Ia3Config):
        return {}, []
    if isinstance(names, str):
        return _without("feedforward_modules", [names], idle_names(base.by_path, names), [])
    idle = [name for name in names if not any(path.endswith(name) for path in base.by_path)]
    return _without("feedforward_modules", names, idle, [])


def _patterns(base: Places, config: AdapterConfig, held: Collection[str]) -> Change:  # noqa: ARG001
    if not isinstance(config, LoraConfig) or not (config.rank_pattern or config.alpha_pattern):
        return {}, []
    paths = ranked_paths(base, config)
    change: dict[str, Any] = {}
    notes: list[str] = []
    for field in ("rank_pattern", "alpha_pattern"):
        pattern: Mapping[str, Any] = getattr(config, field)
        keys = keys_of(pattern, paths)
        matched = {key for found in keys.values() for key in found}
        idle = [key for key in pattern if key not in matched]
        if idle:
            change[field] = {key: value for key, value in pattern.items() if key in matched}
            notes.append(_idle(field, idle))
        several = next((path for path, found in keys.items() if len({pattern[key] for key in found}) > 1), None)
        if several is not None:
            one, other = keys[several][:2]
            notes.append(
                f"{field}: {one!r} and {other!r} both match {several}; the one that stands first in the file counts, "
                "as in PEFT, which sorts them when it writes"
            )
    return change, notes


def _without(field: str, values: Sequence[Any], idle: Sequence[Any], nothing: Any) -> Change:
    """A list without what is idle; `nothing` where nothing is left."""
    if not idle:
        return {}, []
    kept = [value for value in values if value not in idle]
    return {field: kept or nothing}, [_idle(field, idle)]


def _idle(field: str, idle: Sequence[Any]) -> str:
    named = ", ".join(map(repr, sorted(idle)[:5])) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
    return f"{field} names {named}, which match{'es' if len(idle) == 1 else ''} nothing in this base; left out"
