"""What is declared of the C kernels' functions is what their files say."""

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.compiler import needs_compiler
from topwork.ops.native import build, load
from topwork.ops.native.load import SIGNATURES, Signature

SOURCES = {path.stem: path.read_text() for path in Path(load.__file__).parent.glob("*.c")}
PROTOTYPE = re.compile(r"^(\w+) (topwork_\w+)\(([^)]*)\) \{", re.MULTILINE)
TYPES = {
    "int": ctypes.c_int, "int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32, "float": ctypes.c_float, "void": None,
}  # fmt: skip


def type_of(argument: str) -> Any:
    """Any pointer is an address; else the type stands before the name."""
    return ctypes.c_void_p if "*" in argument else TYPES[argument.removeprefix("const ").split()[0]]


def prototypes(source: str) -> dict[str, Signature]:
    """The functions of a C file that Python may call."""
    return {
        name: Signature([] if given == "void" else [type_of(each.strip()) for each in given.split(",")], TYPES[result])
        for result, name, given in PROTOTYPE.findall(source)
    }


def test_a_prototype_is_read_as_c_reads_it() -> None:
    source = (
        "static void helper(int a) {\n}\n"
        "void topwork_one(\n    const float *x, Pair *y, int64_t n,\n    uint32_t key, float by, int threads) {\n}\n"
        "int topwork_two(void) { return 1; }\n"
    )
    at = ctypes.c_void_p
    one = Signature([at, at, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float, ctypes.c_int])
    assert prototypes(source) == {"topwork_one": one, "topwork_two": Signature([], ctypes.c_int)}


@pytest.mark.parametrize("name", SOURCES)
def test_declared_is_what_the_file_says(name: str) -> None:
    found = prototypes(SOURCES[name])
    begun = re.findall(r"^(?!static )\w+ (topwork_\w+)\(", SOURCES[name], re.MULTILINE)
    assert found.keys() == {*begun}
    assert begun, "none was read"
    assert SIGNATURES[name] == found


def test_every_file_is_declared() -> None:
    assert SIGNATURES.keys() == SOURCES.keys()


@needs_compiler
@pytest.mark.parametrize("name", SIGNATURES)
def test_loaded_once_and_told_its_types(name: str) -> None:
    library = load.compiled(name)
    assert library is not None
    assert load.compiled(name) is library
    for function, (arguments, result) in SIGNATURES[name].items():
        assert getattr(library, function).argtypes == arguments
        assert getattr(library, function).restype == result


@needs_compiler
def test_kernels_are_for_floats_on_the_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert load.kernels("layer", torch.empty(1, dtype=dtype)) is load.compiled("layer")
    for dtype in (torch.float16, torch.float64, torch.int32):
        assert load.kernels("layer", torch.empty(1, dtype=dtype)) is None
    assert load.kernels("layer", torch.empty(1, device="meta")) is None


def test_rows_whose_values_lie_side_by_side() -> None:
    x = torch.empty(4, 6)
    for rows in (x, x[:, 2:], x[::2], x[:, :0], x.t()[:, :1]):
        assert load.contiguous_rows(rows)
    for rows in (x.t(), x[:, ::2], x[:1].expand(3, 6).t()):
        assert not load.contiguous_rows(rows)


@needs_compiler
def test_what_takes_its_time_the_first_time_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    monkeypatch.delenv(build.OFF, raising=False)
    compile_it, said = build.subprocess.run, []

    def seen(*arguments: Any, **options: Any) -> Any:
        said.append(capfd.readouterr().err)
        return compile_it(*arguments, **options)

    monkeypatch.setattr(build.subprocess, "run", seen)
    for _ in range(2):
        assert build.load("logprobs") is not None
    assert said == ["compiling C kernels for this processor, once: logprobs.c ...\n"]
    assert capfd.readouterr().err == ""
