"""A run's metrics: `metrics.jsonl`, one strict JSON object per line, and sinks that show them elsewhere."""

import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Protocol, Self

from topwork.common.errors import RequestError, did_you_mean
from topwork.common.files import append_line, write_bytes, write_text

METRICS, TENSORBOARD, WANDB_ID = "metrics.jsonl", "tensorboard", "wandb_id"
DIVERGED = "diverged at step"
"""How the note of a run begins that ended so, and is no run's that went on."""
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "Weights & Biases"}
Kind = Literal["train", "eval", "note", "threads"]


class Sink(Protocol):
    """Somewhere else that metrics go: a record is what stands in a line of metrics.jsonl."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def log_warning(message: str) -> None:
    """The warning way of callers that have no other: Python's logging."""
    logging.getLogger(__name__).warning(message)


class MetricsLog:
    """Appends records to RUN/metrics.jsonl and passes them on to the sinks.

    A fresh log starts empty; with `resume_step` the lines up to that step stay, later ones and a torn last one are cut
    off in one rename. A sink that fails is named once to `warn` and dropped: it never ends the run.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int | None = None,
        sinks: Sequence[Sink] = (),
        warn: Callable[[str], None] = log_warning,
    ) -> None:
        self._path = run_dir / METRICS
        self._sinks = list(sinks)
        self._warn = warn
        write_bytes(self._path, b"" if resume_step is None else _lines_up_to(self._path, resume_step, warn))
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run; one call per line

    def write(self, kind: Kind, step: int, values: Mapping[str, Any]) -> None:
        """Append {"kind", "step", **values}; NaN and infinities become null and are listed under "nonfinite".

        Values are what JSON holds (no tensors). Raises RunError where the disk is full.
        """
        record = strict_record({"kind": kind, "step": step, **values})
        append_line(self._file, json.dumps(record, ensure_ascii=False, allow_nan=False))
        for sink in list(self._sinks):
            self._guard(sink, partial(sink.write, record))

    def close(self) -> None:
        self._file.close()
        for sink in list(self._sinks):
            self._guard(sink, sink.close)
        self._sinks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guard(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service's client raises, training goes on
            self._sinks.remove(sink)
            self._warn(f"{type(sink).__name__} failed and gets no more metrics ({error}); {METRICS} goes on")


def strict_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with every NaN and infinity, at any depth, as None, and their keys (`a.b`, `a[0]`) in "nonfinite"."""
    nonfinite: list[str] = []
    strict: dict[str, Any] = {key: _strict(value, key, nonfinite) for key, value in record.items()}
    return strict | {"nonfinite": nonfinite} if nonfinite else strict


def _strict(value: Any, key: str, nonfinite: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(key)
        return None
    if isinstance(value, Mapping):
        return {inner: _strict(entry, f"{key}.{inner}", nonfinite) for inner, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry, f"{key}[{index}]", nonfinite) for index, entry in enumerate(value)]
    return value


def _lines_up_to(path: Path, step: int, warn: Callable[[str], None]) -> bytes:
    """The whole lines of `path` whose step is at most `step`."""
    if not path.exists():
        return b""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)
            if record["step"] <= step and not str(record.get("text")).startswith(DIVERGED):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            warn(f"{path}, line {number} is not a metrics record and is left out: {line[:80]!r}")
    return b"".join(kept)


class TensorBoardSink:
    """Event files in RUN/tensorboard: each number under `kind/key`. Events after `resume_step` are hidden.

    Where the environment has TENSORBOARD_LOGGING_DIR they are in a folder there, named as the run's.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "tensorboard") from error
        purge_step = None if resume_step is None else resume_step + 1
        elsewhere = os.environ.get("TENSORBOARD_LOGGING_DIR")
        if elsewhere and purge_step is None:
            purge_step = 0  # an earlier run of this name may have been there
        place = Path(elsewhere, run_dir.resolve().name) if elsewhere else run_dir / TENSORBOARD
        self._writer = SummaryWriter(log_dir=str(place), purge_step=purge_step)
        if resume_step is None:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def write(self, record: dict[str, Any]) -> None:
        for key, value in _shown_numbers(record).items():
            self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run. Its id stands in RUN/wandb_id, so that a resumed run goes on in the same one.

    What the environment says (WANDB_PROJECT, WANDB_NAME, WANDB_DIR, WANDB_RUN_ID, WANDB_RESUME) goes before what stands
    here; the rest of it (entity, group, mode, tags) is read by wandb itself. Of runs that train together the first has
    that name and id, the others a name that begins so.
    """

    _open: ClassVar[set[str]] = set()
    """Ids of those of this process, which no two may share."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "Weights & Biases") from error
        said, name = os.environ.get, run_dir.resolve().name
        id_file = run_dir / WANDB_ID
        if not id_file.exists():
            asked = said("WANDB_RUN_ID")
            write_text(id_file, asked if asked and asked not in self._open else secrets.token_hex(8))
        self._id = id_file.read_text("utf-8")
        named = said("WANDB_NAME")
        self._run = wandb.init(
            project=said("WANDB_PROJECT") or "topwork",
            name=f"{named}-{name}" if named and self._open else named or name,
            id=self._id,
            resume=said("WANDB_RESUME") or "allow",
            reinit="create_new",  # several members of one process have a run each
            dir=said("WANDB_DIR") or str(run_dir),
            config=dict(config),
        )
        self._open.add(self._id)
        # its own step count cannot go back, which a resume from an earlier checkpoint does
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        self._run.log({"step": record["step"], **_shown_numbers(record)})

    def close(self) -> None:
        self._open.discard(self._id)
        self._run.finish()


def check_sinks(names: Sequence[str]) -> None:
    """Raises RequestError for an unknown name or a package not installed; nothing is written."""
    for name in names:
        if name not in _PACKAGES:
            raise RequestError(
                f"report_to names {name!r}, expected tensorboard or wandb{did_you_mean(name, _PACKAGES)}"
            )
        if name not in sys.modules and find_spec(name) is None:
            raise _missing(name, _PACKAGES[name])


def open_sinks(
    names: Sequence[str],
    run_dir: Path,
    config: Mapping[str, Any],
    resume_step: int | None = None,
    warn: Callable[[str], None] = log_warning,
) -> list[Sink]:
    """The sinks of `names` (tensorboard, wandb). Raises RequestError for an unknown name or a package not installed.

    Where Weights & Biases cannot be reached or has no key, `warn` is told and the run goes on without it.
    """
    check_sinks(names)
    sinks: list[Sink] = []
    if "tensorboard" in names:
        sinks.append(TensorBoardSink(run_dir, config, resume_step))
    if "wandb" in names:
        try:
            sinks.append(WandbSink(run_dir, config))
        except RequestError:
            raise
        except Exception as error:  # no network, no key, a refused login: its own errors, and not the run's
            warn(f"Weights & Biases could not be started ({error}); the run goes on, {METRICS} has everything")
    return sinks


def _shown_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """{kind/key: number} of a record's finite numbers, the objective's own among them."""
    named = {**record, **{f"metrics/{name}": value for name, value in record.get("metrics", {}).items()}}
    return {
        f"{record['kind']}/{key}": value
        for key, value in named.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def metrics_text(record: Mapping[str, Any]) -> str:
    """The objective's own figures for a line of progress, in front of which others stand; empty where it has none."""
    return "".join(
        f"  {name} {'–' if value is None else format(value, '.4g')}"
        for name, value in record.get("metrics", {}).items()
    )


def _missing(extra: str, name: str) -> RequestError:
    return RequestError(
        f"report_to names {extra}, but {name} is not installed; run: pip install {extra}, or leave it out "
        "of training.report_to"
    )
