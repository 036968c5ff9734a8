"""Adapters on disk: PEFT folders, `adapter_config.json` beside `adapter_model.safetensors`.

Keys, lists and tensors are sorted, so that one adapter always gives the same bytes. The base's id and fingerprint
stand in `topwork.json` beside them, which PEFT and vLLM do not read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from topwork.adapters.config import AdapterConfig, LoraConfig
from topwork.adapters.files import Grafted
from topwork.adapters.fitting import Parts, fill, fresh_parts, plan_on, state_of
from topwork.adapters.graft import Adapters
from topwork.adapters.joined_experts import with_joined_experts
from topwork.adapters.method import Bare, Method, Plan
from topwork.adapters.methods.table import METHODS
from topwork.adapters.names import on_modules, own_names
from topwork.adapters.on_base import Stored, placed_on, settled_on
from topwork.adapters.other_makes import CONFIG, OWN, TENSORS, other_config, other_make, pointer, told_pointer
from topwork.adapters.peft_options import FROM_WEIGHT, described, reading_notes
from topwork.adapters.ranks import RANK_AXIS
from topwork.adapters.read_again import check_written
from topwork.common.errors import AdapterError, quoted, shortened
from topwork.common.files import whole_file, write_json
from topwork.common.memory import out_of_memory
from topwork.common.os_errors import why
from topwork.common.paths import missed

SLACK_VALUES = 1 << 20
"""How many more than twice the file's values a plan may ask for and still be made, so that what is missing is named."""


@dataclass(frozen=True)
class BaseId:
    """Which base an adapter was trained on; the fingerprint is None for adapters that others wrote. `new_tokens` are
    those that the base's tokenizer got, and `vocabulary_size` the rows that its embedding and head have since, where
    they grew."""

    name: str | None
    fingerprint: str | None = None
    new_tokens: tuple[str, ...] = ()
    vocabulary_size: int | None = None

    def as_json(self) -> dict[str, Any]:
        """What topwork.json says of it."""
        grown = {"new_tokens": list(self.new_tokens), "vocabulary_size": self.vocabulary_size}
        told = {"base_model": self.name, "base_fingerprint": self.fingerprint}
        return told | ({name: value for name, value in grown.items() if value})


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from disk, not yet in a model. `path` is what errors call it, `notes` what is to be said of how
    it was read."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    base: BaseId
    path: Path | str
    notes: tuple[str, ...] = ()


def write_adapter(folder: Path, adapters: Adapters, name: str, base: BaseId) -> None:
    """Write adapter `name` as a PEFT folder; tensors in fp32. (What PEFT has no form for: `files.own_files`.)"""
    write_grafted(folder, adapters.grafted(name), adapters.bare(), base, adapters.methods)


def write_grafted(
    folder: Path, adapter: Grafted[Any], bare: Bare, base: BaseId, methods: Mapping[str, Method[Any]] = METHODS
) -> None:
    """The same of an adapter that need not stand in the model, with `bare`, its base. Raises RunError where what lies
    on the disk then is not what was to be written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = methods[adapter.config.method].files
    tensors = {key: tensor.cpu().contiguous() for key, tensor in files.to_file(adapter.state).items()}
    written = folder / CONFIG
    write_json(written, {**files.keys(adapter), "base_model_name_or_path": base.name})
    raw = _json(written)
    config = _config(_method(raw, str(folder), methods), raw, str(folder))
    with whole_file(folder / TENSORS) as file:  # `save` would hold all of it once more
        save_file(tensors, file, metadata={"format": "pt"})
        check_written(file, tensors, config, adapter, bare, methods)
    write_json(folder / OWN, base.as_json())


def read_adapter(folder: Path, methods: Mapping[str, Method[Any]] = METHODS) -> SavedAdapter:
    """Read a PEFT folder of one of the `methods`, whoever wrote it. Raises AdapterError naming what is missing or not
    supported."""
    if not folder.is_dir():
        near = missed(folder)
        raise AdapterError(
            f"no adapter folder at {folder}; give a folder with adapter_config.json, or a run's folder{near}"
        )
    raw = _json(folder / CONFIG)
    own = _json(folder / OWN) if (folder / OWN).exists() else {}
    return saved_adapter(raw, _tensors(folder), own, str(folder), methods)


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / TENSORS
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        told = (
            other_make(folder) if not file.exists() else pointer(file) or "the file is damaged: bring back a copy of it"
        )
        raise AdapterError(f"{folder} has no readable {TENSORS} ({why(error)}); {told}") from error


def saved_adapter(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], own: Mapping[str, Any], called: str,
    methods: Mapping[str, Method[Any]] = METHODS,
) -> SavedAdapter:  # fmt: skip
    """What the files of a folder say: adapter_config.json, adapter_model.safetensors, and `own`, topwork.json. It is
    `called` so in errors."""
    base = _base_id(raw, own)
    method = _method(raw, called, methods)
    named = own_names(tensors, called).tensors
    return SavedAdapter(_config(method, raw, called), method.files.from_file(named), base, called, reading_notes(raw))


def load_adapter(adapters: Adapters, name: str, saved: SavedAdapter, base: BaseId, force: bool = False) -> str | None:
    """Graft an adapter read from disk under `name`. Returns what is to be told of it, or None.

    Another base than the one it was trained on is refused with both names, unless `force`.
    """
    warning = check_base(saved, base, force)
    adapters.check_name(name)
    fit = fitted(adapters.bare(), saved, adapters.methods)
    adapters.put(name, fit.config, fit.parts)
    return "; ".join([*([warning] if warning else []), *fit.notes]) or None


def settle(saved: SavedAdapter, bare: Bare) -> SavedAdapter:
    """An adapter read from disk as it is meant in this base (`settling.py`), with notes of what its config names that
    is not there. Raises AdapterError where no module is left for it, or where its tensors have other ranks."""
    named, moved = on_modules(saved.tensors, bare.modules)
    named = with_joined_experts(bare.seen, named)
    config, notes = settled_on(bare, saved.config, named, moved, str(saved.path))
    return replace(saved, config=config, tensors=named, notes=_once(saved.notes, notes))


def _once(*notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for some in notes for note in some))


def placed(
    saved: SavedAdapter, bare: Bare, stored: Stored | None = None, without_copies: bool = False
) -> SavedAdapter:  # fmt: skip
    """The same adapter by this base's names, with options that name all that its file holds (`on_base.py`). `stored`
    gives the base's own tensors; `without_copies` leaves out copies of them unseen, where they do not matter. Raises
    AdapterError for what the base cannot take."""
    how = (str(saved.path), stored, without_copies)
    config, tensors, notes = placed_on(bare, saved.config, saved.tensors, *how)
    return replace(saved, config=config, tensors=tensors, notes=_once(saved.notes, notes))


def stored_in(bare: Bare) -> Stored:
    """A base's own tensors, where they are in memory."""

    def stored(path: str, kind: str) -> Tensor | None:
        found = getattr(bare.modules.get(path), kind, None)
        return found.detach().cpu() if isinstance(found, Tensor) else None

    return stored


class Fitted(NamedTuple):
    """An adapter as it goes into a base: its options there, its parts, and what is to be said of how it was read."""

    config: AdapterConfig
    parts: Parts
    notes: tuple[str, ...]


def fitted(bare: Bare, saved: SavedAdapter, methods: Mapping[str, Method[Any]] = METHODS) -> Fitted:
    """An adapter read from disk, as it goes into this base; the base's model is not changed by it.

    Raises AdapterError where config, tensors and base do not fit one another.
    """
    saved = placed(saved, bare, stored_in(bare))
    plan = plan_on(bare.for_file(saved.tensors), saved.config, methods)
    refuse_more_than_file(plan, saved)
    parts = fresh_parts(bare, plan)
    fill(parts, with_beginnings(saved.config, saved.tensors, state_of(parts)))
    return Fitted(saved.config, parts, saved.notes)


def fill_from(saved: SavedAdapter, parts: Parts, bare: Bare) -> None:
    """Set parts that were made for this base from what was read from disk. Raises AdapterError where they do not fit;
    nothing is set then."""
    here = placed(saved, bare, stored_in(bare))
    fill(parts, with_beginnings(here.config, here.tensors, state_of(parts)))


def fitted_shapes(bare: Bare, saved: SavedAdapter, methods: Mapping[str, Method[Any]] = METHODS) -> Parts:
    """The same on a skeleton without weights, for what is in the file alone: parts that lack what is computed from the
    base. Raises AdapterError also for a file with a copy of the base's own head or embedding, which nobody can compare.
    """
    saved = placed(saved, bare)
    plan = plan_on(bare.for_file(saved.tensors), saved.config, methods)
    refuse_more_than_file(plan, saved)
    parts = {path: planned.make() for path, planned in plan.items()}
    fill(parts, saved.tensors)
    return parts


def refuse_more_than_file(plan: Plan, saved: SavedAdapter) -> None:
    """Before anything is made: a rank of a billion is one number in a config."""
    planned, there = sum(p.trained for p in plan.values()), sum(t.numel() for t in saved.tensors.values())
    if planned > 2 * there + SLACK_VALUES:
        raise AdapterError(
            f"{saved.path}: adapter_config.json asks for {planned:,} values in this base, and the file beside it holds "
            f"{there:,}; they do not belong together"
        )


def with_beginnings(
    config: AdapterConfig, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:  # fmt: skip
    """PEFT's PiSSA and OLoRA folders hold A and B alone, for a base that lacks what they began as; a fresh adapter here
    has found that again from the base (`methods/lora/inits.py`): the second half of its A and B. `config` is what was
    read with the tensors: no other beginning is added to."""
    found = dict(tensors)
    if not isinstance(config, LoraConfig) or config.init_lora_weights not in FROM_WEIGHT:
        return found
    for key, tensor in tensors.items():
        axis = next((axis for name, axis in RANK_AXIS.items() if key.endswith(f".{name}")), None)
        if axis is None or key not in own or tensor.dim() != 2:
            continue
        if 2 * tensor.shape[axis] == own[key].shape[axis]:
            found[key] = torch.cat([tensor, own[key].chunk(2, axis)[1].to(tensor)], axis)
    return found


def check_base(saved: SavedAdapter, base: BaseId, force: bool = False, shown: str | None = None) -> str | None:
    """AdapterError where the adapter is known to be another base's; a warning where nobody can tell. `shown` is what
    messages call the base, whose name may be a path."""
    theirs, ours = saved.base, base
    _refuse_other_tokens(saved, base)
    named, own = shortened(repr(theirs.name), 200), repr(shown if shown is not None else ours.name)
    if theirs.fingerprint and ours.fingerprint:
        if theirs.fingerprint == ours.fingerprint:
            return None
        why = "their weights differ"
    elif theirs.name == ours.name:
        return None
    elif _is_hub_id(theirs.name) and _is_hub_id(ours.name):
        why = "their names differ"
    else:
        return f"{saved.path} names the base {named}; whether that is {own} cannot be told from it"
    told = f"{saved.path} was trained on {named}, and this base is {own} ({why})"
    if force:
        return told + "; loaded all the same, as you asked"
    raise AdapterError(f"{told}. Load it onto its own base, or pass force=True (--force) if you know them to be alike.")


def _refuse_other_tokens(saved: SavedAdapter, base: BaseId) -> None:
    """New tokens get their ids in order: those of an adapter have to be the first that the base got, or it would be
    given another's rows."""
    theirs, ours = saved.base.new_tokens, base.new_tokens
    if theirs and ours and ours[: len(theirs)] != theirs:
        raise AdapterError(
            f"{saved.path} was trained with the new tokens {_listed(theirs)}, and this base has {_listed(ours)}; open "
            "them apart, each over a base of its own"
        )


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(map(quoted, tokens[:5])) + (f" and {len(tokens) - 5} more" if len(tokens) > 5 else "")


def _is_hub_id(name: str | None) -> bool:
    return bool(name) and name.count("/") == 1 and not name.startswith((".", "/", "~"))  # type: ignore[union-attr]


def _base_id(raw: Mapping[str, Any], own: Mapping[str, Any]) -> BaseId:
    tokens, rows = own.get("new_tokens"), own.get("vocabulary_size")
    return BaseId(
        _text(raw.get("base_model_name_or_path")),
        _text(own.get("base_fingerprint")),
        tuple(token for token in tokens if isinstance(token, str)) if isinstance(tokens, list) else (),
        rows if isinstance(rows, int) and rows > 0 else None,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _method(raw: Mapping[str, Any], called: str, methods: Mapping[str, Method[Any]]) -> Method[Any]:
    """By `topwork_method`, or by PEFT's type in folders that others wrote."""
    by_type = {kind: method for method in methods.values() for kind in method.files.types}
    if (other := other_config(raw)) is not None:
        raise AdapterError(f"{called} {other}")
    name, kind = raw.get("topwork_method"), raw.get("peft_type")
    found = methods.get(str(name)) if name is not None else by_type.get(str(kind))
    if found is None:
        told = f"of method {quoted(name)}" if name is not None else f"of peft_type {shortened(str(kind), 80)}"
        own = [name for name, method in methods.items() if not method.files.types]
        raise AdapterError(
            f"{called} holds an adapter {told}; {', '.join(sorted(by_type))} can be read, and what Topwork writes of "
            f"{', '.join(sorted(own))}. For a method of one's own give its record: methods=METHODS | {{…}}"
        )
    return found


def _config(method: Method[Any], raw: Mapping[str, Any], called: str) -> AdapterConfig:
    options = method.files.options(raw, called)
    return described(method.config, method.files.peft_type or method.name, options, f"{called}/adapter_config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({why(error)}); {other_make(path.parent)}") from error
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        if (told := told_pointer(path.name, data)) is not None:
            raise AdapterError(f"{path.parent}: {told}") from error
        raise AdapterError(f"{path} is not JSON ({error}); bring back a copy of it, or of the whole folder") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds no JSON object")
    return value
