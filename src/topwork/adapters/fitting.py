"""An adapter's parts, planned, made and filled, before they stand in a model: nothing here changes the model, so it may
be done while the model runs, on another thread (`Adapters.put` is what takes them)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from topwork.adapters.config import AdapterConfig
from topwork.adapters.method import Bare, Method, Plan
from topwork.adapters.methods.table import METHODS
from topwork.adapters.misfits import misfit
from topwork.adapters.module import AdapterModule
from topwork.adapters.module_copy import planned_copy
from topwork.adapters.places import inside
from topwork.adapters.settling import begun
from topwork.adapters.targets import find_saved, refuse_overlap
from topwork.common.errors import AdapterError
from topwork.common.heap import trim_heap

Parts = dict[str, AdapterModule]
"""By the path of the module where each goes."""


def plan_on(bare: Bare, config: AdapterConfig, methods: Mapping[str, Method[Any]] = METHODS) -> Plan:
    """Which parts `config` would put into a base, by path; nothing is made, so a skeleton without weights will do.

    Raises AdapterError where it does not fit the base, or is of a method that is not among `methods`.
    """
    if config.method not in methods:
        raise AdapterError(
            f"method {config.method} is not known here; {', '.join(methods)} are. One of your own is given with its "
            f"record: methods=METHODS | {{{config.method!r}: …}}"
        )
    config = begun(bare.seen, config)
    plan = methods[config.method].plan(bare, config)
    saved = find_saved(bare.seen, config.saved_modules)
    refuse_overlap(list(plan), saved)
    return plan | {path: planned_copy(bare.modules[path], sum(inside(bare.seen, path))) for path in saved}


TRIMMED_AFTER = 1 << 24
"""Values of weights that parts were begun from. PiSSA and OLoRA take each apart in fp32, and the small parts that stay
settle among what that leaves free: SmolLM2's heap grew by 550 MiB."""


def fresh_parts(bare: Bare, plan: Plan, seed: int = 0) -> Parts:
    """Parts with their first weights, where their modules are; dropout off."""
    parts: Parts = {}
    passed = 0
    for path, planned in plan.items():
        part, base_layer = planned.make(), bare.modules[path]
        part.reset_parameters(base_layer, seed, path)
        parts[path] = part.to(_device_of(base_layer)).train(False)
        passed += sum(parameter.numel() for parameter in base_layer.parameters(recurse=False))
        if passed > TRIMMED_AFTER:
            trim_heap()
            passed = 0
    return parts


def parameters_of(parts: Mapping[str, AdapterModule]) -> dict[str, nn.Parameter]:
    """The trainable tensors by PEFT's names without the `base_model.model.` in front, sorted."""
    found = {key_of(path, key): p for path, part in parts.items() for key, p in part.tensors().items()}
    return dict(sorted(found.items()))


def state_of(parts: Mapping[str, AdapterModule]) -> dict[str, Tensor]:
    """What the adapter's file holds, by the same names, sorted."""
    found = {key_of(path, key): t for path, part in parts.items() for key, t in part.state().items()}
    return dict(sorted(found.items()))


def fill(parts: Mapping[str, AdapterModule], tensors: Mapping[str, Tensor]) -> None:
    """Set the parts' tensors from what `state_of` gave. Raises AdapterError naming what does not fit, by its kind;
    nothing is set then."""
    tensors = checked(state_of(parts), tensors)
    with torch.no_grad():
        for path, part in parts.items():
            part.load_state({key: tensors[key_of(path, key)] for key in part.state()})


def checked(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by our names, as `own`, what `state_of` gives, has them. Raises AdapterError as `fill` does."""
    tensors = _placed(tensors, own)
    told = misfit(own, tensors)
    if told is not None:
        raise AdapterError(f"the adapter's tensors do not fit this base: {told}")
    return tensors


def freeze(parts: Mapping[str, AdapterModule], bare: Bare, dtype: torch.dtype) -> None:
    """For parts that will only be run, over a base of `dtype`: what is multiplied in the base's type is held in it,
    what follows from weights alone is computed once, nothing learns any more. What they give stays the same to the
    bit; they can't be written or merged from then on."""
    for path, part in parts.items():
        part.freeze(bare.modules[path], dtype)


def held_bytes(parts: Mapping[str, AdapterModule]) -> int:
    """What their tensors take in memory."""
    tensors = {t.data_ptr(): t.nbytes for part in parts.values() for t in part.held()}
    return sum(tensors.values())


def _device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _placed(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By our names: PEFT's `prompt_embeddings` stands in the file without the path that it has here."""
    places = {key.rpartition(".")[2]: key for key in own}
    return {key if "." in key or key in own else places.get(key, key): tensor for key, tensor in tensors.items()}


def key_of(path: str, key: str) -> str:
    """PEFT's name, without the `base_model.model.` in front, of what a part calls `key`."""
    return f"{path}.{key}" if path else key
