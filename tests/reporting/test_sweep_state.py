"""sweep.json: read strictly, written as it always was, and what was published reads as it did."""

import json
from pathlib import Path

import pytest

from topwork.common.errors import RequestError
from topwork.reporting.sweep_state import TrialState, read_sweep
from topwork.reporting.sweep_text import markdown, page_of

WRITTEN = sorted((Path(__file__).parent / "sweeps").glob("*.json"))
"""By sweeps that knew no types: one was killed in its second wave, one halved and a member of it diverged, one was
measured alone."""
PUBLISHED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("sweep_*.json"))


def put(folder: Path, content: bytes | str) -> Path:
    (folder / "sweep.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.stem)
def test_a_state_is_written_as_it_was_read(file: Path, tmp_path: Path) -> None:
    sweep = read_sweep(put(tmp_path, file.read_bytes()))
    (tmp_path / "sweep.json").unlink()
    sweep.save(tmp_path)
    assert (tmp_path / "sweep.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_sweeps_still_read(file: Path, tmp_path: Path) -> None:
    record = json.loads(file.read_text("utf-8"))["sweep"]
    sweep = read_sweep(put(tmp_path, json.dumps(record)))
    assert json.dumps(sweep.as_json(), sort_keys=True) == json.dumps(record, sort_keys=True)
    assert all(wave.begun for wave in sweep.waves)  # of which the first of them say nothing
    told = [line for line in markdown(page_of(sweep), {}).splitlines() if line.startswith("| ")]
    assert len(told) > len(sweep.trials)
    assert set(told) <= set(file.with_suffix(".md").read_text("utf-8").splitlines())


def test_there_are_such_sweeps() -> None:
    assert len(WRITTEN) == 3
    assert len(PUBLISHED) >= 9


def test_what_is_not_known_yet_stands_nowhere(tmp_path: Path) -> None:
    sweep = read_sweep(put(tmp_path, WRITTEN[1].read_bytes()))
    assert WRITTEN[1].stem == "begun"
    wave = sweep.waves[1]
    assert wave.pass_seconds is None
    assert not {"pass_seconds", "pass_tokens", "peak_memory_bytes"} & sweep.as_json()["waves"][1].keys()
    wave.pass_seconds, wave.peak_memory_bytes = 1.5, None
    told = sweep.as_json()["waves"][1]
    assert (told["pass_seconds"], told["peak_memory_bytes"]) == (1.5, None)
    assert sweep.trials[2].state is TrialState.TRAINING
    assert "cost" not in sweep.as_json()


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('"state": "diverged"', '"state": "resting"', "'members[3].state': input should be 'waiting', 'training', "),
        ('"state": "diverged"', '"state": "Diverged"', "given 'Diverged'"),
        ('"left_at": 0', '"left_at": "0"', "'members[1].left_at': input should be a valid integer, given '0'"),
        ('"left_at": 0', '"left": 0', "'members[1].left_at' is needed and missing; unknown field 'members[1].left'"),
        ('"steps": 2', '"steps": 2.5', "'members[1].result.steps': input should be a valid integer"),
        ('"stopped": "paused"', '"stopped": "tired"', "'members[1].result.stopped': input should be 'finished', "),
        ('"grader": "json"', '"grader": "json", "colour": "red"', "unknown field 'members[0].before.colour'"),
        ('"rows": 3', '"rows": null', "'members[0].before.rows': input should be a valid integer, given None"),
        ('"why": "all', '"because": "all', "'waves[0].why' is needed and missing; unknown field 'waves[0].because'"),
        ('"stops": [', '"stops": 2, "steps": [', "'halving.stops': input should be a valid array, given 2"),
        ('"format": 1', '"format": 2', "'format': input should be 1, given 2"),
        ('"members": [', '"members": [], "trials": [', "'members': list should have at least 1 item"),
        ('"seed": 0', '"seed": NaN', "'members[0].seed': input should be a valid integer"),
        ('"mean": 0.0', '"mean": Infinity', "'points[0].accuracy.mean': input should be a finite number"),
    ],
)
def test_what_does_not_fit_is_told_by_file_and_field(before: str, after: str, told: str, tmp_path: Path) -> None:
    text = next(file for file in WRITTEN if file.stem == "halving").read_text("utf-8")
    assert before in text
    with pytest.raises(RequestError) as caught:
        read_sweep(put(tmp_path, text.replace(before, after, 1)))
    assert str(caught.value).startswith(f"{tmp_path / 'sweep.json'} cannot be read: ")
    assert told in str(caught.value)
    assert str(caught.value).endswith("Mend it, or take the folder away and begin anew")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "it is not whole JSON"),
        (b'{"name": "\xff"}', "it is not whole JSON"),
        ("", "it is not whole JSON"),
        ("[]", "sweep.json cannot be read: input should be an object, given []"),
        ("{}", "'format' is needed and missing; 'name' is needed and missing"),
    ],
)
def test_a_torn_file(content: bytes | str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        read_sweep(put(tmp_path, content))
    assert told in str(caught.value)
    whole = WRITTEN[0].read_bytes()
    with pytest.raises(RequestError, match="not whole JSON"):
        read_sweep(put(tmp_path, whole[: len(whole) // 2]))


def test_a_folder_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no sweep in"):
        read_sweep(tmp_path)
