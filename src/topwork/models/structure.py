"""What a base is made of, as planning sees it: modules and their sizes, no weights. Free of torch.

`models/structures/` gives it from a config.json alone, for the families that stand in its table, in a blink;
`models/structure_of.py` from a skeleton, for every model that transformers can build. Both give the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from topwork.common.kinds import Kind, Matrix
from topwork.common.text_part import reads_text


@dataclass(frozen=True)
class Module:
    """A module by its path, as `named_modules` gives it.

    rows, columns   a linear layer's outputs and inputs, an embedding's entries and width; 0 of others
    parameters      of its own and not of modules inside it; of tied ones, 0 where they do not stand first
    bias            whether a linear layer or a norm has one
    tensors         how many values each of its own parameters has, tied ones too; a bias stands last
    attends         whether it is an attention, or holds one: it mixes tokens of a sequence
    by_row          whether it has parameters, no modules inside, and takes every token's row by itself
    matrices        of experts and routers: those of its parameters that rows are multiplied with
    """

    path: str
    kind: Kind
    rows: int = 0
    columns: int = 0
    parameters: int = 0
    bias: bool = False
    tensors: tuple[int, ...] = ()
    attends: bool = False
    by_row: bool = False
    matrices: tuple[Matrix, ...] = ()

    @property
    def weights(self) -> int:
        """Values of a linear layer's or an embedding's weight, tied or not."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Structure:
    """A base: every module in the model's order, and the widths that decide what a pass keeps.

    inner            the width of an MLP, of all experts that a token visits
    fast             whether all decoder layers run through `models/fast.py`, which keeps less and is quicker
    checkpointable   how many decoder layers can be checkpointed
    config           the config's own values, those of the text part where it has several
    text             the path of the part that reads text, where others beside it read pictures; else empty
    """

    family: str
    modules: tuple[Module, ...]
    embedding: str | None
    head: str | None
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    context_length: int
    dtype: str
    fast: bool
    checkpointable: int
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)
    text: str = ""

    @cached_property
    def by_path(self) -> Mapping[str, Module]:
        """The modules that text goes through, by their paths: all but what reads pictures."""
        return {m.path: m for m in self.modules if reads_text(m.path, self.text, self.head)}

    @cached_property
    def beside(self) -> Mapping[str, Module]:
        """Those that it never meets."""
        return {module.path: module for module in self.modules if module.path not in self.by_path}

    @cached_property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return sum(module.parameters for module in self.modules)

    @cached_property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        head = None if self.head is None else self.by_path[self.head]
        return head is not None and head.parameters < head.weights
