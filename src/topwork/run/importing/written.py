"""The recipe that a draft makes, as YAML with where each line came from."""

import json
from typing import Any

import yaml

from topwork.recipe.recipe import options_at
from topwork.run.importing.draft import Draft, Told, one_line
from topwork.run.importing.records import Fate

HEADINGS: dict[Fate, str] = {
    "mapped": "mapped",
    "needless": "nothing to set here",
    "no equal": "no equal here",
    "unknown": "not known",
    "not read": "not read",
}
LOUD: tuple[Fate, ...] = ("no equal", "unknown", "not read")
SECTIONS = ("model", "quantization", "adapter", "data", "training", "output_dir")
_WIDTH = 66
_PARTS, _SHORT = 3, 40


def sentence(told: Told) -> str:
    """`line 12: lora_r: 32 -> adapter.r`, and how."""
    ours = f" -> {told.ours}" if told.ours and told.fate == "mapped" else ""
    return f"{told.given.place}: {told.given.key}: {told.value}{ours}{f' ({told.note})' if told.note else ''}"


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections, in a recipe's order."""
    found: dict[str, Any] = {}
    for section in SECTIONS:
        inner = {
            key.partition(".")[2]: value
            for key, value in values.items()
            if key.partition(".")[0] == section and "." in key
        }
        if section in values:
            found[section] = values[section]
        elif inner:
            order = list(options_at([section]))
            found[section] = {name: inner[name] for name in sorted(inner, key=lambda name: _place(order, name))}
    return found


def _place(order: list[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def recipe_text(draft: Draft, source: str) -> str:
    """The recipe, a comment behind each line that tells of which key of theirs it is, and what is missing as "
    "comments."""
    lines = [f"# Of {one_line(source)} ({draft.tool.name}), by `topwork import`."]
    lines += [f"# Missing: {one_line(missing)}" for missing in draft.missing]
    loud = [told for told in draft.told if told.fate in LOUD]
    lines += [f"# {HEADINGS[told.fate].capitalize()}: {one_line(sentence(told))}" for told in loud]
    for section, inner in nested(draft.values).items():
        lines.append("")
        if section in draft.values:
            lines.append(_line(section, inner, draft.origins.get(section, []), ""))
            continue
        lines.append(f"{section}:")
        for name, value in inner.items():
            lines.append(_line(name, value, draft.origins.get(f"{section}.{name}", []), "  "))
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any, origins: list[Told], indent: str) -> str:
    told = _origin(origins)
    flow = f"{indent}{name}: {in_flow(value)}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        entries = [f"{indent}  - {in_flow(each)}" for each in value]
        return "\n".join([f"{indent}{name}:{told and '  # ' + told}", *entries])
    if not told:
        return flow
    return f"{flow}  # {told}" if len(flow) <= _WIDTH else f"{indent}# {told}\n{flow}"


def in_flow(value: Any) -> str:
    """A value on one line, as YAML reads it: a number with an exponent has a dot and a sign there."""
    if isinstance(value, float) and value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        digits = f"{value:.12g}"
        mantissa, e, exponent = digits.partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if e else digits
    if isinstance(value, str) and ("\n" in value or not value.isprintable()):
        return json.dumps(value)
    dumped = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _origin(origins: list[Told]) -> str:
    """`line 12: lora_r: 32`, or that it is the tool's default."""
    given = list({told.given.key: told for told in origins}.values())
    parts = [f"{told.given.place}: {_pair(told)}" for told in given if told.given.line is not None]
    parts = parts or [f"{told.given.place}: {_pair(told)}" for told in given]
    return one_line(" + ".join(parts[:_PARTS]))


def _pair(told: Told) -> str:
    """Key and value; the key alone where the line itself has a long value."""
    return f"{told.given.key}: {told.value}" if len(told.value) <= _SHORT else told.given.key
