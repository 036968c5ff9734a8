"""Grading answers against references: exact text, JSON validity, JSON fields one by one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Grader = Literal["exact_match", "json"]


@dataclass(frozen=True)
class Grade:
    """One answer: right as a whole, parsable (for `json`), and right per field of the reference."""

    exact: bool
    valid: bool | None = None
    fields: dict[str, bool] = field(default_factory=dict)


def pick_grader(references: Sequence[str]) -> Grader:
    """`json` where every reference is a JSON object."""
    return "json" if references and all(_object(reference) is not None for reference in references) else "exact_match"


def grade(answer: str, reference: str, grader: Grader) -> Grade:
    """Compare one answer. White space around it does not count; within JSON, neither does the order of keys."""
    if grader == "exact_match":
        return Grade(answer.strip() == reference.strip())
    wanted, given = _object(reference), _object(answer)
    if wanted is None:
        return Grade(answer.strip() == reference.strip(), given is not None)
    if given is None:
        return Grade(False, False, dict.fromkeys(wanted, False))
    fields = {key: key in given and _same(given[key], value) for key, value in wanted.items()}
    return Grade(_same(given, wanted), True, fields)


def summarise(grades: Sequence[Grade], grader: Grader) -> dict[str, Any]:
    """Shares over all answers: exact_match, and for JSON json_valid and fields."""
    count = max(1, len(grades))
    summary: dict[str, Any] = {"exact_match": sum(grade.exact for grade in grades) / count}
    if grader == "json":
        summary["json_valid"] = sum(bool(grade.valid) for grade in grades) / count
        keys = list(dict.fromkeys(key for grade in grades for key in grade.fields))
        having = {key: [grade.fields[key] for grade in grades if key in grade.fields] for key in keys}
        summary["fields"] = {key: sum(right) / len(right) for key, right in having.items()}
    return summary


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: true is not 1, as it is in Python."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object without duplicate keys, else None."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
