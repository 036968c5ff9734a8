"""Files and folders are whole at every moment: after errors, a full disk and a process that dies."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reference.tiny_disk import printed_on_a_tiny_disk
from topwork.common.errors import CheckpointError, RunError
from topwork.common.files import (
    MANIFEST,
    append_line,
    clear_leftovers,
    recover_folder,
    recover_folders,
    remove_folder,
    sha256_bytes,
    sha256_file,
    verify_folder,
    write_bytes,
    write_folder,
    write_json,
    write_text,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fill(text: str):
    def write(path: Path) -> None:
        (path / "a.txt").write_text(text)
        (path / "inner").mkdir()
        (path / "inner" / "b.txt").write_text(text * 100)

    return write


def full_disk(path: Path) -> None:
    (path / "half.bin").write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_files_hold_what_was_written(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "a.bin", b"\x00\xff")
    write_text(tmp_path / "b.txt", "grüße\r\n")
    write_json(tmp_path / "c.json", {"b": 1, "a": [0.1]})
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b.txt").read_bytes() == "grüße\r\n".encode()
    assert (tmp_path / "c.json").read_text() == '{\n  "a": [\n    0.1\n  ],\n  "b": 1\n}\n'
    assert names(tmp_path) == {"new", "b.txt", "c.json"}


def test_sha256_of_bytes_and_file_is_the_standards(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_bytes(b"abc") == sha256_file(tmp_path / "abc") == expected


def test_json_refuses_nan_and_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))
    assert (tmp_path / "a.json").read_text() == "1\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=r"disk is full: .*a\.txt.*MiB are free.*output_dir.*Nothing") as caught:
        write_text(tmp_path / "a.txt", "new")
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == {"a.txt"}
    assert (tmp_path / "a.txt").read_text() == "old"


def test_other_errors_are_told_and_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"a\.txt.*input/output error"):
        write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == set()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write_text(tmp_path / "real" / "a.txt", "old")
    (tmp_path / "a.txt").symlink_to(tmp_path / "real" / "a.txt")
    (tmp_path / "folder").symlink_to(tmp_path / "real" / "folder")
    (tmp_path / "real" / "folder").mkdir()
    write_text(tmp_path / "a.txt", "new")
    write_folder(tmp_path / "folder", fill("new"), replace=True)
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "new"
    verify_folder(tmp_path / "real" / "folder")


def test_folder_has_a_sorted_manifest_and_verifies(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    write_folder(target, fill("x"))
    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest == {
        "files": {
            "a.txt": {"sha256": sha256_bytes(b"x"), "bytes": 1},
            "inner/b.txt": {"sha256": sha256_bytes(b"x" * 100), "bytes": 100},
        }
    }
    assert list(manifest["files"]) == sorted(manifest["files"])
    verify_folder(target)
    assert names(target.parent) == {"out"}


def test_everything_is_fsynced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("reads file names of handles from /proc")
    seen: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(handle: int) -> None:
        seen.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        fsync(handle)

    def watched_rename(source: Path, target: Path) -> None:
        seen.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    write_folder(tmp_path / "out", fill("x"))
    at = seen.index("rename")
    aside = min(seen[:at], key=len)
    inside = {os.path.relpath(name, aside) for name in seen[:at]}
    assert inside == {".", "a.txt", "inner", "inner/b.txt", MANIFEST}
    assert seen[at + 1 :] == ["."]


def test_existing_folder_is_kept_unless_replace(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write_folder(target, fill("old"))
    with pytest.raises(RunError, match="exists already"):
        write_folder(target, fill("new"))
    assert (target / "a.txt").read_text() == "old"
    write_folder(target, fill("new"), replace=True)
    assert (target / "a.txt").read_text() == "new"
    verify_folder(target)
    assert names(tmp_path) == {"out"}


def test_a_file_in_the_way_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        write_folder(tmp_path / "out", fill("new"), replace=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", fill("x"))
    verify_folder(tmp_path / "out")
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_failing_writer_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    write_folder(tmp_path / "out", fill("old"))

    def failing(path: Path) -> None:
        (path / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_folder(tmp_path / "out", failing, replace=True)
    assert names(tmp_path) == {"out"}
    verify_folder(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_failing_second_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "out", fill("old"))
    rename, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match=r"out.*input/output error"):
        write_folder(tmp_path / "out", fill("new"), replace=True)
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


class RustError(Exception):
    """safetensors' own error is no OSError."""


@pytest.mark.parametrize("rust", [False, True])
def test_full_disk_leaves_the_old_folder(tmp_path: Path, rust: bool) -> None:
    write_folder(tmp_path / "out", fill("old"))

    def write(path: Path) -> None:
        if rust:
            raise RustError("Error while serializing: I/O error: No space left on device (os error 28)")
        full_disk(path)

    with pytest.raises(RunError, match=r"disk is full: .*out.*MiB are free"):
        write_folder(tmp_path / "out", write, replace=True)
    assert names(tmp_path) == {"out"}
    verify_folder(tmp_path / "out")


ON_A_TINY_DISK = """
import sys
from pathlib import Path
from topwork.common.errors import RunError
from topwork.common.files import append_line, verify_folder, write_bytes, write_folder

disk = Path(sys.argv[1])
write_folder(disk / "out", lambda path: (path / "a").write_bytes(b"old" * 1000))
write_bytes(disk / "a.bin", b"old")
for action in (
    lambda: write_folder(disk / "out", lambda path: (path / "a").write_bytes(bytes(2 << 20)), replace=True),
    lambda: write_bytes(disk / "a.bin", bytes(2 << 20)),
    lambda: append_line(open(disk / "log", "ab", buffering=0), "x" * (2 << 20)),
):
    try:
        action()
    except RunError as error:
        assert "disk is full" in str(error), error
        print("refused")
    (disk / "log").unlink(missing_ok=True)
verify_folder(disk / "out")
assert (disk / "a.bin").read_bytes() == b"old"
assert sorted(path.name for path in disk.iterdir()) == ["a.bin", "out"], list(disk.iterdir())
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    assert printed_on_a_tiny_disk(ON_A_TINY_DISK, tmp_path) == ["refused"] * 3


def test_leftovers_of_this_target_go_and_others_stay(tmp_path: Path) -> None:
    for name in (".topwork-new-out-0a1b2c3d", ".topwork-new-out-b-0a1b2c3d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    (tmp_path / ".topwork-new-a.json-0a1b2c3d").write_text("half")
    write_folder(tmp_path / "out", fill("x"))
    assert names(tmp_path) == {"out", ".topwork-new-out-b-0a1b2c3d", ".topwork-new-a.json-0a1b2c3d"}
    clear_leftovers(tmp_path)
    assert names(tmp_path) == {"out"}


def test_recover_brings_the_old_back_or_removes_it(tmp_path: Path) -> None:
    write_folder(tmp_path / ".topwork-old-one", fill("old"))
    write_folder(tmp_path / ".topwork-old-two", fill("old"))
    write_folder(tmp_path / "new", fill("new"))
    (tmp_path / "new").rename(tmp_path / "two")
    recover_folder(tmp_path / "absent")
    recover_folders(tmp_path)
    assert names(tmp_path) == {"one", "two"}
    assert (tmp_path / "one" / "a.txt").read_text() == "old"
    assert (tmp_path / "two" / "a.txt").read_text() == "new"


DIES_AT_EACH_EVENT = """
import os, sys
from pathlib import Path
from topwork.common.files import recover_folder, verify_folder, write_folder

def fill(text):
    def write(path):
        (path / "a").write_text(text)
        (path / "b").write_text(text)
    return write

def write_and_die(event):
    seen = 0
    def hook(name, arguments):
        nonlocal seen
        seen += name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir")
        if seen == event:
            os._exit(1)
    sys.addaudithook(hook)
    write_folder(target, fill("new"), replace=True)
    os._exit(0)

target = Path(sys.argv[1], "out")
found = []
for event in range(1, 1000):
    write_folder(target, fill("old"), replace=True)
    child = os.fork() or write_and_die(event)
    died = os.waitpid(child, 0)[1] != 0
    missing = not target.exists()
    recover_folder(target)
    verify_folder(target)
    text = (target / "a").read_text()
    assert text == (target / "b").read_text() and text in ("old", "new")
    found.append(text + " aside" * missing)
    if not died:
        break
write_folder(target, fill("last"), replace=True)
assert os.listdir(sys.argv[1]) == ["out"], os.listdir(sys.argv[1])
print(",".join(found))
"""


def test_dying_at_any_step_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DIES_AT_EACH_EVENT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = done.stdout.strip().split(",")
    assert len(found) > 15
    assert found[-1] == "new"
    assert list(dict.fromkeys(found)) == ["old", "old aside", "new"]  # in this order, and each was met


WRITES_FOR_EVER = """
import itertools, sys
from pathlib import Path
from topwork.common.files import write_folder

def fill(text):
    def write(path):
        for name in "abc":
            (path / name).write_text(text * 1000)
    return write

for turn in itertools.count():
    write_folder(Path(sys.argv[1]), fill(f"{turn} "), replace=True)
    if turn == 0:
        print("ready", flush=True)
"""


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    moments = random.Random(0)
    target = tmp_path / "out"
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITES_FOR_EVER, target], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        recover_folder(target)
        verify_folder(target)
        assert len({(target / name).read_text() for name in "abc"}) == 1
    write_folder(target, fill("last"), replace=True)
    assert names(tmp_path) == {"out"}


def test_removing_is_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "out", fill("x"))

    def dies(path: Path, ignore_errors: bool = False) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == set()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path / "a.txt"), r"a\.txt was altered"),
        (lambda path: (path / "inner" / "b.txt").write_text("xx"), r"inner/b\.txt is truncated \(2 of 100 bytes\)"),
        (lambda path: (path / "inner" / "b.txt").write_text("x" * 101), r"inner/b\.txt was altered"),
        (lambda path: (path / "a.txt").unlink(), r"a\.txt is missing"),
        (lambda path: (path / MANIFEST).unlink(), r"manifest\.json is missing"),
        (lambda path: (path / MANIFEST).write_text('{"files": {"a.txt"'), r"manifest\.json is damaged"),
        (lambda path: (path / MANIFEST).write_text('{"files": {"a.txt": 1}}'), r"manifest\.json is damaged"),
        (lambda path: (path / MANIFEST).write_text("[]"), r"manifest\.json is damaged"),
        (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"), r"manifest\.json is damaged"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    write_folder(tmp_path / "out", fill("x"))
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        verify_folder(tmp_path / "out")


def test_verifying_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent is not whole"):
        verify_folder(tmp_path / "absent")


class CountingFile(io.FileIO):
    """Counts the calls, and takes only `most` bytes in each."""

    most = 1 << 20
    calls = 0

    def write(self, data) -> int:
        self.calls += 1
        return super().write(data[: self.most])


def test_append_line_is_one_call_and_survives_a_short_write(tmp_path: Path) -> None:
    with CountingFile(tmp_path / "log", "ab") as file:
        append_line(file, "grüße")
        assert file.calls == 1
        file.most = 4
        append_line(file, "0123456789")
    assert (tmp_path / "log").read_text() == "grüße\n0123456789\n"
