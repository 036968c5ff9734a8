"""What the operating system refuses: one sentence with the path and what to do, and still the error it stands for."""

import errno
import os
import pickle
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from topwork.common.errors import RequestError, RunError, TopworkError
from topwork.common.os_errors import as_topwork, explained, os_error_in, why


def told(work: Callable[[], object], started: bool = False) -> str:
    """What becomes of the OSError in `work`, which has to be one of Topwork's and of its own kind."""
    with pytest.raises(OSError) as plain:
        work()
    with pytest.raises(TopworkError) as caught, explained(started=started):
        work()
    assert isinstance(caught.value, type(plain.value))
    assert caught.value.errno == plain.value.errno
    assert "Errno" not in str(caught.value)
    return str(caught.value)


def test_kinds_that_a_path_makes(tmp_path: Path) -> None:
    file, link, ring = tmp_path / "file", tmp_path / "link", tmp_path / "ring"
    file.write_text("x")
    link.symlink_to(tmp_path / "gone")
    ring.symlink_to(ring)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    assert f"{link} is a link to {tmp_path / 'gone'}, which is not there" in told(link.read_bytes)
    assert f"{link} is a link to" in told((link / "deeper" / "a").read_bytes)
    assert told((tmp_path / "no" / "a").read_bytes).startswith(
        f"{tmp_path / 'no' / 'a'} is not there, nor is its folder"
    )
    assert "leads back to itself" in told(ring.read_bytes)
    assert f"{tmp_path} is a folder, and a file is expected" in told(tmp_path.read_bytes)
    assert f"{file} is a file, and a folder is expected" in told((file / "a" / "b").read_bytes)
    assert "is too long for the disk" in told((tmp_path / ("ü" * 200)).read_bytes)
    assert "is there already" in told(file.mkdir)
    assert "is there already" in told(lambda: os.rmdir(tmp_path / "full"))


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (errno.EROFS, "could not be written: its disk can only be read", 2),
        (errno.EIO, "reports an input/output error", 1),
        (errno.ESTALE, "its network disk has lost it", 1),
        (errno.EMFILE, "ulimit -n", 1),
        (errno.EFBIG, "ulimit -f", 1),
        (errno.ENOSPC, "the disk is full", 1),
        (errno.EBUSY, "another program uses it", 1),
        (errno.ENOMEM, "there is no memory for it", 1),
        (errno.EINVAL, "look at that place", 1),
    ],
)
def test_kinds_that_a_disk_makes(number: int, words: str, code: int, tmp_path: Path) -> None:
    made = as_topwork(OSError(number, os.strerror(number), str(tmp_path / "a")))
    assert words in str(made)
    assert str(tmp_path / "a") in str(made)
    assert made.exit_code == code
    nameless = as_topwork(OSError(number, os.strerror(number)))
    assert "None" not in str(nameless)
    assert str(tmp_path) in str(as_topwork(OSError(number, os.strerror(number)), tmp_path / "b"))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        OSError(errno.EADDRINUSE, "Address already in use"),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        ssl.SSLCertVerificationError(1, "certificate verify failed"),  # a number that is EPERM's
    ],
)
def test_what_a_network_refuses_is_no_file(error: OSError, tmp_path: Path) -> None:
    for path in (None, tmp_path):
        made = as_topwork(error, path)
        assert str(made).startswith(f"the network: {error.strerror}; look to it")
        assert made.exit_code == 1
    disk = as_topwork(TimeoutError(errno.ETIMEDOUT, "timed out", str(tmp_path / "a")))
    assert str(disk).startswith(f"{tmp_path / 'a'} could not be"), "of a disk on the network"


def test_what_was_begun_fails_on_its_way(tmp_path: Path) -> None:
    with pytest.raises(RequestError), explained():
        (tmp_path / "none").read_bytes()
    with pytest.raises(RunError) as caught, explained(started=True):
        (tmp_path / "none").read_bytes()
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.filename == str(tmp_path / "none")


def test_what_is_none_of_the_systems_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^plain$"), explained():
        raise ValueError("plain")
    with pytest.raises(BrokenPipeError) as caught, explained():
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    assert not isinstance(caught.value, TopworkError)
    with pytest.raises(OSError, match=r"^the Hub does not answer$"), explained():
        raise OSError("the Hub does not answer")


def test_numbers_from_rust_and_causes_of_libraries_errors(tmp_path: Path) -> None:
    rust = RuntimeError(f'Error opening "{tmp_path}/a": I/O error: Is a directory (os error 21)')
    found = os_error_in(rust)
    assert isinstance(found, IsADirectoryError)
    assert found.filename == f"{tmp_path}/a"
    with pytest.raises(IsADirectoryError), explained():
        raise rust
    library = OSError("Can't load the model")
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "none").read_bytes()
    library.__cause__ = caught.value
    assert why(library).startswith(f"{tmp_path / 'none'} is not there")
    ring = tmp_path / "ring"
    ring.symlink_to(ring)
    with pytest.raises(OSError, match="leads back to itself"), explained():
        raise RuntimeError(f"Symlink loop from {str(ring)!r}")


def test_hidden_names_are_told_by_their_targets(tmp_path: Path) -> None:
    aside = tmp_path / ".topwork-new-m.json-01234567"
    error = PermissionError(errno.EACCES, "no", str(aside))
    assert f"{tmp_path / 'm.json'} cannot be written" in str(as_topwork(error))
    assert str(as_topwork(error, tmp_path / "m.json")).startswith(f"{tmp_path / 'm.json'} cannot be written")


def test_what_rust_takes_for_missing_and_what_the_hub_keeps(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert "no permission for" in why(FileNotFoundError(f"No such file or directory: {tmp_path / 'a'}"))
    assert f"{tmp_path / 'b'} is not there" in why(FileNotFoundError(f"No such file or directory: {tmp_path / 'b'}"))
    kept = as_topwork(PermissionError(errno.EACCES, "no", str(tmp_path / "huggingface" / "hub" / "x")))
    assert "set HF_HOME" in str(kept)


def test_it_travels_between_processes(tmp_path: Path) -> None:
    made = as_topwork(PermissionError(errno.EACCES, "no", str(tmp_path / "a")))
    again = pickle.loads(pickle.dumps(made))
    assert (type(again), str(again), again.errno) == (type(made), str(made), errno.EACCES)


def test_names_that_are_no_text_can_be_told() -> None:
    made = as_topwork(FileNotFoundError(errno.ENOENT, "no", b"/tmp/caf\xe9"))
    assert "caf" in str(made)


@pytest.fixture
def nobody() -> Iterator[None]:
    if not hasattr(os, "seteuid") or os.geteuid() != 0:
        pytest.skip("only root can be another user for a while")
    os.setegid(65534)
    os.seteuid(65534)
    yield
    os.seteuid(0)
    os.setegid(0)


def test_permissions(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file, closed, shared = tmp_path / "file", tmp_path / "closed", tmp_path / "shared"
    file.write_text("x")
    file.chmod(0o600)
    closed.mkdir(mode=0o700)
    shared.mkdir(mode=0o755)
    for place in (tmp_path, *tmp_path.parents[:3]):
        if place.stat().st_uid == 0 and str(place).startswith("/tmp/"):
            place.chmod(0o755)
    request.getfixturevalue("nobody")
    assert f"{file} cannot be read: user nobody has no permission for {file}" in told(file.read_bytes)
    assert f"no permission to enter {closed}" in told((closed / "a").read_bytes)
    new = told(lambda: (shared / "a").write_bytes(b""))
    assert f"{shared / 'a'} cannot be written: user nobody has no permission for {shared}" in new


def test_no_more_files_may_be_opened() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, before[1]))
    try:
        opened: list[object] = []
        with pytest.raises(RunError, match="ulimit -n"), explained():
            opened += [open(os.devnull) for _ in range(used)]  # noqa: SIM115
    finally:
        opened.clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
