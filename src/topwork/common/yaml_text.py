"""Values as people may paste them into a recipe: YAML that reads as what it was."""

import json
import re
from collections.abc import Mapping

_PLAIN = re.compile(r"[A-Za-z_][\w-]*|/[\w./-]*", re.ASCII)  # a name, a path
_NOT_TEXT = ("y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan")  # what YAML reads otherwise


def in_yaml(mapping: Mapping[str, str]) -> str:
    """A mapping on one line."""
    return "{" + ", ".join(f"{quoted(key)}: {quoted(value)}" for key, value in mapping.items()) + "}"


def quoted(text: str) -> str:
    """A text, in double quotes where YAML would read it as something else. What does not show is escaped: YAML refuses
    some of it, and people could not see it."""
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    return "".join(each if each.isprintable() else _escaped(each) for each in json.dumps(text, ensure_ascii=False))


def _escaped(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"
