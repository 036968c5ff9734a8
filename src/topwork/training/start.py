"""Where adapters that were trained together go on together.

All that are active save in the same rounds, but not at the same instant: a kill may fall between two of them. They go
on from the newest round at which each has a whole checkpoint or had ended; what is newer is passed over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topwork.common.errors import CheckpointError, RequestError
from topwork.common.files import verify_folder
from topwork.training.checkpoint import (
    TrainState,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    newest_whole_checkpoint,
    read_state,
)


@dataclass(frozen=True)
class Start:
    """The round from which all go on, and for each adapter its checkpoint; no checkpoints where they begin anew."""

    at: int = 0
    checkpoints: tuple[Path, ...] = ()


@dataclass
class _Kept:
    """One adapter's checkpoints."""

    folder: Path
    wrong: list[str] = field(default_factory=list)
    newest: Path | None = field(init=False)
    state: TrainState | None = field(init=False)

    def __post_init__(self) -> None:
        self.newest = newest_whole_checkpoint(self.folder, self.wrong.append)
        self.state = read_state(self.newest) if self.newest is not None else None

    def rounds(self) -> set[int]:
        """At which it may be found."""
        if self.newest is None or self.state is None:
            return set()
        newest = checkpoint_step(self.newest)
        steps = {step for path in list_checkpoints(self.folder) if (step := checkpoint_step(path)) <= newest}
        return steps | ({self.state.ended_at} if self.state.ended_at is not None else set())

    def at(self, round_: int) -> Path | None:
        """Its checkpoint of a round: the last where it had ended by then."""
        if self.newest is None or self.state is None:
            return None
        if self.state.ended_at is not None and self.state.ended_at <= round_:
            return self.newest
        path = checkpoint_path(self.folder, round_)
        return path if path == self.newest or (path.is_dir() and _is_whole(path)) else None


def common_start(folders: Sequence[Path], warn: Callable[[str], None]) -> Start:
    """The newest start that the checkpoints in `folders`, one for each adapter, allow; passed over ones are told.

    Raises RequestError where they were not trained together, or where one has checkpoints and none is whole.
    """
    kept = [_Kept(folder) for folder in folders]
    for each in kept:
        if each.newest is None and each.wrong:
            raise _none_is_whole(each)
        for told in each.wrong:
            warn(told)
    for at in sorted({found for each in kept for found in each.rounds()}, reverse=True):
        checkpoints = [each.at(at) for each in kept]
        if None not in checkpoints:
            return Start(at, tuple(path for path in checkpoints if path is not None))
    if any(len(each.rounds()) > 1 for each in kept):  # killed while all saved for the first time, one has one at most
        told = "; ".join(f"{each.folder.parent} has {sorted(each.rounds()) or 'none'}" for each in kept)
        raise RequestError(
            f"these runs have no checkpoint of the same step ({told}), so they were not trained together; resume "
            "each with those that it was begun with"
        )
    return Start()


def _none_is_whole(kept: _Kept) -> RequestError:
    told = "\n  ".join(kept.wrong)
    return RequestError(
        f"{kept.folder.parent} has checkpoints, and none is whole, so there is nothing to go on from:\n  {told}\nBring "
        "back a copy of one of them, or begin anew: in another output_dir, or with --overwrite, once those whose "
        "manifest.json is damaged are moved away"
    )


def _is_whole(path: Path) -> bool:
    try:
        verify_folder(path)
    except CheckpointError:
        return False
    return True
