"""Tensors of a PEFT adapter by the names that PEFT itself would have saved them under: without what DDP, FSDP,
torch.compile and checkpointing put around modules, without the adapter's own name, with one prefix."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from topwork.adapters.files import PREFIX
from topwork.adapters.peft_format import without_doubles
from topwork.common.errors import AdapterError, quoted

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_SAVED_WITH_NAME = (
    (re.compile(r"\.(lora_[AB])\.(?P<name>[^.]+)\.(weight|bias)$"), r".\1.\3"),
    (re.compile(r"\.(lora_embedding_[AB]|ia3_l)\.(?P<name>[^.]+)$"), r".\1"),
    (re.compile(r"\.(lora_magnitude_vector)\.(?P<name>[^.]+)\.weight$"), r".\1"),
    (re.compile(r"\.(trainable_tokens_delta)\.(?P<name>[^.]+)$"), r".\1"),
    (re.compile(r"\.modules_to_save\.(?P<name>[^.]+)\.(weight|bias)$"), r".\2"),
)
_BEFORE_THE_TEXT = "prompt_embeddings"
"""What prefix and prompt tuning learn: of no module, so PEFT puts nothing before it."""
_PARTS = re.compile(r"\.(lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|weight|bias)$")


def plain_names(called: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by PEFT's own names, and what was taken off them, for people. Raises AdapterError for a file of several
    adapters, and where two tensors would have one name."""
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    adapters: set[str] = set()
    for key, tensor in without_doubles(tensors).items():
        name = _unwrapped(key, taken)
        for pattern, plain in _SAVED_WITH_NAME:
            if match := pattern.search(name):
                adapters.add(match["name"])
                name = pattern.sub(plain, name)
        if ".original_module." in name:
            taken.add("the base's own modules beside the saved ones (original_module)")
            continue
        if name in found:
            raise AdapterError(f"{called}: two tensors would be {quoted(name)}; one of them is {quoted(key)}")
        found[name] = tensor
    if len(adapters) > 1:
        raise AdapterError(
            f"{called} holds several adapters ({', '.join(sorted(adapters))}); save the one you want alone"
        )
    taken |= {f"the adapter's name in tensors' names ({name})" for name in adapters}
    return found, sorted(taken)


def _unwrapped(key: str, taken: set[str]) -> str:
    parts = key.split(".")
    kept = [part for part in parts if part not in _WRAPPERS]
    while kept and kept[0] == "module":
        kept = kept[1:]
    if len(kept) < len(parts):
        taken.add(f"wrappers ({', '.join(sorted(set(parts) - set(kept)))})")
    name = ".".join(kept)
    bare = name
    while bare.startswith(PREFIX):
        bare = bare.removeprefix(PREFIX)
    if bare == _BEFORE_THE_TEXT:
        return bare
    if name != PREFIX + bare:
        taken.add("a prefix that is written twice" if name.startswith(PREFIX) else "a missing prefix, now there")
    return PREFIX + bare


def on_modules(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The same by the paths that a base's modules have: a text model inside of a larger one is elsewhere in it
    (`model.language_model.layers.0…`). A path is changed where one module alone ends like it, from the layer's list on;
    else it stays, and the base refuses it by name."""
    known, found, changed = set(modules), {}, set()
    for key, tensor in tensors.items():
        path, part = _split(key.removeprefix(PREFIX))
        place = path if path in known or not path else _elsewhere(path, known)
        if place != path:
            changed.add(f"{path} is {place} in this base")
        found[f"{PREFIX}{place}{part}" if place else key] = tensor
    return found, sorted(changed)[:1]


def _split(name: str) -> tuple[str, str]:
    match = _PARTS.search(name)
    return (name[: match.start()], name[match.start() :]) if match else ("", name)


def _elsewhere(path: str, known: Iterable[str]) -> str:
    parts = path.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    tail = ".".join(parts[max(0, number - 1) :])
    places = [module for module in known if module == tail or module.endswith(f".{tail}")]
    return places[0] if len(places) == 1 else path
