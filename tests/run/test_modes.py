"""What Topwork writes has the modes that the umask gives, whatever a library made it with."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from run.fixtures import Said
from topwork.common.files import whole_file, write_folder

FOLDERS = {0o022: 0o755, 0o077: 0o700, 0o002: 0o775}


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def modes(place: Path) -> dict[str, int]:
    """The modes of a folder and of all in it, but for a program's own rights."""
    return {str(path.relative_to(place)): path.stat().st_mode & 0o777 for path in (place, *place.rglob("*"))}


def check(place: Path, mask: int) -> None:
    found = modes(place)
    usual = {name: FOLDERS[mask] & (0o777 if (place / name).is_dir() else 0o666) for name in found}
    assert found == usual
    assert len(found) > 2


def private(path: Path) -> None:
    """As safetensors and all that write through `tempfile` leave their files."""
    path.write_bytes(b"weights")
    path.chmod(0o600)


@pytest.mark.parametrize("mask", FOLDERS)
def test_whatever_a_library_makes(mask: int, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "inner").mkdir(mode=0o700)
        private(folder / "a.safetensors")
        private(folder / "inner" / "b.safetensors")

    with umask(mask):
        write_folder(tmp_path / "model", fill)
        with whole_file(tmp_path / "model" / "m.gguf") as aside:
            private(aside)
    check(tmp_path / "model", mask)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_runs_and_what_is_made_of_them(
    mask: int, topwork: Callable[..., Said], make_recipe: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = make_recipe(training={"max_steps": 2, "save_steps": 1, "eval_steps": 1}, data={"eval_fraction": 0.05})
    made: dict[str, tuple[object, ...]] = {
        "merged": ("merge", run, tmp_path / "merged", "--check", "0"),
        "peft": ("export", run, tmp_path / "peft", "--format", "peft", "--check", "0"),
        "gguf": ("export", run, tmp_path / "gguf", "--format", "gguf-adapter", "--check", "0"),
        "quantized": ("quantize", tiny_llama, tmp_path / "quantized"),
    }
    with umask(mask):
        assert topwork("train", recipe).code == 0
        for words in made.values() if mask == 0o022 else ():
            assert topwork(*words).code == 0
    check(run, mask)
    for name in made if mask == 0o022 else ():
        check(tmp_path / name, mask)
