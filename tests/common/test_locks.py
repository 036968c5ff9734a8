"""A folder is held by one at a time, and by nobody whose process is gone."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import topwork.common.locks as locks
from topwork.common.errors import RequestError
from topwork.common.holder import me
from topwork.common.locks import HOLDER, LOCK, briefly, locked

HOLD = """
import os, sys, time
from pathlib import Path
from topwork.common.locks import locked
with locked([Path(sys.argv[1])]):
    if sys.argv[2:] == ["fork"] and os.fork() == 0:
        os.close(0), os.close(1)
        time.sleep(5)
        os._exit(0)
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """hold(folder): a process of its own that holds it until it is told to end."""
    started = []

    def begin(folder: Path, *more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str(process.pid)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.fixture(params=["system", "none"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the system locks files, and where it cannot."""
    if request.param == "none":
        monkeypatch.setattr(locks, "_lock_descriptor", without_locks)
    return str(request.param)


def test_who_comes_second_is_told_who_holds_it(hold: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    held = hold(tmp_path / "run")
    before = os.listdir(tmp_path / "run")
    told = f"process {held.pid} on {socket.gethostname()} since 20"
    with pytest.raises(RequestError, match=told), locked([tmp_path / "run"]):
        pytest.fail("it is held")
    assert os.listdir(tmp_path / "run") == before == [LOCK]
    held.communicate("\n")
    with locked([tmp_path / "run"]):
        pass
    assert (tmp_path / "run").exists() is False, "what the first made goes with it, or with the second"


def test_a_killed_holder_holds_nothing(hold: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Also where a process that it forked lives on."""
    held = hold(tmp_path / "run", "fork")
    os.kill(held.pid, signal.SIGKILL)
    held.wait()
    assert str(held.pid) in (tmp_path / "run" / LOCK).read_text()
    with locked([tmp_path / "run"]):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_a_thread_is_refused_as_a_process_is(either: str, tmp_path: Path) -> None:
    told: list[str] = []

    def second() -> None:
        try:
            with locked([tmp_path / "there" / ".." / "run"]):
                told.append("held twice")
        except RequestError as error:
            told.append(str(error))

    (tmp_path / "there").mkdir()
    with locked([tmp_path / "run"]):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in told[0]


def test_what_was_made_for_it_goes_again_and_what_came_into_it_stays(either: str, tmp_path: Path) -> None:
    with locked([tmp_path / "new" / "run"]):
        assert (tmp_path / "new" / "run").is_dir()
    assert not (tmp_path / "new").exists()
    with locked([tmp_path / "new" / "run", tmp_path / "new" / "other"]):
        (tmp_path / "new" / "run" / "recipe.yaml").write_text("")
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["run", "recipe.yaml"]
    (tmp_path / "empty").mkdir()
    with locked([tmp_path / "empty"]):
        pass
    assert list((tmp_path / "empty").iterdir()) == []


def test_without_locks_of_the_system_a_dead_process_holds_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(locks, "_lock_descriptor", without_locks)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    file = tmp_path / HOLDER
    for dead in ({**me(), "pid": gone.pid}, {**me(), "process_start": 1}):  # the other's number was given anew
        file.write_text(json.dumps(dead))
        with locked([tmp_path]):
            assert json.loads(file.read_text())["pid"] == os.getpid()
    file.write_text(json.dumps({**me(), "host": "elsewhere"}))
    with pytest.raises(RequestError, match=rf"on elsewhere since .*delete {file}"), locked([tmp_path]):
        pass
    file.write_text("{")
    with pytest.raises(RequestError, match="another process"), locked([tmp_path]):
        pass
    assert os.listdir(tmp_path) == [HOLDER]


def test_of_many_at_once_one_holds_it_at_a_time(either: str, tmp_path: Path) -> None:
    """Threads that take it, make a file that nobody else may see, and give it back."""
    held, refused, wrong = [], [], []
    run = tmp_path / "run"

    def tries() -> None:
        for _ in range(40):
            try:
                with locked([run]):
                    (run / "own").touch(exist_ok=False)
                    held.append(1)
                    (run / "own").unlink()
            except RequestError:
                refused.append(1)
            except OSError as error:
                wrong.append(error)

    threads = [threading.Thread(target=tries) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(held) + len(refused) == 160
    assert held
    assert list(run.glob("*")) == list(run.glob(".*")) == []


def test_a_moment_is_waited_for(tmp_path: Path) -> None:
    """Four threads count up one file: none of what they add is lost."""
    file = tmp_path / "count"
    file.write_text("0")

    def add() -> None:
        for _ in range(50):
            with briefly(tmp_path):
                count = int(file.read_text())
                time.sleep(0)
                file.write_text(str(count + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() == "200"


def test_whoever_holds_the_folder_itself_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`flock RUN topwork train …`: the first ends when we do."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.05)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    entered = threading.Event()

    def other() -> None:
        with briefly(tmp_path):
            entered.set()

    threading.Thread(target=other, daemon=True).start()
    assert entered.wait(5)
    os.close(held)
