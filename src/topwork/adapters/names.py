"""What a file calls its tensors -> what they are called here, whoever wrote it.

PEFT saves names without what DDP, FSDP, torch.compile and checkpointing put around modules, and without the adapter's
own name; a trainer that saves a model's state by itself leaves them in.

    base_model.model.model.layers.0.mlp.up_proj.lora_A.weight                           PEFT
    module.base_model.model._orig_mod.model.layers.0.mlp.up_proj.lora_A.default.weight  the same, saved by hand

`own_names` needs the file alone, `on_modules` a base's module paths; every reader of adapters goes through both.
Free of torch: what stands under a name is not looked at but where two would stand under one.
"""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from topwork.common.errors import AdapterError, quoted

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""What torch.compile, FSDP, checkpointing and DeepSpeed put around a module."""
AROUND = frozenset({"module", "model", "pretrained_model", "base_model"})
"""What may stand before PEFT's own prefix: DDP's, a trainer's, a value head's name for the whole."""
PREFIX = ["base_model", "model"]
"""What PEFT puts before a module's path."""
OUTER = frozenset({"model", "language_model", "transformer", "gpt_neox", "backbone", "base_model"})
"""What stands before the list of layers. A text model lies elsewhere in a model that sees pictures
(`model.language_model.layers`), and its layers come first where it was saved without its head (`layers`)."""
_NAMED = (
    re.compile(r"^(?P<path>.*\.lora_[AB])\.(?P<name>[^.]+)(?P<rest>\.(?:weight|bias))$"),
    re.compile(r"^(?P<path>.*\.lora_magnitude_vector)\.(?P<name>[^.]+)(?P<rest>)(?:\.weight)?$"),
    re.compile(r"^(?P<path>.*\.(?:lora_embedding_[AB]|ia3_l|trainable_tokens_delta))\.(?P<name>[^.]+)(?P<rest>)$"),
)
"""An adapter's name behind what is its own at a module."""
_PART = re.compile(
    r"\.(?:(?:base_layer|token_adapter)\.)*"
    r"(?:lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|trainable_tokens_delta|weight|bias)$"
)
"""What may stand behind a module's path."""
_SAVED, _BEFORE = ".modules_to_save.", ".original_module."


@dataclass(frozen=True)
class Named:
    """Tensors by our names, and what was otherwise in the file, for people."""

    tensors: dict[str, Any]
    changed: tuple[str, ...] = ()


def own_names(tensors: Mapping[str, Any], called: str) -> Named:
    """A file's tensors by our names, with its own base's paths. Nothing is left out but what is said twice.

    Raises AdapterError, for a file that is `called` so, where it holds several adapters, or two tensors that differ
    would have one name.
    """
    changed: set[str] = set()
    names: set[str] = set()
    plain = {key: _without_name(_unwrapped(key, changed), names) for key in tensors}
    if len(names) > 1:
        raise AdapterError(f"{called} holds several adapters ({', '.join(sorted(names))}); save the one you want alone")
    names |= _names_of_saved(plain.values()) if not names else set()
    found: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name = _at_its_module(plain[key], names)
        if name in found and not _same(found[name], tensor):
            raise AdapterError(
                f"{called}: two tensors that differ would be {quoted(name)}; one of them is {quoted(key)}"
            )
        found[name] = tensor
    changed |= {f"the adapter's name in tensors' names ({name})" for name in names}
    if any(_BEFORE in key and key.replace(_BEFORE, ".") in found for key in found):
        changed.add("the base's own modules beside the saved ones (original_module)")
    return Named(_without_before(found), tuple(sorted(changed)))


def on_modules(tensors: Mapping[str, Any], modules: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The same by the paths that a base's modules have, and {theirs: ours} of those that were others in the file.

    A path that the base has not is changed where one module alone is the same behind what stands before the layers
    (`OUTER`); else it stays, and the base will refuse it by name. Raises AdapterError where two would have one name.
    """
    known = set(modules)
    places = _by_inner(known)
    found: dict[str, Any] = {}
    moved: dict[str, str] = {}
    for key, tensor in tensors.items():
        path, place = _place(key, known, places)
        if place != path:
            moved[path] = place
        name = place + key[len(path) :]
        if name in found:
            raise AdapterError(f"two tensors would be {quoted(name)} in this base; one of them is {quoted(key)}")
        found[name] = tensor
    return found, moved


def split_name(key: str, modules: Container[str] = ()) -> tuple[str, str]:
    """A module's path, of those in a base or of any, and what stands behind it: what an adapter has there, or a
    parameter of the module's own. The path is empty where a name is of no module (`prompt_embeddings`)."""
    path, part = key.rpartition(".")[0], _PART.search(key)
    while path and path not in modules:
        path = path.rpartition(".")[0]
    if part is not None and part.start() > len(path):
        path = key[: part.start()]
    path = path or key.rpartition(".")[0]
    return path, key[len(path) + 1 :] if path else key


def _unwrapped(key: str, changed: set[str]) -> str:
    """Without wrappers, and without what PEFT and others put before the model's own path."""
    parts = key.split(".")
    kept = [part for part in parts if part not in WRAPPERS]
    wrapped = set(parts) - set(kept)
    prefixes = [at for at in range(len(kept) - 2) if kept[at : at + 2] == PREFIX and AROUND.issuperset(kept[:at])]
    if prefixes:
        wrapped |= set(kept[: prefixes[0]])
        kept = kept[prefixes[-1] + 2 :]
    while len(kept) > 1 and kept[0] == "module":
        wrapped.add(kept.pop(0))
    if wrapped:
        changed.add(f"wrappers ({', '.join(sorted(wrapped))})")
    if len(prefixes) != 1 and len(kept) > 1:
        changed.add("a prefix that is written twice" if prefixes else "a missing prefix, now there")
    return ".".join(kept)


def _without_name(key: str, names: set[str]) -> str:
    """Without the adapter's name, which is put with the `names`. DoRA's lengths are a module's `weight` to PEFT."""
    if key.endswith(".lora_magnitude_vector.weight"):
        return key.removesuffix(".weight")
    for pattern in _NAMED:
        if match := pattern.match(key):
            names.add(match["name"])
            return match["path"] + match["rest"]
    return key


def _names_of_saved(keys: Iterable[str]) -> set[str]:
    """The adapter's name in `head.modules_to_save.NAME.weight`, where no other key tells it: a module that is saved may
    have modules of its own, whose names stand there too."""
    rests = [key.partition(_SAVED)[2].split(".") for key in keys if _SAVED in key]
    firsts = {rest[0] for rest in rests if len(rest) > 1}
    alone = len(firsts) == 1 and all(len(rest) <= 2 for rest in rests)
    return firsts if alone else firsts & {"default"}


def _at_its_module(key: str, names: Container[str]) -> str:
    """`head.modules_to_save.weight` and `head.modules_to_save.NAME.weight` are `head.weight`; what lies below trained
    tokens is the base's own embedding."""
    path, saved, rest = key.partition(_SAVED)
    if not saved:
        return key.replace(".token_adapter.base_layer.", ".base_layer.")
    first, _, behind = rest.partition(".")
    return f"{path}.{behind if behind and first in names else rest}"


def _without_before(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Beside a module that was saved whole PEFT may write it as it was before, `head.original_module.weight`: what was
    saved says all. Without that it is a copy of the base's own."""
    return {
        key.replace(_BEFORE, ".base_layer."): tensor
        for key, tensor in tensors.items()
        if _BEFORE not in key or key.replace(_BEFORE, ".") not in tensors
    }


def _same(one: Any, other: Any) -> bool:
    return one is other or bool(one.shape == other.shape and one.dtype == other.dtype and one.equal(other))


def _place(key: str, known: Container[str], places: Mapping[str, str]) -> tuple[str, str]:
    """What of a name is a module's path in this base, or would be one with other outer modules; and that path."""
    path = key.rpartition(".")[0]
    while path and path not in known and _inner(path) not in places:
        path = path.rpartition(".")[0]
    return path, path if not path or path in known else places[_inner(path)]


def _inner(path: str) -> str:
    """Behind what stands before the layers."""
    parts = path.split(".")
    while parts and parts[0] in OUTER:
        parts = parts[1:]
    return ".".join(parts)


def _by_inner(paths: Iterable[str]) -> dict[str, str]:
    """The path of each module that is told from all others by what is behind."""
    found: dict[str, str | None] = {}
    for path in paths:
        inner = _inner(path)
        found[inner] = path if inner and inner not in found else None
    return {inner: path for inner, path in found.items() if path is not None}
