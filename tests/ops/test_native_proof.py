"""A kernel is tried in a process of its own before it is loaded: what crashes, hangs or is wrong there is not used."""

import ctypes
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.compiler import needs_compiler
from topwork.common.cache import temporary_root
from topwork.common.errors import RequestError
from topwork.ops.native import build, load, proof, prove, variants
from topwork.ops.native.build import built
from topwork.ops.native.proof import Verdict
from topwork.ops.native.trials import TRIALS, Case
from topwork.ops.native.variants import Variant

USUAL = Variant("as usual", ("-O1",))
NAME = "logprobs"
HEAD = b"float *logps, int threads) {"
"""How its function begins."""


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment."""
    for name in (build.OFF, build.MARCH, build.AMX):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path, nothing_chosen: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and nothing was told yet."""
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "cache"))
    build.TOLD.clear()
    return tmp_path / "cache" / "native"


@pytest.fixture
def broken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Variant]:
    """broken(statement, amx) -> a way to compile whose function begins with that; the usual one comes after it."""
    source = variants.sources(NAME)
    assert HEAD in source[f"{NAME}.c"]
    text = source[f"{NAME}.c"].replace(HEAD, HEAD + b"\n#ifdef BREAK\n  BREAK;\n#endif\n")
    monkeypatch.setattr(build, "sources", lambda _: {**source, f"{NAME}.c": text})

    def first(statement: str, amx: bool = False) -> Variant:
        found = Variant("the broken way", ("-O1", f"-DBREAK={statement}"), amx)
        monkeypatch.setattr(build, "variants", lambda _: [found, USUAL])
        return found

    return first


@contextmanager
def untouched(library: Path) -> Iterator[None]:
    """No file is compiled, and none tried."""
    before = sorted((path, path.stat().st_mtime_ns) for path in library.iterdir())
    yield
    assert sorted((path, path.stat().st_mtime_ns) for path in library.iterdir()) == before


class Told:
    """In the place of `proof.trial`: a verdict without a process."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts, self.tried = list(verdicts), []

    @contextmanager
    def __call__(self, name: str, off: str) -> Iterator["Told"]:
        yield self

    def of(self, library: Path) -> Verdict:
        self.tried.append(library.name)
        return self.verdicts.pop(0)


RIGHT = Verdict("right")


@needs_compiler
@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("__builtin_trap()", r"crashed when it was tried \(SIG(ILL|TRAP)"),
        ("*(volatile int *)8 = 1", r"crashed when it was tried \(SIGSEGV"),
        ("for (volatile int x = 1; x;)", "did not end when it was tried"),
        ("return", "computes wrong sums"),
    ],
    ids=["illegal", "segmentation", "hangs", "wrong"],
)
def test_what_is_not_right_is_not_used_told_once_and_remembered(
    statement: str, told: str, broken: Callable[..., Variant], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "SECONDS", 1)
    first = broken(statement)
    with pytest.warns(RuntimeWarning) as seen:
        library = build.load(NAME)
    assert library is not None
    (message,) = [str(one.message) for one in seen]
    assert f"{NAME}.c compiled the broken way is not used: it " in message
    assert "as compiled as usual it takes its place" in message
    assert "\n" not in message
    assert re.search(told, message)
    build.TOLD.clear()  # as in another process
    with untouched(cache), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load(NAME) is not None
    found = built(NAME)
    assert found.variant == USUAL
    assert found.mark is not None
    assert found.mark.right
    ((variant, refused),) = found.refused
    assert variant == first
    assert refused.known is not None
    assert str(refused) in message


@needs_compiler
@pytest.mark.usefixtures("broken")
def test_where_no_way_is_right_plain_torch_does_the_work_and_each_process_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "variants", lambda _: [USUAL, USUAL._replace(name="otherwise", flags=("-O2",))])
    monkeypatch.setattr(proof, "trial", Told(Verdict("refused", "is wrong"), Verdict("refused", "crashed")))
    for _ in range(2):
        build.TOLD.clear()
        with pytest.warns(RuntimeWarning) as seen:
            assert build.load(NAME) is None
        (message,) = [str(one.message) for one in seen]
        assert f"plain torch does the work of the C kernel {NAME}.c" in message
        assert "compiled as usual it is wrong; compiled otherwise it crashed" in message


@needs_compiler
@pytest.mark.usefixtures("broken")
def test_what_the_compiler_does_not_take_is_remembered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "cc"
    script.write_text(f'#!/bin/sh\nexec {variants.compiler()} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(build, "variants", lambda _: [Variant("strangely", ("-fno-such-flag",)), USUAL])
    monkeypatch.setattr(proof, "trial", Told(RIGHT, RIGHT, RIGHT))
    with pytest.warns(RuntimeWarning, match=r"strangely is not used: it could not be compiled .*no-such-flag"):
        assert build.load(NAME) is not None
    build.TOLD.clear()
    with monkeypatch.context() as changed, warnings.catch_warnings():
        changed.setattr(subprocess, "run", None)
        warnings.simplefilter("error")
        assert build.load(NAME) is not None
    os.utime(script, (1, 1))  # another one under its name
    with pytest.warns(RuntimeWarning, match="strangely is not used"):
        assert build.load(NAME) is not None


@needs_compiler
@pytest.mark.parametrize(
    ("fails", "again"),
    [
        ("kill -9 $$", True),
        ("echo 'gcc: fatal error: Killed signal terminated program cc1' >&2; exit 1", True),
        ("echo \"cc: error: unrecognized command-line option '-mamx'\" >&2; exit 1", False),
        ("[ $LC_ALL = C ] && echo \"cc1: error: bad value 'x' for '-march=' switch\" >&2; exit 1", False),
    ],
    ids=["killed", "ended", "unknown", "told in English"],
)
def test_only_what_the_compiler_does_not_know_is_remembered_of_it_and_all_is_asked_once(
    fails: str, again: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, asked = tmp_path / "cc", tmp_path / "asked"
    fails = f'case "$*" in *-DFIRST*) echo >> {asked}; {fails};; esac'
    script.write_text(f'#!/bin/sh\n{fails}\nexec {variants.compiler()} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(build, "variants", lambda _: [Variant("first", ("-DFIRST",)), USUAL])
    monkeypatch.setattr(proof, "trial", Told(RIGHT))
    for times in (1, 2 if again else 1):
        found = built(NAME)
        assert found.variant == USUAL
        assert found.path is not None
        assert found.path.parent == cache
        ((_, refused),) = found.refused
        assert "could not be compiled or loaded ()" not in str(refused)
        assert asked.read_text() == "\n" * times


@needs_compiler
def test_a_compiler_without_room_in_the_cache_has_it_elsewhere(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "cc"
    full = f'case "$*" in *{cache}*) echo "ld: final link failed: No space left on device" >&2; exit 1;; esac'
    script.write_text(f'#!/bin/sh\n{full}\nexec {variants.compiler()} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(build, "temporary_root", lambda: tmp_path / "other")
    monkeypatch.setattr(build, "variants", lambda _: [USUAL])
    monkeypatch.setattr(proof, "trial", Told(RIGHT))
    found = built(NAME)
    assert found.loaded is not None
    assert found.path is not None
    assert found.path.parent == tmp_path / "other" / "native"
    assert "No space left" in found.elsewhere


@needs_compiler
def test_a_compiler_without_an_end_is_not_asked_elsewhere(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    asked = []

    def ends(command: list[str], **options: Any) -> None:
        asked.append(command)
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(build, "variants", lambda _: [USUAL])
    monkeypatch.setattr(build.subprocess, "run", ends)
    assert built(NAME).loaded is None
    assert len(asked) == 1
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("gcc: error: unrecognized command-line option '-mamx-nope'; did you mean '-mamx-tile'?", True),
        ("cc1: error: bad value 'nonsense' for '-march=' switch\ncc1: note: valid arguments are: native", True),
        ("cc1: error: unknown value 'nonsense' for '-march'", True),
        ("cc1: error: attribute 'target' argument 'amx-zzz' is unknown", True),
        ("/tmp/x.s: Assembler messages:\n/tmp/x.s:7: Error: no such instruction: `tilezero %tmm0'", True),
        ("clang: error: unknown argument: '-fno-such-flag'", True),
        ("clang: error: unsupported option '-fopenmp'", True),
        ("clang: error: unsupported argument 'native' to option '-march='", True),
        ("clang: error: the clang compiler does not support '-march=native'", True),
        ("error: unknown target CPU 'nonsense'\nnote: valid target CPU values are: i386, native", True),
        ("clang: error: invalid value 'x' in '-std=x'", True),
        ("", False),
        ("gcc: fatal error: Killed signal terminated program cc1\ncompilation terminated.", False),
        ("cc1: out of memory allocating 65536 bytes after a total of 1024 bytes", False),
        ("Cannot create temporary file in /tmp/: No space left on device", False),
        ("x.c:1:1: fatal error: error writing to /tmp/x.s: No space left on device", False),
        ("/usr/bin/ld: final link failed: No space left on device\ncollect2: error: ld returned 1 exit status", False),
        ("/usr/bin/ld: /tmp/x.o: file not recognized: file truncated\ncollect2: error: ld returned 1", False),
        ("x.c:3:1: error: unknown type name 'vecf'\ncc1: warning: unrecognized option '-Wx'", False),
    ],
)  # fmt: skip
def test_what_compilers_say_of_what_they_do_not_know(said: str, expected: bool) -> None:
    assert bool(build._NOT_TAKEN.search(said)) is expected


@needs_compiler
def test_another_kernel_torch_or_set_of_trials_is_another_proof(
    broken: Callable[..., Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken("return")
    tried = Told(Verdict("refused", "is wrong"), RIGHT)
    monkeypatch.setattr(proof, "trial", tried)
    assert built(NAME).variant == USUAL
    assert built(NAME).variant == USUAL
    assert len(tried.tried) == 2
    for part in ("platform.release", "_torch", "_trials"):
        tried.verdicts = [RIGHT]
        with monkeypatch.context() as changed:
            changed.setattr(f"topwork.ops.native.proof.{part}", lambda: "another")
            found = built(NAME)
        assert found.variant is not None
        assert found.variant.name == "the broken way"
        assert tried.verdicts == []
    assert built(NAME).variant == USUAL  # under the first, nothing has changed


@needs_compiler
@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"right": 1, "why": "", "digest": "", "at": ""}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_mark_that_cannot_be_read_is_made_again(damage: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Told(RIGHT, RIGHT)
    monkeypatch.setattr(proof, "trial", tried)
    found = built(NAME)
    assert found.mark is not None
    found.mark.path.write_bytes(damage)
    assert built(NAME).loaded is not None
    assert tried.verdicts == []
    assert json.loads(found.mark.path.read_text())["right"] is True
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_a_mark_is_of_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library under its name is tried, and compiled anew before it is refused."""
    tried = Told(RIGHT, Verdict("not loaded", "cannot be loaded"), RIGHT)
    monkeypatch.setattr(proof, "trial", tried)
    found = built(NAME)
    assert found.path is not None
    whole = found.path.read_bytes()
    found.path.unlink()  # it is loaded: only its name may be written to
    found.path.write_bytes(b"\x7fELF")
    assert built(NAME).loaded is not None
    assert found.path.read_bytes() == whole
    assert tried.verdicts == []


@needs_compiler
def test_amx_that_the_operating_system_refuses(
    broken: Callable[..., Variant], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither compiled nor tried; a process that is allowed to use it is another matter."""
    first = broken("(void)0", amx=True)
    tried = Told(RIGHT, RIGHT)
    monkeypatch.setattr(proof, "trial", tried)
    monkeypatch.setattr(build, "amx_refusal", lambda: "Operation not permitted")
    with pytest.warns(RuntimeWarning, match=r"it may not use AMX's registers: .*\(Operation not permitted\)"):
        assert build.load(NAME) is not None
    build.TOLD.clear()
    with untouched(cache), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load(NAME) is not None
    assert len(tried.tried) == 1
    monkeypatch.setattr(build, "amx_refusal", lambda: "")
    assert built(NAME).variant == first


@needs_compiler
def test_where_nothing_can_be_tried_amx_is_not_used_and_the_rest_is(
    broken: Callable[..., Variant], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken("(void)0", amx=True)
    monkeypatch.setattr(build, "amx_refusal", lambda: "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.warns(RuntimeWarning) as seen:
        assert build.load(NAME) is not None
    said = [str(one.message) for one in seen]
    assert any("the broken way is not used: it could not be tried" in message for message in said)
    assert any(f"{NAME}.c is used without a proof" in message for message in said)
    assert not list(cache.glob("*.json")), "it says nothing of the library"


@pytest.mark.parametrize(
    ("code", "said", "kind"),
    [
        (-9, [proof.READY], "untried"),  # no memory left
        (-15, [proof.READY], "untried"),
        (-14, [proof.READY], "refused"),
        (-11, [proof.READY], "refused"),
        (-11, [], "refused"),
        (1, [], "untried"),  # torch could not be imported
        (1, [proof.READY], "refused"),
        (0, [proof.READY, "nonsense"], "refused"),
        (0, [proof.READY, '{"kind": "right", "why": ""}'], "right"),
        (0, [proof.READY, '{"kind": "not loaded", "why": "x"}'], "not loaded"),
    ],
)
def test_how_the_process_ended_is_what_it_says(code: int, said: list[str], kind: str) -> None:
    assert proof._verdict(code, said, "Traceback\nValueError: why").kind == kind


@pytest.mark.parametrize(
    "err", ["libgomp: Thread creation failed: Resource temporarily unavailable", "what():  std::bad_alloc"]
)
def test_a_machine_that_has_nothing_left_says_nothing_of_a_kernel(err: str) -> None:
    for code in (1, -6):
        assert proof._verdict(code, [proof.READY], err).kind == "untried"


@needs_compiler
def test_a_mark_stands_elsewhere_where_the_cache_cannot_be_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image whose kernels were compiled before, and whose disk can only be read."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tried = Told(RIGHT, RIGHT)
    monkeypatch.setattr(proof, "trial", tried)
    first = built(NAME)
    assert first.mark is not None
    first.mark.path.unlink()
    write = proof._write_whole

    def refused(mark: proof.Mark) -> None:
        if mark.path.parent == cache:
            raise PermissionError(13, "Permission denied", str(mark.path))
        write(mark)

    monkeypatch.setattr(proof, "_write_whole", refused)
    monkeypatch.setattr(proof.os, "access", lambda path, _: Path(path) != cache)
    for _ in range(2):
        found = built(NAME)
        assert found.path == first.path
        assert found.mark is not None
        assert found.mark.path.parent == temporary_root() / "native"
    assert tried.verdicts == []


@needs_compiler
def test_the_folders_of_compiles_that_were_killed_are_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old ones, and nothing else."""
    monkeypatch.setattr(proof, "trial", Told(RIGHT))
    dead, running, others = cache / "tmpab_cd3ef", cache / "tmpabcdefgh", tmp_path / "others"
    kept = [running, others, cache / "tmp", cache / "tmpabc", cache / "tmpabcdefghi", cache / "rows"]
    for folder in (dead, *kept):
        folder.mkdir(parents=True)
        (folder / "x.c").write_text("x")
    (cache / "tmpzzzzzzzz").symlink_to(others)
    (cache / "tmpyyyyyyyy").write_text("a file")
    long_ago = time.time() - build.LEFT_SECONDS - 60
    for path in (dead, *kept[1:], cache / "tmpzzzzzzzz", cache / "tmpyyyyyyyy"):
        os.utime(path, (long_ago, long_ago), follow_symlinks=False)
    assert built(NAME).loaded is not None
    assert not dead.exists()
    assert all((folder / "x.c").exists() for folder in kept)
    assert (cache / "tmpzzzzzzzz" / "x.c").exists()
    assert (cache / "tmpyyyyyyyy").exists()


@needs_compiler
def test_two_processes_at_once(cache: Path) -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); from topwork.ops.native import build;"
        f"found = build.built({NAME!r}); assert found.loaded and found.mark and not found.refused"
    )
    begun = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in begun]
    assert [code for _, code in ended] == [0, 0], ended
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".so"]
    with untouched(cache):
        assert built(NAME).loaded is not None


@needs_compiler
@pytest.mark.usefixtures("nothing_chosen")
def test_amx_emulated_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.AMX, "emulated")
    found = built("grouped")
    assert found.refused == []
    assert found.variant is not None
    assert found.variant.name == "with AMX emulated"
    assert found.loaded is not None
    assert found.loaded.topwork_grouped_level() == 3


# What is tried


class _Calls:
    """A library that notes which of its functions are called."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.real, self.called = library, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self.real, name)


@needs_compiler
@pytest.mark.parametrize("name", TRIALS)
def test_every_function_is_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = load.compiled(name)
    assert library is not None
    calls = _Calls(library)
    monkeypatch.setattr(load, "compiled", lambda asked: calls if asked == name else None)
    cases = TRIALS[name]()
    assert {function for function in load.SIGNATURES[name] if not function.endswith("_level")} <= calls.called
    assert all(case.far() <= case.limit for case in cases)
    assert any(case.found.numel() > 500 for case in cases)
    assert not any(same_memory(case.found, case.expected) for case in cases), "a result is compared with itself"


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_every_file_has_trials() -> None:
    assert TRIALS.keys() == load.SIGNATURES.keys()


def test_one_wrong_value_is_seen() -> None:
    right = torch.randn(30, 40)
    for wrong in (right[7, 5] + 0.5, torch.nan):
        found = right.clone()
        found[7, 5] = wrong
        assert "computes wrong sums (x: " in prove.fault(lambda found=found: [Case("x", found, right, 0.1)])
    assert "computes wrong sums" in prove.fault(lambda: [Case("x", right[1:], right, 0.1)])
    assert prove.fault(lambda: [Case("x", right + 1e-4, right, 0.1)]) == ""


def test_other_bits_on_more_threads_are_seen() -> None:
    def cases() -> list[Case]:
        return [Case("x", torch.ones(3) + 1e-3 * torch.get_num_threads(), torch.ones(3), 0.1)]

    threads = torch.get_num_threads()
    assert prove.fault(cases) == "computes other sums on 3 threads than on one (x)"
    torch.set_num_threads(threads)


# Which ways there are


INTEL = b"flags: avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8"


def names(name: str) -> list[str]:
    return [" ".join(variant.flags) for variant in variants.variants(name)]


@pytest.mark.usefixtures("nothing_chosen")
def test_ways_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "is_x86", lambda: True)
    monkeypatch.setattr(variants, "processor", lambda: INTEL)
    monkeypatch.setattr(variants, "amx_refusal", lambda: "")
    without = ["-march=native -DNO_AMX", "-march=x86-64 -DNO_AMX"]
    for name in ("attention", "grouped"):
        assert names(name) == ["-march=native", *without]
        assert [variant.amx for variant in variants.variants(name)] == [True, False, False]
    assert names("layer") == ["-march=native", "-march=x86-64"], "it has no use for AMX"
    assert not any(variant.amx for variant in variants.variants("layer"))
    monkeypatch.setenv(build.AMX, "off")
    assert names("grouped") == without
    monkeypatch.setenv(build.AMX, "emulated")
    assert names("grouped") == ["-march=native -DEMULATE_AMX", *without]
    assert names("layer") == ["-march=native", "-march=x86-64"]
    monkeypatch.delenv(build.AMX)
    monkeypatch.setattr(variants, "processor", lambda: b"flags: avx2 avx512f avx512_bf16")
    assert names("grouped") == without
    monkeypatch.setattr(variants, "is_x86", lambda: False)
    assert names("grouped") == ["-march=native -DNO_AMX", "-DNO_AMX"]


@pytest.mark.usefixtures("nothing_chosen")
def test_a_processor_that_was_named_is_the_only_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "is_x86", lambda: True)
    monkeypatch.setattr(variants, "processor", lambda: b"flags: avx2")
    monkeypatch.setenv(build.MARCH, "x86-64-v3")
    assert names("grouped") == ["-march=x86-64-v3 -DNO_AMX"]
    assert names("layer") == ["-march=x86-64-v3"]
    monkeypatch.setattr(variants, "processor", lambda: INTEL)
    for refusal, flags in (("", "-march=x86-64-v3"), ("no", "-march=x86-64-v3 -DNO_AMX")):
        monkeypatch.setattr(variants, "amx_refusal", lambda refusal=refusal: refusal)
        assert names("grouped") == [flags]
    monkeypatch.setenv(build.AMX, "emulated")
    assert names("grouped") == ["-march=x86-64-v3 -DEMULATE_AMX"]


@pytest.mark.usefixtures("nothing_chosen")
def test_what_is_not_known_of_amx_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.AMX, "on")
    for name in ("grouped", "layer"):
        with pytest.raises(RequestError, match=r"TOPWORK_AMX is 'on', expected off or emulated"):
            build.load(name)


def test_a_file_is_what_it_includes() -> None:
    assert {"grouped.c", "tile.h", "amx.h", "simd.h"} <= variants.sources("grouped").keys()
    assert variants.sources("logprobs").keys() == {"logprobs.c", "rows.h", "simd.h"}
    headers = {path.name for path in Path(build.__file__).parent.glob("*.h")}
    assert headers == {file for name in TRIALS for file in variants.sources(name) if file.endswith(".h")}
