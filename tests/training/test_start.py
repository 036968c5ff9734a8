"""Where adapters that trained together go on together, whatever a kill has left of their checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from topwork.common.errors import RequestError
from topwork.training.checkpoint import TrainState, save_checkpoint
from topwork.training.start import Start, common_start


def saved(folder: Path, *steps: int, ended_at: int | None = None) -> Path:
    """Checkpoints of these steps; the last one's state has ended where a round is given."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    for step in steps:
        state = TrainState(step=step)
        if ended_at is not None and step == steps[-1]:
            state = replace(state, ended="diverged", ended_at=ended_at)
        save_checkpoint(folder, step, lambda _: None, optimizer, ["w"], state, 9, None)
    return folder


def torn(folder: Path, step: int) -> None:
    (folder / f"step-{step:06d}" / "state.json").write_text("{")


def found(*folders: Path) -> tuple[int, list[int]]:
    start = common_start(folders, lambda _: None)
    return start.at, [int(path.name.removeprefix("step-")) for path in start.checkpoints]


def test_the_newest_that_all_have(tmp_path: Path) -> None:
    a, b, c = saved(tmp_path / "a", 2, 4, 6), saved(tmp_path / "b", 2, 4, 6), saved(tmp_path / "c", 2, 4)
    assert found(a, b) == (6, [6, 6])
    assert found(a, b, c) == (4, [4, 4, 4])
    torn(c, 4)
    assert found(a, b, c) == (2, [2, 2, 2])
    torn(a, 2)
    with pytest.raises(RequestError, match="were not trained together"):
        found(a, b, c)


def test_one_that_had_ended_is_taken_as_it_was_then(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", 2, 4, 6), saved(tmp_path / "b", 2, 3, ended_at=4)
    assert found(a, b) == (6, [6, 3])
    assert found(saved(tmp_path / "c", 2, 4), b) == (4, [4, 3])


def test_one_that_ended_in_a_round_that_the_others_lost_goes_back_with_them(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", 2), saved(tmp_path / "b", 2, 3, ended_at=4)
    assert found(a, b) == (2, [2, 2])
    c = saved(tmp_path / "c", 1, 3)  # had reached 3, and lost round 4, in which the other diverged from there
    assert found(c, b) == (3, [3, 3])


def test_all_that_have_ended_are_found_at_their_ends(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", 2, 5, ended_at=5), saved(tmp_path / "b", 5, ended_at=6)
    assert found(a, b) == (6, [5, 5])
    assert found(a) == (5, [5])


def test_they_begin_anew_where_a_kill_fell_into_the_first_save(tmp_path: Path) -> None:
    assert common_start([saved(tmp_path / "a", 2), tmp_path / "b"], pytest.fail) == Start()
    assert common_start([tmp_path / "b"], pytest.fail) == Start()
