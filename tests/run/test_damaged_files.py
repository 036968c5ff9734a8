"""A run's files that are empty, cut short, no UTF-8 or of another kind: told by name and what to do, or passed over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from run.fixtures import Said
from topwork.adapters.peft_format import read_adapter
from topwork.common.errors import RequestError, TopworkError
from topwork.common.files import read_object, write_json
from topwork.reporting.readers import read_run
from topwork.reporting.sweep_state import read_sweep
from topwork.run.folder import read_json, read_recipe
from topwork.run.given import given_run
from topwork.run.opened import open_run
from topwork.run.provenance import refuse_other_inputs
from topwork.training.checkpoint import list_checkpoints, read_state

DAMAGED = {
    "empty": b"", "blank": b"\n", "cut short": b'{"a": 1, "b', "no UTF-8": b'{"a": "\xff"}', "a list": b"[1]",
    "nested too deep": b"[" * 5_000, "a number": b"7", "null": b"null", "zeros": bytes(64),
}  # fmt: skip
damaged = pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@damaged
@pytest.mark.parametrize("name", ["result.json", "provenance.json", "evaluation.json"])
def test_objects_of_a_run(content: bytes, name: str, run: Path) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(RequestError, match=rf"{name} is damaged .*bring back a copy of it"):
        read_json(run / name)
    if name == "provenance.json" or content != b"\n":
        found = read_run(run)
        assert any(name in problem for problem in found.problems) or not content.strip()


@pytest.mark.parametrize("lacks", [{"base": 1}, {"base": {}}, {"base": {"fingerprint": "a"}, "data": []}])
def test_a_provenance_of_other_content_ends_a_resume_by_its_name(lacks: dict[str, object], run: Path) -> None:
    write_json(run / "provenance.json", lacks)
    with pytest.raises(RequestError, match=r"provenance\.json is damaged .*bring back a copy of it"):
        refuse_other_inputs(run, {"base": {}, "data": {}})


def test_what_is_not_there_is_empty_and_a_link_to_nothing_is_told(run: Path) -> None:
    assert read_json(run / "none.json") == {}
    (run / "none.json").symlink_to(run / "gone")
    with pytest.raises(RequestError, match=r"none\.json is a link to .*gone, which is not there"):
        read_json(run / "none.json")
    (run / "dir.json").mkdir()
    with pytest.raises(RequestError, match=r"dir\.json is a folder"):
        read_json(run / "dir.json")


@damaged
def test_a_recipe(content: bytes, run: Path) -> None:
    (run / "recipe.yaml").write_bytes(content)
    with pytest.raises(RequestError, match=r"recipe\.yaml"):
        read_recipe(run)


@damaged
def test_an_adapters_configuration(content: bytes, run: Path) -> None:
    (run / "adapter" / "adapter_config.json").write_bytes(content)
    with pytest.raises(TopworkError, match=r"adapter_config\.json (is not JSON|holds no JSON object)"):
        read_adapter(run / "adapter")


@damaged
def test_a_checkpoints_state(content: bytes, run: Path) -> None:
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    (checkpoint / "state.json").write_bytes(content)
    with pytest.raises(TopworkError, match=r"cannot be read: .*; resume from another"):
        read_state(checkpoint)


@damaged
def test_a_sweep(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(RequestError, match=r"sweep\.json cannot be read"):
        read_sweep(tmp_path)


@pytest.mark.parametrize("place", ["run", "run/adapter", "run/recipe.yaml"])
def test_links_to_nothing(place: str, run: Path) -> None:
    target = run.parent / place
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    target.symlink_to(run.parent / "gone")
    with pytest.raises(RequestError, match=rf"{target} is a link to .*gone, which is not there"):
        given_run(run)


@pytest.mark.parametrize("content", [b"", b'{"a"', b"[1]"])
def test_a_chat_needs_no_result(content: bytes, run: Path) -> None:
    (run / "result.json").write_bytes(content)
    told: list[str] = []
    assert open_run(run, log=told.append).system is None
    assert any("warning: result.json" in line for line in told)


def test_metrics_that_are_torn_or_damaged(run: Path) -> None:
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole + b'{"kind": "tr')
    assert read_run(run).problems == ()
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n[1]\n" + b"[" * 5_000 + b"\n" + whole)
    assert read_run(run).problems == ("metrics.jsonl: 3 unreadable line(s) passed over, the first is 1",)


def test_through_the_command_line(topwork: Callable[..., Said], run: Path) -> None:
    (run / "adapter" / "adapter_config.json").write_bytes(b"\xff")
    said = topwork("chat", run, "Hi")
    assert said.code == 2
    assert "adapter_config.json is not JSON" in said.err
    assert "Traceback" not in said.err


def test_names_of_files_that_are_no_text_are_kept_in_json(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_json(tmp_path / "a.json", {"name": name})
    assert read_object(tmp_path / "a.json", "") == {"name": name}
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"name": name}
