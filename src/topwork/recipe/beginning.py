"""`adapter.init_from`: the options of an adapter that begins with another's weights. Free of torch, like the recipe.

What is left out is taken from there, what is given has to agree. Of a run it is the run's recipe that tells, and its
chat template comes along, since an adapter that has learned one would be spoiled by another.
"""

import json
import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from topwork.adapters.config import CONFIGS, AdapterConfig
from topwork.adapters.kept_together import with_tied_head
from topwork.adapters.other_makes import TENSORS
from topwork.adapters.peft_options import FROM_WEIGHT, config_in
from topwork.common.errors import AdapterError, RecipeError
from topwork.common.paths import missed
from topwork.reporting.sweep_state import SWEEP

INIT = "init_from"
FREE = {INIT, "lora_dropout"}
"""Options that may be others than before: they are about training alone."""
CHOOSING = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
"""Options that say in other words which modules: whether they mean the same is told by the tensors, on the base."""
CONFIG, RECIPE, ORIGIN, TEMPLATE = "adapter_config.json", "recipe.yaml", "provenance.json", "chat_template.jinja"
_CHECKPOINT = re.compile(r"step-\d+")


def with_beginning(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's values with what `adapter.init_from` decides filled in; a run that is gone on with has its own copy,
    so that the place it began from may be gone. Raises RecipeError and AdapterError."""
    section = values.get("adapter")
    named = section.get(INIT) if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(named, str):
        return values
    place = Path(named)
    if not place.exists():
        return _of_own_run(values, section, named, folder)
    _refuse_inside(place, values)
    run = run_of(place)
    own, called = _options(place, run), f"{named} (adapter.{INIT})"
    laid = {**values, "adapter": {**_agreed(section, own, called), INIT: str(place.resolve())}}
    return laid if run is None else {**laid, "data": _as_read_by(run, values.get("data"))}


def run_of(place: Path) -> Path | None:
    """The run that a folder is, or is the adapter or a checkpoint of; None for an adapter alone."""
    above = place.absolute()
    if above.name == "adapter" and not (above / RECIPE).is_file():
        above = above.parent
    if _CHECKPOINT.fullmatch(above.name) and above.parent.name == "checkpoints":
        above = above.parents[1]
    holds = (above / RECIPE).is_file() and any((above / name).is_dir() for name in ("adapter", "checkpoints"))
    return above if holds else None


def chosen_otherwise(config: AdapterConfig, place: Path) -> str:
    """What chooses other modules than in the adapter at a place, for people: '; …', or an empty string."""
    own = _options(place, run_of(place))
    told = [
        f"adapter.{key} is {getattr(config, key)!r} here and {getattr(own, key)!r} there"
        for key in sorted(CHOOSING)
        if getattr(config, key, None) != getattr(own, key, None)
    ]
    return f"; {', '.join(told)}" if told else ""


def _refuse_inside(place: Path, values: Mapping[str, Any]) -> None:
    out, inside = _output(values).resolve(), place.resolve()
    if out == inside or out in inside.parents:
        raise RecipeError(
            f"adapter.{INIT} {place} lies in the run's own output_dir, which would be overwritten; name another "
            "output_dir"
        )


def _output(values: Mapping[str, Any]) -> Path:
    named = values.get("output_dir")
    return Path(named if isinstance(named, str) else "runs/run")


def _of_own_run(values: dict[str, Any], section: dict[str, Any], named: str, folder: Path) -> dict[str, Any]:
    """What the run in output_dir wrote down when it began from the same place, which is gone."""
    places = {str((place / named).resolve()) for place in (folder, Path())}
    out, before = _begun_alike(_output(values), folder, places)
    if out is None:
        raise RecipeError(
            f"adapter.{INIT}: {named} is not there{missed(named) or '; give a run of `topwork train` or a PEFT folder'}"
        )
    stored = before["adapter"]
    own = _config({key: value for key, value in stored.items() if key != INIT}, str(out / RECIPE))
    laid = {**values, "adapter": {**_agreed(section, own, str(out / RECIPE)), INIT: stored[INIT]}}
    laid["data"] = _as_before(values.get("data"), before.get("data") or {}, stored[INIT], out)
    return laid


def _as_before(given: Any, before: Mapping[str, Any], place: str, run: Path) -> Any:
    """`data` with the template that a run has kept, where it was that of the place it began from."""
    stored, named = run / TEMPLATE, before.get("chat_template")
    own = isinstance(given, dict) and given.get("chat_template") in (None, named)
    if not own or not stored.is_file() or not _of_place(place, before):
        return given
    way = {name: before[name] for name in ("separator", "chat_template_kwargs", "fold_system") if name in before}
    return {**given, **way, "chat_template": str(stored.resolve())}


def _begun_alike(out: Path, folder: Path, places: set[str]) -> tuple[Path | None, dict[str, Any]]:
    """The run in output_dir, or whose own recipe it is, or one of the same sweep, which began from one of these places,
    and its recipe."""
    members = out.parent.glob("*" if (out.parent / SWEEP).is_file() else f"{escape(out.name)}*/*")
    for run in (out, folder, *sorted(members)):
        before = _recipe_of(run) if all((run / name).is_file() for name in (RECIPE, ORIGIN)) else {}
        if (before.get("adapter") or {}).get(INIT) in places:
            return run, before
    return None, {}


def _of_place(place: str, data: Mapping[str, Any]) -> bool:
    """Whether rows are read by the template of the run that a place is, or is the adapter or a checkpoint of."""
    template = Path(str(data.get("chat_template")))
    return template.name == TEMPLATE and template.parent in (Path(place), *Path(place).parents)


def _recipe_of(run: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((run / RECIPE).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{run / RECIPE} cannot be read ({error})") from error
    return values if isinstance(values, dict) else {}


def _options(place: Path, run: Path | None) -> AdapterConfig:
    """What the adapter at a place is."""
    if run is not None:
        section = {key: value for key, value in (_recipe_of(run).get("adapter") or {}).items() if key != INIT}
        return _config(section, str(run / RECIPE))
    inner = place / "adapter"
    found = inner if (inner / CONFIG).is_file() and not (place / CONFIG).is_file() else place
    if not (found / CONFIG).is_file():
        several = sorted(path.parent.name for path in place.glob(f"*/{CONFIG}")) if place.is_dir() else []
        hint = f"it holds {', '.join(several)}: give one of them" if several else "give one of the two"
        raise RecipeError(
            f"adapter.{INIT}: {place} is neither a run of `topwork train` with an adapter or a checkpoint, nor a PEFT "
            f"folder (no {CONFIG}); {hint}"
        )
    try:
        raw = json.loads((found / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{found / CONFIG} cannot be read ({error})") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{found / CONFIG} holds no JSON object")
    return with_tied_head(config_in(raw, str(found)), raw, found / TENSORS)


def _config(section: dict[str, Any], called: str) -> AdapterConfig:
    try:
        return AdapterConfig(**section)
    except ValidationError as error:
        raise AdapterError(f"{called} has no adapter that can be begun from: {error}") from error


def _agreed(section: Mapping[str, Any], own: AdapterConfig, called: str) -> dict[str, Any]:
    """The options of both together. Raises RecipeError naming those that differ."""
    given = {key: value for key, value in section.items() if key != INIT}
    if given.get("method") == "dora":
        given |= {"method": "lora", "use_dora": True}
    theirs = own.model_dump(exclude={INIT})
    if given.get("method", own.method) != own.method:
        raise RecipeError(f"adapter.method is {given['method']} here and {own.method} in {called}; leave it out")
    merged = {**theirs, **given}
    differ = [key for key in given if key in theirs and key not in FREE | CHOOSING and not _same(key, merged, theirs)]
    if differ:
        told = "; ".join(f"adapter.{key} is {given[key]!r} here and {theirs[key]!r} in {called}" for key in differ)
        raise RecipeError(
            f"{told}, with whose weights it begins; leave {'it' if len(differ) == 1 else 'them'} out, or begin anew "
            f"without adapter.{INIT}"
        )
    if merged.get("init_lora_weights") == "loftq":  # what quantizing lost is in the weights already
        merged["init_lora_weights"] = True
    return merged


def _same(key: str, merged: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether an option means what it meant."""
    if key == "init_lora_weights" and merged[key] is True and theirs[key] not in FROM_WEIGHT:
        return True
    try:
        values = [getattr(CONFIGS[merged["method"]](**{**theirs, key: each[key]}), key) for each in (merged, theirs)]
    except ValidationError:
        return True  # the recipe's own check tells what is wrong with it
    one, other = (sorted(value) if isinstance(value, list) else _in_order(value) for value in values)
    return bool(one == other)


def _in_order(value: Any) -> Any:
    """Of patterns the first that matches counts."""
    return list(value.items()) if isinstance(value, dict) else value


def _as_read_by(run: Path, given: Any) -> Any:
    """The recipe's `data` with the run's own chat template, where it names no other: separator and variables stand in
    that file."""
    stored, theirs = run / TEMPLATE, _recipe_of(run).get("data") or {}
    if not isinstance(given, dict) or not stored.is_file() or given.get("chat_template") is not None:
        return given
    own = {"separator": "", "chat_template_kwargs": {}}
    if any(given.get(name) not in (None, empty, theirs.get(name, empty)) for name, empty in own.items()):
        return given
    fold = {} if given.get("fold_system") is not None else {"fold_system": bool(theirs.get("fold_system"))}
    return {**given, **own, **fold, "chat_template": str(stored.resolve())}
