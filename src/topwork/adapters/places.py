"""A base as the choice of an adapter's places sees it: its modules' kinds and sizes, without weights and without torch.

A `Structure` (`models/structure.py`), which a config alone gives, is one; so is `Bare.seen`, of a base that is in
memory. What is chosen and counted in either is chosen and counted by the same functions.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from topwork.common.kinds import Kind, Matrix

Sizes = dict[str, tuple[int, ...]]
"""By the path of the module where a part goes: how many values each of its trained tensors has."""
CALLED: Mapping[Kind, str] = {
    "linear": "a linear layer", "embedding": "an embedding", "norm": "a norm", "other": "no layer with one weight",
}  # fmt: skip
"""For people."""


class Module(Protocol):
    """Fields as `models/structure.py` tells them."""

    @property
    def kind(self) -> Kind: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def bias(self) -> bool: ...
    @property
    def tensors(self) -> tuple[int, ...]: ...
    @property
    def attends(self) -> bool: ...
    @property
    def by_row(self) -> bool: ...
    @property
    def matrices(self) -> tuple[Matrix, ...]: ...


class Places(Protocol):
    """A base's modules by path, in its order, which of them are its embedding and its head, and whether this is tied to
    that; and what its attention keeps of a token. Of a base that reads pictures too they are those that text goes
    through, in the part at the path `text`; those that it never meets stand `beside`."""

    @property
    def by_path(self) -> Mapping[str, Module]: ...
    @property
    def embedding(self) -> str | None: ...
    @property
    def head(self) -> str | None: ...
    @property
    def tied(self) -> bool: ...
    @property
    def family(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def text(self) -> str: ...
    @property
    def beside(self) -> Mapping[str, Module]: ...


def inputs_outputs(module: Module) -> tuple[int, int]:
    """Of a linear layer; of an embedding its entries and its width."""
    return (module.rows, module.columns) if module.kind == "embedding" else (module.columns, module.rows)


def inside(base: Places, path: str) -> tuple[int, ...]:
    """Sizes of all tensors of a module and what is in it."""
    found = (module.tensors for at, module in base.by_path.items() if at == path or at.startswith(path + "."))
    return tuple(size for sizes in found for size in sizes)
