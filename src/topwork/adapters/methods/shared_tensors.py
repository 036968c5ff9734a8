"""Tensors that all layers of an adapter share, which PEFT writes once, behind no module's path.

Here each part says that it has them (`AdapterModule.state`), so that a part can be made by itself.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from topwork.adapters.files import with_prefix, without_prefix

ROOT = "base_model."
"""What PEFT puts before their names."""
Renaming = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def gathered(shared: Mapping[str, str]) -> Renaming:
    """For `Files.to_file`: our names -> PEFT's, each of the `shared` once."""

    def to_file(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {key: tensor for key, tensor in stored.items() if _last(key) not in shared}
        once = {ROOT + _last(key): tensor for key, tensor in stored.items() if _last(key) in shared}
        return with_prefix(own) | once

    return to_file


def spread(shared: Mapping[str, str]) -> Renaming:
    """For `Files.from_file`, the other way. `shared`: a tensor's name -> that of one which every part that has it
    learns."""

    def from_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = without_prefix({key: tensor for key, tensor in tensors.items() if not _is_shared(key, shared)})
        for name, beside in shared.items():
            if (tensor := tensors.get(ROOT + name)) is not None:
                paths = [key.removesuffix(f".{beside}") for key in own if key.endswith(f".{beside}")]
                own |= {f"{path}.{name}": tensor for path in paths}
        return own

    return from_file


def _is_shared(key: str, shared: Mapping[str, str]) -> bool:
    return key.removeprefix(ROOT) in shared


def _last(key: str) -> str:
    return key.rpartition(".")[2]
