"""PEFT's IA3 folders: one tensor `ia3_l` a module, (out, 1) for outputs and (1, in) for feedforward modules."""

from collections.abc import Mapping
from typing import Any

from topwork.adapters.formats.format import Format, has_conv1d, names_of, peft_keys, sorted_or_none
from topwork.adapters.graft import Adapters, bare_modules
from topwork.adapters.ia3 import Ia3

READ = ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")


def _keys(adapters: Adapters, name: str) -> dict[str, Any]:
    """Names are written out, excluded modules left out of them already."""
    modules = bare_modules(adapters.model)
    parts = {path: part for path, part in adapters.parts(name).items() if isinstance(part, Ia3)}
    last = [path for path, part in parts.items() if part.scales_inputs]
    targets, feedforward = names_of(parts, modules), names_of(last, modules)
    endings = tuple(feedforward)  # as PEFT looks for them: any ending, and some of the targets by name
    found = {path for path in parts if endings and path.endswith(endings)}
    if found != set(last) or not set(feedforward) <= set(targets):
        targets, feedforward = sorted(parts), sorted(last)
    return {
        **peft_keys("IA3"),
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "exclude_modules": None,
        "modules_to_save": sorted_or_none(adapters.configs[name].modules_to_save),
        "fan_in_fan_out": has_conv1d(modules, parts),
        "init_ia3_weights": True,
    }


def _options(raw: Mapping[str, Any], folder: str) -> dict[str, Any]:  # noqa: ARG001
    return {"method": "ia3", **{key: raw[key] for key in READ if raw.get(key) is not None}}


IA3 = Format("IA3", _keys, _options)
