"""A base in memory as the choice of an adapter's places sees it (`places.py`): kinds and sizes, asked one by one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from topwork.common.kinds import Kind, Matrix
from topwork.common.text_part import part_around, reads_text
from topwork.quantization.kinds import embedding_shape, features, is_by_row, kind_of, matrices_of
from topwork.quantization.linear import PackedModule


@dataclass(frozen=True)
class Seen:
    """A module in memory, as `places.Module` asks for it."""

    module: nn.Module
    attends: bool

    @property
    def kind(self) -> Kind:
        """What kind of module it is."""
        return kind_of(self.module)

    @property
    def rows(self) -> int:
        """A linear layer's outputs, an embedding's entries."""
        return embedding_shape(self.module)[0] if self.kind == "embedding" else features(self.module)[1]

    @property
    def columns(self) -> int:
        """A linear layer's inputs, an embedding's width."""
        return embedding_shape(self.module)[1] if self.kind == "embedding" else features(self.module)[0]

    @property
    def bias(self) -> bool:
        """Whether a linear layer or a norm has one."""
        return self.kind in ("linear", "norm") and isinstance(getattr(self.module, "bias", None), nn.Parameter)

    @property
    def tensors(self) -> tuple[int, ...]:
        """How many values each of its own parameters has; a packed weight as many as what it stands for."""
        packed = self.module if isinstance(self.module, PackedModule) else None
        own = self.module.parameters(recurse=False)
        whole = None if packed is None else packed.shape[0] * packed.shape[1]
        return tuple(whole if packed is not None and p is packed.weight else p.numel() for p in own)  # type: ignore[misc]

    @property
    def by_row(self) -> bool:
        """Whether it has parameters, no modules inside, and takes every token's row by itself."""
        return any(True for _ in self.module.parameters(recurse=False)) and is_by_row(self.module)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Of experts and routers: those of its parameters that rows are multiplied with."""
        return matrices_of(self.module)


@dataclass(frozen=True)
class SeenBase:
    """A base in memory, as `places.Places` asks for it; `hf` is its Hugging Face config, where it has one."""

    by_path: Mapping[str, Seen]
    embedding: str | None
    head: str | None
    hf: Any
    text: str = ""
    beside: Mapping[str, Seen] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        if self.head is None or self.embedding is None or self.head == self.embedding:
            return False
        head, embedding = self.by_path[self.head].module, self.by_path[self.embedding].module
        return head.get_parameter("weight") is embedding.get_parameter("weight")

    @property
    def _text(self) -> Any:
        return self.hf.get_text_config()

    @property
    def family(self) -> str:
        """Its `model_type`."""
        return str(self._text.model_type)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self._text.num_hidden_layers)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys, and of values."""
        return int(getattr(self._text, "num_key_value_heads", None) or self._text.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return int(getattr(self._text, "head_dim", None) or self._text.hidden_size // self._text.num_attention_heads)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config's own values, those of the text part where it has several."""
        values: Mapping[str, Any] = self._text.to_dict()
        return values


def seen_base(
    modules: Mapping[str, nn.Module], embedding: str | None, head: str | None, hf: Any, everywhere: bool = False
) -> SeenBase:
    """A base's modules by path, and what its config says, seen so. `everywhere` is for an adapter from a file that has
    parts where pictures are read too: nothing stands beside then."""
    attending = {outer for path, module in modules.items() if hasattr(module, "layer_idx") for outer in _up(path)}
    seen = {path: Seen(module, path in attending) for path, module in modules.items()}
    if everywhere or hf is None or hf.get_text_config() is hf:
        return SeenBase(seen, embedding, head, hf)
    text = part_around(embedding, (path for path, one in seen.items() if one.kind == "linear"))
    read = {path: one for path, one in seen.items() if reads_text(path, text, head)}
    return SeenBase(read, embedding, head, hf, text, {path: seen[path] for path in seen if path not in read})


def _up(path: str) -> list[str]:
    """The path and those of the modules that it lies in."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
