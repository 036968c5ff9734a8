"""What tests of kernels share."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from reference.compiler import COMPILER, FEATURES, OLDER, WITH_AMX, OlderBuild, build_kernel, build_older
from topwork.ops import feedforward
from topwork.ops.native import build, load, variants


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """However many a test sets, the next one, perhaps of another folder, has as many as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "truth"])
def layer_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test that takes this runs on the C kernels, where there are any, and on plain torch."""
    if request.param == "truth":
        monkeypatch.setattr(load, "compiled", lambda _: None)
    elif load.compiled("layer") is None:
        pytest.skip("no C compiler")


@pytest.fixture
def nan_where_nothing_was_written() -> Iterator[None]:
    """Memory that torch hands out is not a number before it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton() -> ModuleType:
    return pytest.importorskip("triton", reason="triton is not installed (it has wheels for Linux)")


@pytest.fixture
def interpreted() -> Callable[..., list[str]]:
    """Runs a file of cases in Triton's interpreter, which must be chosen before triton is imported; `settings` are of
    its environment."""

    def run(cases: Path, **settings: str) -> list[str]:
        own = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **own, **settings}
        done = subprocess.run([sys.executable, str(cases)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture
def wrong_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[tuple[str, float]]]]:
    """Runs a file of cases (or a family of it) compiled on a GPU: how many there are, and those that are wrong."""

    def run(cases: Path, *family: str) -> tuple[int, list[tuple[str, float]]]:
        monkeypatch.syspath_prepend(str(cases.parent))
        found = list(import_module(cases.stem).cases(*family, torch.device("cuda"), interpreted=False))
        return len(found), [(name, far) for name, far in found if not far <= 1]

    return run


@pytest.fixture(params=OLDER)
def older_build(request: pytest.FixtureRequest, tmp_path: Path) -> OlderBuild:
    """Compiles a kernel as for an older processor, or for a newer one that is emulated: `build_older`."""
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    if "-mno-" in request.param and "avx512bw" not in FEATURES:
        pytest.skip("needs a processor with more to switch off")
    return lambda name: build_older(name, request.param, tmp_path)


Kernels = Callable[[str], ctypes.CDLL | None]


@pytest.fixture(scope="session", params=WITH_AMX, ids=lambda how: how or "as it is here")
def amx_kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """What loads kernels that are made for AMX, the processor's own or emulated."""
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    if not request.param:
        library = load.compiled("decoder")
        if library is not None and library.topwork_decoder_level() == 3:
            return load.compiled
        if not os.environ.keys() & {
            build.OFF,
            variants.AMX,
            variants.MARCH,
        }:  # else a kernel that was refused is a pass
            assert not variants.has_amx() or variants.amx_refusal(), "the kernel for this processor was refused"
        pytest.skip("needs a processor with AMX, and kernels that may use it")
    if "-mno-" in request.param and "avx512bw" not in FEATURES:
        pytest.skip("needs a processor with more to switch off")
    folder, usual = tmp_path_factory.mktemp("with_amx"), load.compiled
    own = {name: build_kernel(name, request.param, folder) for name in ("decoder", "grouped", "layer")}
    return lambda name: own.get(name) or usual(name)


@pytest.fixture
def on_amx(amx_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed-forward kernel itself, without the plain torch that would stand in for it, on one processor."""
    monkeypatch.setattr(load, "compiled", amx_kernels)
    monkeypatch.setattr(feedforward, "feedforward_reference", None)
    monkeypatch.setattr(feedforward, "feedforward_backward_reference", None)
