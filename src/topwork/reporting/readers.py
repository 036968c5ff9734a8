"""Reads a run folder as it lies on disk: finished, still training, interrupted, or left by a crash."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from topwork.common.errors import RequestError
from topwork.common.os_errors import check_link, why

Record = Mapping[str, Any]
"""One line of metrics.jsonl: `kind` (train, eval, note), `step`, and the values of that kind."""


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; an absent or unreadable file is empty, and `problems` names the unreadable. `alone` is
    an adapter that lies in no run's folder, of which there is no more than its own file tells."""

    name: str
    records: tuple[Record, ...]
    recipe_text: str
    recipe: Mapping[str, Any]
    result: Mapping[str, Any]
    provenance: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    problems: tuple[str, ...]
    alone: bool = False


def read_run(run_dir: Path) -> RunFiles:
    """Raises RequestError where `run_dir` is no folder or its metrics.jsonl is missing or holds no measurement."""
    check_link(run_dir)
    if not run_dir.is_dir():
        raise RequestError(f"no run folder at '{run_dir}'; give a folder that `topwork train` wrote, such as runs/NAME")
    problems: list[str] = []
    records = read_metrics(run_dir / "metrics.jsonl", problems)
    recipe_text = read_text(run_dir / "recipe.yaml", problems)
    return RunFiles(
        name=run_dir.resolve().name,
        records=tuple(records),
        recipe_text=recipe_text,
        recipe=parse_recipe(recipe_text, problems),
        result=read_json(run_dir / "result.json", problems),
        provenance=read_json(run_dir / "provenance.json", problems),
        evaluation=read_json(run_dir / evaluation_of(run_dir), problems),
        problems=tuple(problems),
    )


def scores_file(step: int | None) -> str:
    """What `topwork eval` calls its scores in a run's folder: those of the finished adapter, or of a checkpoint."""
    return "evaluation.json" if step is None else f"evaluation-step-{step:06d}.json"


def evaluation_of(run_dir: Path) -> str:
    """A run's scores; where it has no finished adapter those of the newest checkpoint that has some."""
    own = scores_file(None)
    if (run_dir / "adapter").is_dir() or (run_dir / own).is_file():
        return own
    found = sorted((path.name for path in run_dir.glob("evaluation-step-*.json")), key=lambda name: (len(name), name))
    return found[-1] if found else own


def read_metrics(path: Path, problems: list[str] | None = None) -> list[Record]:
    """The lines of metrics.jsonl in order of steps.

    A torn last line is a write that was cut short and is passed over in silence; other unreadable lines are passed
    over and counted in `problems`. A resumed run repeats the steps after its checkpoint: the later telling counts.
    """
    if not path.is_file():
        raise RequestError(
            f"no metrics in '{path.parent}' ({path.name} is missing); give a folder that `topwork train` wrote"
        )
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    records: list[Record] = []
    unreadable: list[int] = []
    for number, line in enumerate(lines, start=1):
        record = _parse_line(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            unreadable.append(number)
    if unreadable and problems is not None:
        problems.append(f"{path.name}: {len(unreadable)} unreadable line(s) passed over, the first is {unreadable[0]}")
    records = _without_rewound(records)
    if not any(record["kind"] in ("train", "eval") for record in records):
        ended = [str(record.get("text")) for record in records if record["kind"] == "note"]
        if ended and ended[-1].startswith("diverged"):
            raise RequestError(f"no measurement in '{path}': the run {ended[-1]}")
        raise RequestError(
            f"no measurement in '{path}': it has {len(lines)} line(s), none of them a readable training or validation "
            "step; train for at least one step first"
        )
    return records


def number(record: Mapping[str, Any], *path: str) -> float | None:
    """The number at `path` of nested mappings, or None where there is none."""
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def section(mapping: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The mapping at `path`, or an empty one."""
    value: Any = mapping
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def entries(mapping: Mapping[str, Any], key: str) -> list[Any]:
    """The list at `key`, or an empty one."""
    value = mapping.get(key)
    return value if isinstance(value, list) else []


def _parse_line(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if whole else None


def _without_rewound(records: list[Record]) -> list[Record]:
    """Drop what a run measured after the checkpoint from which it was later resumed."""
    kept: list[Record] = []
    furthest = -1
    for record in records:
        kind, step = record["kind"], record["step"]
        if kind == "note" and record in kept:
            continue
        if kind != "note" and step <= furthest:
            kept = [old for old in kept if not _is_rewound(old, kind, step)]
            furthest = max((old["step"] for old in kept), default=-1)
        kept.append(record)
        furthest = max(furthest, step)
    return kept


def _is_rewound(old: Record, kind: str, step: int) -> bool:
    if kind == "train" and old["kind"] != "train":
        return bool(old["step"] > step)
    return bool(old["kind"] == kind and old["step"] >= step)


def read_text(path: Path, problems: list[str]) -> str:
    """A file's text; empty where there is none, or where it cannot be read, which `problems` then tells."""
    try:
        return path.read_text(encoding="utf-8") if os.path.lexists(path) else ""
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read: {why(error)}")
        return ""


def read_json(path: Path, problems: list[str]) -> Mapping[str, Any]:
    """A file's JSON object, likewise."""
    known = len(problems)
    text = read_text(path, problems)
    if len(problems) > known or not os.path.lexists(path):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} is not whole JSON ({error}); its part is left out")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no JSON object; its part is left out")
        return {}
    return value


def parse_recipe(text: str, problems: list[str]) -> Mapping[str, Any]:
    """A recipe's values as they stand there, likewise."""
    try:
        value = yaml.safe_load(text) if text else {}
    except (yaml.YAMLError, RecursionError) as error:
        problems.append(f"recipe.yaml is not YAML: {error}")
        return {}
    return value if isinstance(value, dict) else {}
