"""The values of a sweep's axes: lists, ranges and log-ranges as people write them, and the keys they may stand for."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from hashlib import sha256
from typing import Any, get_args

import yaml

from topwork.common.errors import RecipeError
from topwork.recipe.places import named_here
from topwork.recipe.recipe import all_keys, key_hint, options_at

SEED = "training.seed"
"""The axis over which results are averaged."""
SHARED = (
    "output_dir", "training.tokens_per_pass", "training.activation_checkpointing", "training.threads",
    "training.report_to",
)  # fmt: skip
"""Beside the sections below, what is the same in all members of a sweep."""
SHARED_SECTIONS = {"model": "one base", "quantization": "one base", "evaluation": "the rows they are scored on"}
MOST_VALUES = 1000
LOG_DIGITS = 3
"""Significant digits of the values of a log-range."""
LONGEST_VALUE = 48
"""Longer values are cut in a folder's name."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*(?:([:*])\s*({_NUMBER}))?\s*")
_NAMES = re.compile(r"\w[\w.]*(?:\+\w[\w.]*)+")


@dataclass(frozen=True)
class Variant:
    """One value of an axis: as shown and plotted, in a folder's name, and the recipe's keys that it sets."""

    shown: Any
    name: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """What differs between members. `label` is a recipe's key, or what a ready experiment calls it."""

    label: str
    variants: tuple[Variant, ...]


def parse_grid(texts: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUES` as given to --grid, by key. Raises RecipeError."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals or not key or not values.strip():
            raise RecipeError(f"--grid {text!r}: expected KEY=VALUES, for example adapter.r=2,4,8 or r's range 2..8:2")
        if key in found:
            raise RecipeError(f"--grid names {key} twice; give all its values at once: {key}={found[key]},{values}")
        found[key] = values
    return found


def grid_axes(grid: dict[str, Any], here: Collection[str] = ()) -> list[Axis]:
    """An axis for every key. The paths of the keys in `here`, which the command line names, are looked for in the
    current folder first. Raises RecipeError for keys that do not exist or cannot differ, and for bad values."""
    for key in grid:
        check_key(key)
    short = {key: key.rpartition(".")[2] for key in grid}
    shorts = list(short.values())
    axes = [
        _axis(key, short[key] if shorts.count(short[key]) == 1 else key, axis_values(key, spec))
        for key, spec in grid.items()
    ]
    return [_placed_here(axis) if axis.label in here else axis for axis in axes]


def seed_axis(count: int) -> Axis:
    """Seeds 0 to count - 1."""
    return _axis(SEED, "seed", list(range(count)))


def check_key(key: str) -> None:
    """Whether members may differ in `key`. Raises RecipeError with the nearest key that exists."""
    *parents, last = key.split(".")
    if key not in all_keys():
        raise RecipeError(f"the grid has an unknown key {key!r}{key_hint(parents, last)}")
    if parents and parents[0] in SHARED_SECTIONS:
        raise RecipeError(
            f"the grid has {key!r}, but the members of a sweep share {SHARED_SECTIONS[parents[0]]}; run a sweep for "
            "each value with --set"
        )
    if key in SHARED:
        raise RecipeError(f"the grid has {key!r}, which is the same for all members; set it for the sweep with --set")


def axis_values(key: str, spec: Any) -> list[Any]:
    """The values that a grid gives to `key`: a list, one value, or text with a list (comma), a range `a..b:step` or a
    log-range `a..b*n`. Raises RecipeError."""
    values = _listed(key, spec) if isinstance(spec, str) else list(spec) if isinstance(spec, list) else [spec]
    values = [_value(key, value) for value in values]
    if not values:
        raise RecipeError(f"the grid's {key} has no values; give a list, a..b:step or a..b*n")
    return values


def safe_name(value: Any) -> str:
    """A value as part of a folder's name: letters, digits, `_ . + -`; what is cut leaves six digits of its hash."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    safe = re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "empty"
    return safe if len(safe) <= LONGEST_VALUE else f"{safe[:LONGEST_VALUE]}-{sha256(text.encode()).hexdigest()[:6]}"


def _axis(key: str, short: str, values: Sequence[Any]) -> Axis:
    return Axis(key, tuple(Variant(value, f"{short}-{safe_name(value)}", {key: value}) for value in values))


def _placed_here(axis: Axis) -> Axis:
    """Members keep the names by which their paths were given."""

    def placed(variant: Variant) -> Variant:
        return replace(variant, changes={key: named_here(key, value) for key, value in variant.changes.items()})

    return replace(axis, variants=tuple(map(placed, axis.variants)))


def _listed(key: str, text: str) -> list[Any]:
    """The values in a text."""
    if text.strip().startswith("["):
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the grid's {key} is not a YAML list: {text!r} ({error})") from error
        if not isinstance(values, list):
            raise RecipeError(f"the grid's {key} is not a YAML list: {text!r}; give one in brackets, or a,b,c")
        return values
    values = []
    for part in _parts(text):
        range_ = _RANGE.fullmatch(part)
        values += _range(key, part, range_) if range_ else [_scalar(part)]
    return values


def _parts(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _scalar(text: str) -> Any:
    text = text.strip()
    if not text:
        raise RecipeError("the grid has an empty value; take the comma away, or write null for none")
    if re.fullmatch(_NUMBER, text):  # YAML would read 1e-4 as text
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the grid's value {text!r} is not YAML: {error}") from error


def _value(key: str, value: Any) -> Any:
    """Several names in one text (`q_proj+v_proj`) as a list, where the key takes one. A file's name may have a plus."""
    if isinstance(value, str) and _NAMES.fullmatch(value) and _takes(key, list) and not key.startswith("data."):
        return value.split("+")
    if isinstance(value, str) and re.fullmatch(_NUMBER, value.strip()) and not _takes(key, str):
        return _scalar(value)
    return value


def _range(key: str, text: str, match: re.Match[str]) -> list[Any]:
    first, last, sign, by = match.groups()
    if sign is None:
        raise RecipeError(
            f"the grid's {key} has the range {text.strip()!r} without a step: give {first}..{last}:STEP for even steps "
            f"or {first}..{last}*COUNT for so many values, evenly spaced in the logarithm"
        )
    try:
        return _log_range(key, text, first, last, by) if sign == "*" else _linear(key, text, first, last, by)
    except (InvalidOperation, OverflowError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"the grid's {key} has a range that cannot be read: {text.strip()!r} ({error})") from error


def _linear(key: str, text: str, first: str, last: str, by: str) -> list[Any]:
    """first, first + step, … up to and with last; whole numbers stay whole."""
    start, stop, step = Decimal(first), Decimal(last), Decimal(by)
    if step <= 0 or stop < start:
        raise RecipeError(
            f"the grid's {key} has the range {text.strip()!r}; expected a..b:step with a <= b and step > 0"
        )
    count = int((stop - start) / step) + 1
    _few(key, text, count)
    whole = all(re.fullmatch(r"[+-]?\d+", part) for part in (first, by))
    values = [start + index * step for index in range(count)]
    return [int(value) if whole else float(value) for value in values]


def _log_range(key: str, text: str, first: str, last: str, by: str) -> list[Any]:
    """n values from first to last, evenly spaced in the logarithm, of three significant digits; whole where the key
    takes whole numbers only, and then each once."""
    start, stop = float(first), float(last)
    if start <= 0 or stop <= 0 or not re.fullmatch(r"\d+", by) or int(by) < 2:
        raise RecipeError(
            f"the grid's {key} has the log-range {text.strip()!r}; expected a..b*n with a and b above 0 and n from 2"
        )
    count = int(by)
    _few(key, text, count)
    steps = [math.log(start) + (math.log(stop) - math.log(start)) * index / (count - 1) for index in range(count)]
    values: list[Any] = [float(f"{math.exp(step):.{LOG_DIGITS}g}") for step in steps]
    values[0], values[-1] = start, stop
    if not _takes(key, float):
        values = [round(value) for value in values]
    return list(dict.fromkeys(values))


def _few(key: str, text: str, count: int) -> None:
    if count > MOST_VALUES:
        raise RecipeError(f"the grid's {key} has {count:,} values in {text.strip()!r}; give at most {MOST_VALUES:,}")


def _takes(key: str, kind: type) -> bool:
    """Whether the type of a recipe's key has `kind` in it."""
    *parents, last = key.split(".")
    field = options_at(parents).get(last)

    def has(annotation: Any) -> bool:
        origin = getattr(annotation, "__origin__", None)
        return (
            annotation is kind
            or origin is kind
            or any(has(inner) for inner in get_args(annotation) if origin is not list)
        )

    return field is not None and has(field.annotation)
