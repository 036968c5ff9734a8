"""One adapter folded into a base that is not in memory: each weight when it is fetched, by the formulas of its parts
(`AdapterModule.merged`), in fp32, rounded once to the weight's type."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from topwork.adapters.graft import bare_base
from topwork.adapters.lazy_parts import LazyParts
from topwork.adapters.method import Method
from topwork.adapters.methods.full import TiedHead
from topwork.adapters.methods.lora.biases import BiasedLora
from topwork.adapters.methods.lora.embedding import TiedTokens
from topwork.adapters.methods.table import METHODS
from topwork.adapters.methods.virtual import VirtualTokens
from topwork.adapters.module import AdapterModule
from topwork.adapters.module_copy import ModuleCopy
from topwork.adapters.peft_format import SavedAdapter
from topwork.common.errors import AdapterError
from topwork.merging.fold import MERGEABLE, as_stored, folded, keeps_tie
from topwork.merging.rounding import Rounding
from topwork.models.lazy import LazyModel, LazyTensor, tie_as_stored
from topwork.models.stored_names import key_for, stored_names


def merged_lazily(
    model: LazyModel,
    skeleton: PreTrainedModel,
    saved: SavedAdapter,
    rounding: Rounding | None = None,
    methods: Mapping[str, Method[Any]] = METHODS,
) -> LazyModel:
    """A base with an adapter folded into it: the same tensors in the same types, changed ones when they are fetched.

    A head that was tied to the embedding and is no longer the same gets a tensor of its own, and the config says so.
    `skeleton` is the base on the meta device; `rounding` is told what storing each sum took. Raises AdapterError where
    the adapter does not fit the base or cannot be merged, NotStoredError where it changes what the files do not hold;
    fetching raises RunError for a sum that is not finite.
    """
    stored = Stored(model, skeleton)
    parts = LazyParts(bare_base(skeleton), saved, stored.tensor, methods)
    for path, part in parts.shapes.items():
        _refuse_unmergeable(path, part)
    apart = stored.tied and stored.splits(parts)
    changed = stored.take_apart() if apart else {}
    for path, part in parts.shapes.items():
        changed |= _changed(stored, parts, path, part, rounding)
    tensors = {key: changed.pop(key, tensor) for key, tensor in model.tensors.items() if not stored.repeats(key)}
    config = _untied(model.config) if apart else model.config
    return replace(model, tensors=tensors | changed, config=config)


class Stored:
    """A base's tensors by the names that they have in the model, with a head that may be the embedding's."""

    def __init__(self, model: LazyModel, skeleton: PreTrainedModel) -> None:
        tie_as_stored(skeleton, model)
        self.model, self.skeleton, self.modules = model, skeleton, dict(skeleton.named_modules())
        self.names = stored_names(skeleton, model.tensors)
        head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
        self.tied = head is not None and embedding is not None and head.weight is embedding.weight
        self.ends: tuple[str, ...] = ()
        """The names of a tied embedding's and head's weight."""
        if self.tied:
            self.ends = (_path(skeleton, embedding) + ".weight", _path(skeleton, head) + ".weight")

    def lazy(self, name: str) -> LazyTensor:
        """A parameter of the model. Raises NotStoredError where the files have it in another form."""
        own = (name, *self.ends) if name in self.ends else (name,)
        known = next((one for one in own if one in self.names.keys), name)
        return self.model.tensors[self.names.key(known, self.model.name)]

    def tensor(self, path: str, kind: str) -> Tensor | None:
        """A module's tensor, fetched; None where it has none."""
        module = self.modules.get(path)
        return self.lazy(f"{path}.{kind}").fetch() if isinstance(getattr(module, kind, None), Tensor) else None

    def key(self, name: str) -> str:
        """Under which key a parameter is stored, or is to be."""
        own = (name, *self.ends) if self.tied and name in self.ends else (name,)
        found = next((self.names.keys[known] for known in own if known in self.names.keys), None)
        return found or key_for(self.skeleton, name, self.model.tensors)

    def splits(self, parts: LazyParts) -> bool:
        """Whether these parts leave a tied embedding and head unlike."""
        embedding, head = [name.removesuffix(".weight") for name in self.ends]
        if any(isinstance(part, TiedHead | TiedTokens) for part in parts.shapes.values()):
            return False
        touched = embedding in parts.shapes or head in parts.shapes
        return touched and not keeps_tie(parts.shapes, parts.stored, embedding, head)

    def take_apart(self) -> dict[str, LazyTensor]:
        """A tied embedding and head as two tensors of their own, from here on."""
        self.tied = False
        return {self.key(name): self.lazy(name) for name in self.ends}

    def repeats(self, key: str) -> bool:
        """Whether a tied head stands beside the embedding once more."""
        return self.tied and key == self.names.keys.get(self.ends[1]) and self.ends[0] in self.names.keys


def _changed(
    stored: Stored, parts: LazyParts, path: str, part: AdapterModule, rounding: Rounding | None
) -> dict[str, LazyTensor]:
    """What a part changes, by key."""
    if isinstance(part, TiedTokens):
        return {}  # the embedding's part changes both
    module = stored.skeleton.get_submodule(path)
    if isinstance(part, ModuleCopy | TiedHead):
        fetch, kinds = _copied, list(part.state())
    else:
        fetch = _folded
        kinds = [kind for kind in ("weight", "bias") if isinstance(getattr(module, kind, None), Tensor)]
        kinds = [kind for kind in kinds if kind in part.merges]
    made = {}
    for kind in kinds:
        own = stored.lazy(f"{path}.{kind}")
        if own.dtype not in MERGEABLE:
            raise AdapterError(
                f"{path} is stored as {str(own.dtype).removeprefix('torch.')}, and an adapter is merged into a 16- or "
                "32-bit base; give the 16-bit model"
            )
        merged = fetch(stored, parts, path, kind, rounding)
        made[stored.key(f"{path}.{kind}")] = LazyTensor(own.shape, own.dtype, merged)
    return made


def _copied(
    stored: Stored, parts: LazyParts, path: str, kind: str, rounding: Rounding | None
) -> Callable[[], Tensor]:  # fmt: skip
    """The tensor of a module that was trained whole."""
    own, name = stored.lazy(f"{path}.{kind}"), f"{path}.{kind}"

    @torch.no_grad()
    def fetch() -> Tensor:
        exact = parts.stored(path, kind).float()
        found = as_stored(name, exact, own.dtype)
        if rounding is not None:
            rounding.add(name, exact, found, own.fetch())
        return found

    return fetch


def _folded(
    stored: Stored, parts: LazyParts, path: str, kind: str, rounding: Rounding | None
) -> Callable[[], Tensor]:  # fmt: skip
    """Weight or bias of a module with a part in it. The other of the two is fetched only for a part that needs it."""
    turned = isinstance(stored.skeleton.get_submodule(path), Conv1D)  # gpt2's, which holds its weight as [in, out]
    own = stored.lazy(f"{path}.{kind}")

    def weight() -> Tensor:
        found = stored.lazy(f"{path}.weight").fetch()
        return found.t() if turned else found

    @torch.no_grad()
    def fetch() -> Tensor:
        part, given = parts.part(path, weight), weight()
        exact = folded(part, given, own.fetch() if kind == "bias" else None)
        if kind == "bias":
            assert exact[1] is not None
            return as_stored(f"{path}.bias", exact[1], own.dtype)
        found = as_stored(f"{path}.weight", exact[0], own.dtype)
        if rounding is not None:
            rounding.add(f"{path}.weight", exact[0], found, given)
        return (found.t() if turned else found).contiguous()

    return fetch


def _refuse_unmergeable(path: str, part: AdapterModule) -> None:
    """Before anything is read. Raises AdapterError."""
    if isinstance(part, BiasedLora):
        part.refuse_lost(path)
    without = isinstance(part, VirtualTokens) or type(part).merged is AdapterModule.merged
    if without and not isinstance(part, ModuleCopy | TiedHead):
        part.merged(torch.empty(0), None)


def _path(model: PreTrainedModel, module: nn.Module) -> str:
    return next(path for path, there in model.named_modules() if there is module)


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """A config that has whoever reads the model keep head and embedding apart, its text part too."""
    changed = config | {"tie_word_embeddings": False}
    text = config.get("text_config")
    return changed | {"text_config": text | {"tie_word_embeddings": False}} if isinstance(text, dict) else changed
