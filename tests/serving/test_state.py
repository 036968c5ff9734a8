"""What a server knows again after `kill -9`."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from topwork.common.errors import AdapterError, RequestError
from topwork.serving.state import KeptAdapter, StateFolder, ToLoad, bring_back

CONTENT = "sha256:" + "0" * 64


def opened(folder: Path, told: list[str] | None = None) -> StateFolder:
    return StateFolder(folder, (told if told is not None else []).append)


def test_what_was_loaded_comes_back_in_its_order(tmp_path: Path) -> None:
    configured = {"a": tmp_path / "a", "b": tmp_path / "b"}
    state = opened(tmp_path / "state")
    state.for_base("sha256:1")
    state.loaded("late", tmp_path / "late", CONTENT, pinned=True)
    state.loaded("x/y.z", tmp_path / "other", CONTENT)
    state.loaded("late", tmp_path / "later", CONTENT)  # replaced: it is the last by now
    state.loaded("b", tmp_path / "new b", CONTENT)
    state.unloaded("a", configured)
    state.keep_routes({"r": {"weights": {"one": 0.5}}})
    state.close()
    again = opened(tmp_path / "state")
    again.for_base("sha256:1")
    said: list[str] = []
    assert again.to_load(configured, said.append) == [
        ToLoad("x/y.z", tmp_path / "other", CONTENT, False, False),
        ToLoad("late", tmp_path / "later", CONTENT, False, False),
        ToLoad("b", tmp_path / "new b", CONTENT, False, False),
    ]
    assert len(said) == 2
    assert said[0].startswith("warning: adapter 'a' is not loaded: it was unloaded while the server ran")
    assert said[1].startswith(f"adapter 'b' comes from {tmp_path / 'new b'}")
    assert again.state.routes == {"r": {"weights": {"one": 0.5}}}
    moved = configured | {"a": tmp_path / "another a"}  # the configuration has changed since it was unloaded
    assert again.to_load(moved)[0] == ToLoad("a", tmp_path / "another a", None, True, True)
    again.unloaded("x/y.z", configured)
    again.unloaded("b", configured)
    assert [each.name for each in again.to_load(configured)] == ["late"]
    again.loaded("a", tmp_path / "a", "")
    assert [each.name for each in again.to_load(configured)] == ["late", "a"]
    again.close()


def test_a_fresh_folder_has_nothing(tmp_path: Path) -> None:
    state = opened(tmp_path / "deep" / "state")
    assert state.to_load({"a": tmp_path}) == [ToLoad("a", tmp_path, None, True, True)]
    assert not state.path.exists()


WRITING = """
import sys
from pathlib import Path
from topwork.serving.state import StateFolder
state = StateFolder(Path(sys.argv[1]))
number = 0
while True:
    state.loaded(f"n{number % 50}", Path("/x") / ("long" * 500), "")
    number += 1
    if number == 60:
        print("going", flush=True)
"""


def test_killed_in_the_middle_of_writing_it_is_whole(tmp_path: Path) -> None:
    """Its lock goes with the process, what was being written goes aside, what stands is some moment's whole."""
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITING, tmp_path / "state"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"going\n"
        with pytest.raises(RequestError, match="another server uses the state folder"):
            opened(tmp_path / "state")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        told: list[str] = []
        state = opened(tmp_path / "state", told)
        assert len(state.to_load({})) == 50
        assert not told
        assert {path.name for path in state.folder.iterdir()} <= {"state.json", "server.lock"}
        state.close()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is not JSON"), ("{", "it is not JSON"), ('{"version": 1, "adapters": [', "it is not JSON"),
        ("[" * 100_000, "it is not JSON"), ("[]", "it: input should be"), ('{"version": 2}', "version: "),
        ('{"adapters": [{"name": "a"}]}', "adapters.0.folder: field required"),
        ('{"adapter": []}', "adapter: extra inputs are not permitted"),
        ('{"adapters": [{"name": "", "folder": "x", "content": ""}]}', "adapters.0.name"),
        ('{"adapters": [{"name": "a", "folder": "x", "content": "md5:1"}]}', "adapters.0.content"),
        (json.dumps({"adapters": [{"name": "a", "folder": "x", "content": ""}] * 2}), "names 'a' twice"),
        ("\udcff", "codec can't decode"),
    ],
)  # fmt: skip
def test_a_torn_or_wrong_one_is_put_aside_with_a_warning(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "state.damaged-1").write_text("an earlier one")
    heard: list[str] = []
    state = opened(tmp_path, heard)
    assert state.to_load({}) == []
    assert len(heard) == 1
    assert heard[0].startswith("warning: ")
    assert told in heard[0]
    assert "put aside as state.damaged-2" in heard[0]
    assert (tmp_path / "state.damaged-2").read_bytes() == text.encode("utf-8", "surrogateescape")
    assert (tmp_path / "state.damaged-1").read_text() == "an earlier one"
    state.loaded("a", tmp_path, CONTENT)
    state.close()
    assert opened(tmp_path).state.adapters == [KeptAdapter(name="a", folder=str(tmp_path), content=CONTENT)]


def test_another_bases_adapters_stay_away(tmp_path: Path) -> None:
    state = opened(tmp_path)
    state.for_base("sha256:1")
    state.loaded("a", tmp_path, CONTENT)
    state.keep_routes({"r": 1})
    heard: list[str] = []
    state.for_base("sha256:1", heard.append)
    assert len(state.to_load({})) == 1
    assert not heard
    state.for_base("sha256:2", heard.append)
    assert not state.to_load({})
    assert "was written for another base; not brought back: 'a'" in heard[0]
    assert state.state.routes == {"r": 1}


def test_one_that_is_gone_is_told_of_and_the_rest_come_back(tmp_path: Path) -> None:
    taken, heard = [], []

    async def take(each: ToLoad) -> None:
        if each.name in ("gone", "changed", "wrong"):
            raise AdapterError(f"adapter {each.name!r} is not what it was")
        taken.append(each.name)

    def each(name: str, configured: bool = False) -> ToLoad:
        return ToLoad(name, tmp_path, CONTENT, False, configured)

    asyncio.run(bring_back([each(name) for name in ("one", "gone", "two", "changed")], take, heard.append))
    assert taken == ["one", "two"]
    assert [line.partition(":")[0] for line in heard] == ["warning", "warning"]
    assert "'gone' was loaded before the last end, and does not come back: adapter 'gone'" in heard[0]
    with pytest.raises(AdapterError, match="'wrong' is not what it was"):
        asyncio.run(bring_back([each("wrong", configured=True)], take))


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be used"):
        opened(tmp_path / "file" / "state")
