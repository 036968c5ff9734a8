"""Measurements of a machine that are kept in the cache, and what a plan takes from them. Free of torch.

A plan takes the measurement of its own question where there is one, else the time that `time.py` reckons, times what
the nearest measurement of this machine took over what is reckoned for it.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from topwork.common.cache import cache_root, make_cache
from topwork.common.devices import cpu_name
from topwork.common.files import sha256_bytes, write_json
from topwork.common.processors import paying_threads
from topwork.plan.calibration import Measured, Question
from topwork.plan.time import Speed

FORM = 1
"""Of the files; others are not read."""
FOLDER = "speeds"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a measurement holds for."""
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": paying_threads(), "platform": sys.platform,
        "device": device, "torch": _version("torch"), "topwork": _version("topwork"),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Record:
    """A measurement as it is kept. `reckoned` is what the default speed says of the same step."""

    key: Mapping[str, Any]
    machine: Mapping[str, Any]
    measured: Measured
    reckoned: float
    flops: float
    date: str

    @property
    def ratio(self) -> float:
        """How many times as long as reckoned."""
        return self.measured.step / self.reckoned


@dataclass(frozen=True)
class Found:
    """A step's seconds on this machine, and where they are from, for people.

    speed   reckons the same for this step; validations and other sizes are reckoned by it
    exact   whether this very question was measured
    notes   sentences about measurements that were not used
    """

    seconds: float
    speed: Speed
    source: str
    exact: bool
    notes: tuple[str, ...] = ()


def keep(question: Question, found: Measured, speed: Speed, date: str) -> Path:
    """Put a measurement into the cache; the file. Raises RunError where that cannot be written."""
    folder = cache_root() / FOLDER
    make_cache(folder)
    there = machine(question.setup.device)
    record = Record(question.key(), there, found, question.reckoned(speed), question.flops(), date)
    path = folder / f"{_digest({'key': record.key, 'machine': record.machine})}.json"
    write_json(path, {"form": FORM, **asdict(record)})
    return path


def kept(device: str = "cpu") -> tuple[list[Record], list[str]]:
    """This machine's measurements, and a sentence for each file that is damaged or of another machine or version."""
    records, notes = [], []
    here = machine(device)
    folder = cache_root() / FOLDER
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        record = _read(path)
        if isinstance(record, str):
            notes.append(record)
        elif dict(record.machine) == here:
            records.append(record)
        elif record.machine.get("device") == device:
            other = [name for name in here if record.machine.get(name) != here[name]]
            notes.append(
                f"the measurement of {record.date} in {path.name} was made with another {', '.join(other)}: not used"
            )
    return records, notes


def seconds_here(question: Question, speed: Speed, records: Sequence[Record], notes: Sequence[str] = ()) -> Found:
    """A step on this machine, by its measurements where there are some, else by a speed alone."""
    reckoned, told = question.reckoned(speed), tuple(notes)
    exact = next((record for record in records if record.key == question.key()), None)
    if exact is not None:
        found = exact.measured.step
        speed = replace(speed, scale=speed.scale * found / reckoned)
        return Found(found, speed, f"measured on this machine, {exact.date}", True, (*told, *_unsteady(exact)))
    if not records:
        return Found(reckoned, speed, speed.source, False, told)
    nearest = min(records, key=lambda record: _distance(record, question))
    speed = replace(speed, scale=speed.scale * nearest.ratio)
    source = (
        f"reckoned by operations from this machine's measurement of {_called(nearest)}, {nearest.date}; measure this "
        "very recipe with topwork plan RECIPE --calibrate"
    )
    return Found(reckoned * nearest.ratio, speed, source, False, (*told, *_unsteady(nearest)))


def _unsteady(record: Record) -> list[str]:
    if not record.measured.unsteady:
        return []
    return [
        f"the machine was busy while this was measured (half of the steps within {record.measured.spread:.0%}): the "
        "time may be far off; measure again in a quieter hour with --calibrate"
    ]


def _distance(record: Record, question: Question) -> float:
    """Other ways of holding and training count more than other sizes."""
    key = question.key()
    sizes = abs(math.log(record.flops / question.flops()))
    methods = [member["method"] for member in record.key["members"]] != [member["method"] for member in key["members"]]
    held = record.key["quantization"] != key["quantization"] or record.key["base"][-1] != key["base"][-1]
    return (
        sizes
        + 4 * methods
        + 4 * held
        + 2 * (bool(record.key["checkpointed_layers"]) != bool(question.checkpointed_layers))
    )


def _called(record: Record) -> str:
    methods = sorted({str(member["method"]) for member in record.key["members"]})
    held = (
        "4-bit " if record.key["quantization"].get("load_in_4bit") else "8-bit " if record.key["quantization"] else ""
    )
    base = record.key["base"]
    return f"{'+'.join(methods)} on a {held}{base[0]} of {base[1]} layers, width {base[2]}"


def _read(path: Path) -> Record | str:
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["form"] != FORM:
            return f"{path.name} is a measurement in a form of another version: not used"
        inner = values["measured"]
        found = Measured(**{**inner, "layers": tuple(inner["layers"])})
        record = Record(
            values["key"],
            values["machine"],
            found,
            float(values["reckoned"]),
            float(values["flops"]),
            str(values["date"]),
        )
        if not (found.step > 0 and record.reckoned > 0 and record.flops > 0) or not math.isfinite(found.step):
            raise ValueError("no time")
        _called(record)
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return (
            f"{path.name} is a damaged measurement: not used; delete it, or measure again with topwork plan --calibrate"
        )


def _digest(value: Mapping[str, Any]) -> str:
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())[:24]
