"""What one method's folders say: its own keys in `adapter_config.json`, and its tensors' names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from topwork.adapters.config import AdapterConfig
from topwork.adapters.module import AdapterModule
from topwork.adapters.peft_options import own_names, own_options
from topwork.adapters.targets import matching

PREFIX = "base_model.model."
"""What PEFT puts before a module's path."""
PEFT_VERSION = "0.21.2"
"""The release whose files these equal."""

Config = TypeVar("Config", bound=AdapterConfig)


def with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> PEFT's."""
    return {PREFIX + key: tensor for key, tensor in tensors.items()}


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's names -> ours."""
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


@dataclass(frozen=True)
class Grafted(Generic[Config]):
    """An adapter as it stands in a base: its parts by path, what its file holds of them (`Adapters.state`), the base's
    own modules by path and its Hugging Face config; of a base that reads pictures too the path of the part that reads
    text."""

    config: Config
    parts: Mapping[str, AdapterModule]
    state: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    base_config: Any
    text: str = ""


@dataclass(frozen=True)
class Files(Generic[Config]):
    """How a method's folders are written and read.

    peft_type  what PEFT calls it; None for what it has no form for, which is told by `topwork_method` in the file
    keys       what its `adapter_config.json` says beside what all of them say
    options    those keys -> the method's options; raises AdapterError, for a folder told by name, where they ask for
               what is not known here
    to_file    what `Adapters.state` gives -> the file's tensors, and `from_file` the other way
    also       other types of PEFT's whose folders are read so
    """

    peft_type: str | None
    keys: Callable[[Grafted[Config]], dict[str, Any]]
    options: Callable[[Mapping[str, Any], str], dict[str, Any]]
    to_file: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = with_prefix
    from_file: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = without_prefix
    also: tuple[str, ...] = ()

    @property
    def types(self) -> tuple[str, ...]:
        """Every type that is read."""
        return self.also if self.peft_type is None else (self.peft_type, *self.also)


def own_files(kind: type[Config]) -> Files[Config]:
    """Files of a method that PEFT has no form for.

    `adapter_model.safetensors` holds the tensors by the names that they have in the Hugging Face model, so those of a
    full fine-tuning load as a state dict with `strict=False`. `adapter_config.json` says `"peft_type": null`, the
    method as `topwork_method`, and its options.
    """
    method, names = kind.model_fields["method"].default, own_names(kind)

    def keys(adapter: Grafted[Config]) -> dict[str, Any]:
        own = {name: getattr(adapter.config, name) for name in names}
        return {"peft_type": None, "topwork_method": method, "task_type": "CAUSAL_LM", **own}

    return Files(None, keys, own_options(kind), to_file=dict, from_file=dict)


def peft_keys(peft_type: str) -> dict[str, Any]:
    """What PEFT writes in every folder of a causal language model's adapter."""
    return {
        "auto_mapping": None, "inference_mode": True, "peft_type": peft_type, "peft_version": PEFT_VERSION,
        "revision": None, "task_type": "CAUSAL_LM",
    }  # fmt: skip


def has_conv1d(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> bool:
    """PEFT's `fan_in_fan_out`: whether weights are held as [in, out]."""
    return any(isinstance(modules[path], Conv1D) for path in paths)


def names_of(paths: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The fewest last names that choose exactly these modules, or the paths where names can't."""
    wanted, everything = set(paths), list(modules)
    for count in (1, 2):
        names = sorted({".".join(path.split(".")[-count:]) for path in wanted})
        if set(matching(everything, names)) == wanted:
            return names
    return sorted(wanted)


def sorted_or_none(names: Iterable[str] | None) -> list[str] | None:
    """As PEFT's sets are written."""
    return sorted(names) if names else None
