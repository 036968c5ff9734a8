"""A cache that cannot be written, run from or found: kernels stand elsewhere, and TOPWORK_CACHE is named."""

import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import pytest

from topwork.common.cache import cache_root, make_cache, temporary_root
from topwork.common.errors import RunError
from topwork.ops.native import build

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))) or "TOPWORK_NO_NATIVE" in os.environ, reason="no C compiler"
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    build.TOLD.clear()
    return place


def no_home(self: Path) -> Path:
    if str(self).startswith("~"):
        raise RuntimeError("Could not determine home directory.")
    return self


def test_without_a_home_it_is_the_users_own_temporary_folder(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.delenv("TOPWORK_CACHE", raising=False)
    root = cache_root()
    assert root.parent == temporary
    assert root == cache_root()
    assert root.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TOPWORK_CACHE", str(temporary / "named"))
    assert cache_root() == temporary / "named"


def test_a_temporary_folder_that_others_may_write_is_not_used(temporary: Path) -> None:
    first = temporary_root()
    first.chmod(0o777)
    second = temporary_root()
    assert second != first
    assert second.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_names_its_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"file is a file, and a folder is expected.*export TOPWORK_CACHE="):
        make_cache(tmp_path / "file" / "gguf")
    make_cache(tmp_path / "new" / "gguf")
    assert list((tmp_path / "new" / "gguf").iterdir()) == []


@needs_compiler
def test_kernels_stand_elsewhere_where_the_cache_is_a_file(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*file.*Set TOPWORK_CACHE") as told:
        assert build.load("quantize4") is not None
    assert "\n" not in str(told[0].message)
    assert sorted(path.suffix for path in (temporary_root() / "native").iterdir()) == [".json", ".so"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load("quantize4") is not None  # told once, and compiled once


@needs_compiler
@pytest.mark.parametrize("stage", ["compiling", "loading"])
def test_kernels_stand_elsewhere_where_the_disk_is_full_or_runs_nothing(
    stage: str, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TOPWORK_CACHE", str(cache))
    run, dlopen = subprocess.run, build.ctypes.CDLL

    def full(command: list[str], **options: object) -> object:
        if stage == "compiling" and str(cache) in " ".join(command):
            raise subprocess.CalledProcessError(1, command, stderr="fatal error: No space left on device")
        return run(command, **options)  # type: ignore[call-overload]

    def not_run(path: str) -> object:
        if stage == "loading" and str(cache) in path:
            raise OSError(f"{path}: failed to map segment from shared object")
        return dlopen(path)

    monkeypatch.setattr(subprocess, "run", full)
    monkeypatch.setattr(build.ctypes, "CDLL", not_run)
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*(No space left|failed to map).*TOPWORK_CACHE"):
        assert build.load("quantize4") is not None


@needs_compiler
def test_a_library_that_was_cut_short_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "cache"))
    target = build._path("quantize4", tmp_path / "cache" / "native")
    target.parent.mkdir(parents=True)
    target.write_bytes(b"\x7fELF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load("quantize4") is not None
    assert target.stat().st_size > 1000


def test_where_no_folder_will_do_plain_torch_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("CC", "true")
    monkeypatch.delenv(build.OFF, raising=False)
    with pytest.warns(RuntimeWarning, match=r"plain torch.*TOPWORK_CACHE"):
        assert build.load("quantize4") is None
