"""What one kind of adapter folder says: the method's own keys in `adapter_config.json`, and its tensors' names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from topwork.adapters.graft import Adapters
from topwork.adapters.targets import matching

PREFIX = "base_model.model."
"""What PEFT puts before a module's path."""
PEFT_VERSION = "0.21.2"
"""The release whose files these equal."""


def with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> PEFT's."""
    return {PREFIX + key: tensor for key, tensor in tensors.items()}


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's names -> ours."""
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


@dataclass(frozen=True)
class Format:
    """How the adapters of one `peft_type` are written and read.

    keys      an adapter's name -> what its `adapter_config.json` says beside what all of them say
    options   those keys -> values for AdapterConfig; raises AdapterError, for a folder told by name, where they ask
              for what is not known here
    to_file   what `Adapters.stored` gives -> the file's tensors, and `from_file` the other way
    """

    peft_type: str | None
    keys: Callable[[Adapters, str], dict[str, Any]]
    options: Callable[[Mapping[str, Any], str], dict[str, Any]]
    to_file: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = with_prefix
    from_file: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = without_prefix


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


def sorted_or_none(names: list[str] | None) -> list[str] | None:
    """As PEFT's sets are written."""
    return sorted(names) if names else None
