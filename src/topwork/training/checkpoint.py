"""Checkpoints: everything a run needs to go on as if it had never stopped.

    RUN/checkpoints/step-000123/
        adapter/                 what the caller's writer puts there; the caller loads it
        optimizer.safetensors    `<parameter name>.<state key>`, in the exact dtype
        random.safetensors       states of torch's generators (CPU, every CUDA device) and of Python's, as uint8
        state.json               TrainState, the row source's state, and names and shapes of the trained parameters
        manifest.json            SHA-256 and size of each file

Learning rate, betas and the like are the recipe's and the schedule's, and are not stored. Nothing is pickled.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from topwork.common.errors import CheckpointError
from topwork.common.files import (
    clear_leftovers,
    recover_folders,
    remove_folder,
    verify_folder,
    write_folder,
    write_json,
)
from topwork.common.os_errors import why
from topwork.training.random_states import python_state, random_states, restore_random

ADAPTER = "adapter"
_OPTIMIZER, _RANDOM, _STATE = "optimizer.safetensors", "random.safetensors", "state.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
_UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged checkpoint raises."""


@dataclass(frozen=True)
class Validation:
    """One validation: mean losses per learned token. `train_loss` is the mean since the validation before."""

    step: int
    train_loss: float | None
    eval_loss: float


@dataclass(frozen=True)
class TrainState:
    """How far a run is. `step` counts finished optimizer steps; data order and schedule follow from it and the seed.

    `loss_sum` is over the `loss_count` steps since the last validation. `ended` says how training ended, where it did
    (finished, early stopping, diverged), in the loop's round `ended_at`: a step that diverged is counted there.
    """

    step: int
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    tokens_seen: int = 0
    history: tuple[Validation, ...] = ()
    loss_sum: float = 0.0
    loss_count: int = 0
    ended: str | None = None
    ended_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A value for JSON; floats come back bit for bit. Raises CheckpointError on NaN and infinity."""
        value = asdict(self)
        for name, number in _numbers(value):
            if not math.isfinite(number):
                raise CheckpointError(f"the training state's {name} is {number}; only finite values can be resumed")
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TrainState":
        """The inverse of `to_json`. Raises CheckpointError where fields are missing or unknown."""
        expected, given = {field.name for field in fields(cls)}, set(value)
        if expected != given:
            raise CheckpointError(
                f"the training state has the fields {sorted(given)}, expected {sorted(expected)}; "
                "it was written by another version of Topwork: resume with that one"
            )
        try:
            history = tuple(Validation(**entry) for entry in value["history"])
            return cls(**{**value, "history": history})
        except TypeError as error:
            raise CheckpointError(f"the training state's history cannot be read: {error}") from error


def save_checkpoint(
    folder: Path,
    step: int,
    write_adapter: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    parameter_names: Sequence[str],
    state: TrainState,
    keep: int,
    protect: int | None,
    rows: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write `folder`/step-NNNNNN whole or not at all, then delete the oldest beyond `keep`; returns its path.

    `parameter_names` name the optimizer's parameters in its own order. `write_adapter` fills the empty folder it is
    given; `rows` is the row source's state. The checkpoint of step `protect` (the best) is never deleted and does not
    count towards `keep`, which is at least 1. Checkpoints of later steps, which a resume has passed over, go too.
    Raises RunError on a full disk; the earlier checkpoints then stand.
    """
    tensors = _optimizer_tensors(optimizer, parameter_names)
    described = {
        "format": _FORMAT,
        "optimizer": type(optimizer).__name__,
        "state": state.to_json(),
        "rows": _as_json(rows),
    }
    described["parameters"] = _shapes(optimizer, parameter_names)

    def write(path: Path) -> None:
        (path / ADAPTER).mkdir()
        write_adapter(path / ADAPTER)
        save_file(tensors, path / _OPTIMIZER)
        save_file(random_states(), path / _RANDOM)
        write_json(path / _STATE, described)

    clear_leftovers(folder)
    target = checkpoint_path(folder, step)
    write_folder(target, write, replace=True)
    _prune(folder, step, keep, protect)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, whole or not; those half written when a process died are not seen."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step:06d}"


def checkpoint_step(path: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise CheckpointError(f"{path} is not a checkpoint; expected a folder named like step-000123")
    return int(named.group(1))


def newest_whole_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all as written; None where there is none. Others are passed to `warn`."""
    recover_folders(folder)
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_folder(path)
        except CheckpointError as error:
            warn(f"checkpoint {path.name} is passed over for the one before: {error}")
        else:
            return path
    return None


def read_state(path: Path) -> TrainState:
    """A checkpoint's TrainState; nothing is restored. Raises CheckpointError."""
    return TrainState.from_json(_described(path)["state"])


def _described(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json."""
    try:
        described: dict[str, Any] = json.loads((path / _STATE).read_bytes())
        if not isinstance(described["state"], dict):
            raise TypeError("it holds no state")
        return described
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {why(error)}; resume from another checkpoint") from error


def read_rows(path: Path) -> dict[str, Any] | None:
    """The state of a checkpoint's row source; None for one that was written before there were any. Raises
    CheckpointError."""
    rows = _described(path).get("rows")
    if rows is not None and not isinstance(rows, dict):
        raise CheckpointError(f"{path} cannot be read: its rows are a {type(rows).__name__}; resume from another")
    return rows


def _as_json(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Raises CheckpointError for a row source's state that JSON does not hold."""
    try:
        value: dict[str, Any] = json.loads(json.dumps(dict(rows), allow_nan=False))
        return value
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the row source's state cannot be saved ({error}); `state()` is to give what JSON holds: texts, finite "
            "numbers, lists and maps"
        ) from error


def load_checkpoint(path: Path, optimizer: torch.optim.Optimizer, parameter_names: Sequence[str]) -> TrainState:
    """Give `optimizer` and the random generators the states they had when `path` was saved; returns the TrainState.

    The adapter's weights are the caller's to load, from `path`/adapter. Raises CheckpointError where the checkpoint was
    made for other parameters or another optimizer, or cannot be read; nothing is changed then.
    """
    try:
        state, tensors = _fitting(path, optimizer, parameter_names)
        states = load_file(path / _RANDOM)
        python = python_state(states)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read: {why(error)}; resume from another checkpoint") from error
    _restore_optimizer(optimizer, parameter_names, tensors)
    restore_random(states, python)
    return state


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, parameter_names: Sequence[str]) -> int:
    """Give `optimizer` alone the state that it had when `path` was saved, for another run that goes on from there;
    returns the step it was at. Raises CheckpointError as `load_checkpoint` does."""
    try:
        state, tensors = _fitting(path, optimizer, parameter_names)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read: {why(error)}; take another checkpoint") from error
    _restore_optimizer(optimizer, parameter_names, tensors)
    return state.step


def _fitting(
    path: Path, optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> tuple[TrainState, dict[str, Tensor]]:
    """A checkpoint's state and its optimizer's tensors, which are for these parameters."""
    described, tensors = json.loads((path / _STATE).read_bytes()), load_file(path / _OPTIMIZER)
    if (found := described.get("format")) != _FORMAT:
        raise CheckpointError(f"{path} has format {found}, expected {_FORMAT}; resume with the Topwork that wrote it")
    _check_fit(path, described, optimizer, names)
    return TrainState.from_json(described["state"]), tensors


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in _named(optimizer, names).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key!r} of {name} as a {type(value).__name__}; "
                    "only optimizers whose state is tensors can be saved"
                )
            tensors[f"{name}.{key}"] = _own_storage(value.detach().cpu().contiguous())
    return tensors


def _own_storage(tensor: Tensor) -> Tensor:
    """safetensors refuses tensors that share storage, as views of one flat buffer do."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _named(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(parameters) != len(names) or len(set(names)) != len(names):
        raise CheckpointError(
            f"{len(parameters)} parameters are in the optimizer, but {len(set(names))} different names of "
            f"{len(names)} were given; name each once, in the optimizer's order"
        )
    return dict(zip(names, parameters))


def _shapes(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in _named(optimizer, names).items()}


def _check_fit(
    path: Path, described: Mapping[str, Any], optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> None:
    """CheckpointError where the checkpoint's parameters or optimizer are not the ones given, naming them."""
    if described["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{path} was saved with {described['optimizer']}, not with {type(optimizer).__name__}; "
            "resume with the recipe it was made with"
        )
    saved, given = described["parameters"], _shapes(optimizer, names)
    wrong = [f"{name} is only in the checkpoint" for name in saved if name not in given]
    wrong += [f"{name} is not in the checkpoint" for name in given if name not in saved]
    wrong += [
        f"{name} is {saved[name]} in the checkpoint and {shape} here"
        for name, shape in given.items()
        if name in saved and saved[name] != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{path} was made for other parameters: {'; '.join(wrong[:5])}{more}. "
            "Resume with the recipe it was made with, or start anew in another output_dir"
        )


def _restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Not `load_state_dict`, which would cast the moments to the parameter's dtype.

    State that is there already is filled in place: AdamW8bit makes its own at once, and knows it by where it lies.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        saved.setdefault(name, {})[key] = tensor
    named = _named(optimizer, names)
    on_host = {
        id(parameter)
        for group in optimizer.param_groups
        if not (group.get("fused") or group.get("capturable"))
        for parameter in group["params"]
    }
    for name, parameter in named.items():
        here = optimizer.state.pop(parameter, {})
        for key, value in saved.get(name, {}).items():
            # torch keeps AdamW's step count on the host, unless the kernel reads it on the device
            device = torch.device("cpu") if key == "step" and id(parameter) in on_host else parameter.device
            place = here.get(key)
            if place is None or (place.shape, place.dtype) != (value.shape, value.dtype):
                place = torch.empty_like(value, device=device)
            optimizer.state[parameter][key] = place.copy_(value)


def _prune(folder: Path, newest: int, keep: int, protect: int | None) -> None:
    """Delete all but the `keep` newest up to step `newest`, and `protect`."""
    others = [path for path in list_checkpoints(folder) if checkpoint_step(path) != protect]
    later = [path for path in others if checkpoint_step(path) > newest]
    upto = [path for path in others if checkpoint_step(path) <= newest]
    for path in later + upto[:-keep]:
        remove_folder(path)


def _numbers(value: Any, name: str = "") -> list[tuple[str, float]]:
    """Every float in a JSON value, with the way to it."""
    if isinstance(value, float):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [found for key, inner in value.items() for found in _numbers(inner, f"{name}.{key}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [found for index, inner in enumerate(value) for found in _numbers(inner, f"{name}[{index}]")]
    return []
