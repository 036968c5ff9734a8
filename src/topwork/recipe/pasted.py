"""Options as messages print them, `data.columns: {prompt: question}`, pasted into a recipe or behind `--set`."""

import re
from collections.abc import Collection
from typing import Any

from topwork.common.errors import RecipeError

_PRINTED = re.compile(r"\s*([\w.-]+):\s+(\S.*)", re.DOTALL)


def setting(override: str) -> tuple[str, str] | None:
    """The dotted key and the value's YAML of `a.b=c` or `a.b: c`; None where it is neither."""
    printed = _PRINTED.fullmatch(override)
    if printed:
        return printed[1], printed[2]
    key, equals, text = override.partition("=")
    return (key.strip(), text) if equals and key.strip() else None


def unfolded(values: dict[str, Any], sections: Collection[str], source: str) -> dict[str, Any]:
    """A recipe's values with dotted keys, at the top or in their own section, put where they belong.

    Raises RecipeError for an option that is given in both ways, which would make one of them count for nothing.
    """
    found: dict[str, Any] = {}
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        if _is_inside(key, sections):
            _put_once(dotted, key, value, source)
        elif key in sections and isinstance(value, dict):
            found[key] = {inner: each for inner, each in value.items() if not _is_inside(inner, (key,))}
            for inner, each in value.items():
                if inner not in found[key]:
                    _put_once(dotted, inner, each, source)
        else:
            found[key] = value
    for key, value in dotted.items():
        *parents, last = key.split(".")
        at = found
        for number, parent in enumerate(parents, 1):
            if at.get(parent) is None:
                at[parent] = {}
            at = at[parent]
            if not isinstance(at, dict):
                raise RecipeError(f"{source}: {key!r} is given beside {'.'.join(parents[:number])!r}, which is a value")
        _put_once(at, last, value, source, key)
    return found


def _is_inside(key: object, sections: Collection[str]) -> bool:
    head, dot, _ = key.partition(".") if isinstance(key, str) else ("", "", "")
    return bool(dot) and head in sections


def _put_once(into: dict[str, Any], key: str, value: Any, source: str, told: str = "") -> None:
    if key in into:
        raise RecipeError(
            f"{source}: {told or key!r} is given twice: once by this name, and once inside of its section; keep one"
        )
    into[key] = value
