"""`rank_pattern` and `alpha_pattern` as they are written.

Of several keys that match one module PEFT and we take the first, but files have their keys sorted, PEFT's too: an order
that means something would be lost. So what overlaps is written in other words, in which one key alone matches a module.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from topwork.adapters.files import names_of
from topwork.adapters.methods.lora.places import keys_of

Value = TypeVar("Value", bound=Hashable)


def without_overlaps(pattern: Mapping[str, Value], paths: Sequence[str], default: Value) -> dict[str, Value]:
    """A pattern that gives each of the `paths` what `pattern` does, whatever the order of its keys; itself where that
    holds already. `default` is what those get that no key matches."""
    found = keys_of(pattern, paths)
    if all(len(keys) < 2 for keys in found.values()):
        return dict(pattern)
    values = {path: pattern[keys[0]] for path, keys in found.items() if keys and pattern[keys[0]] != default}
    named = _by_name(values, paths)
    keys = keys_of(named, paths)
    if all([named[key] for key in keys[path]] == ([values[path]] if path in values else []) for path in paths):
        return named
    return {f"^{re.escape(path)}": value for path, value in values.items()}


def _by_name(values: Mapping[str, Value], paths: Sequence[str]) -> dict[str, Value]:
    """The fewest names for all that get one value. (A dot in them matches any letter, which the caller looks after.)"""
    groups: dict[Value, list[str]] = {}
    for path, value in values.items():
        groups.setdefault(value, []).append(path)
    return {name: value for value, group in groups.items() for name in names_of(group, paths)}
