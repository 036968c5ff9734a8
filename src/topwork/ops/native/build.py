"""The C kernels: compiled once for this machine's processor, tried once, kept in the cache, loaded with ctypes.

No torch headers: a kernel takes pointers and sizes, builds in a second and outlives torch versions. OpenMP is the one
runtime that torch has loaded already (same name, so the loader shares it): a second pool of threads would fight the
first. A file may be compiled in several ways (`variants.py`); the first that proves right on this processor, in a
process of its own (`proof.py`), is the one that is loaded. Without a compiler everything still runs on plain torch,
slower, and says so once.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from topwork.common.cache import CACHE, advice, cache_root, temporary_root
from topwork.common.os_errors import why
from topwork.ops.native import proof
from topwork.ops.native.variants import AMX as AMX
from topwork.ops.native.variants import MARCH as MARCH
from topwork.ops.native.variants import Variant, amx_refusal, compiler, processor, sources, variants

FLAGS = ("-O3", "-ffp-contract=off", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-Wall")
"""No fused multiply-add by contraction: a product and a sum are rounded as in the plain-torch truth."""
OFF = "TOPWORK_NO_NATIVE"
"""Set in the environment to run on plain torch alone."""
MORE = "topwork doctor tells more"
TOLD: set[str] = set()
"""Warnings that this process has had."""
LEFT_SECONDS = 3600.0
"""Where a compile's folder is older, the process that made it was killed: a compile is given five minutes."""

_OF_COMPILE = "tmp" + 8 * "[a-z0-9_]"
"""The names that `tempfile` gives."""
_NOT_TAKEN = re.compile(
    r"\berror\b(?=.*(unrecogni[sz]ed|unknown|unsupported|not support|bad value|invalid))"
    r"(?=.*([\s'`(=]-[a-z]|\btarget\b))"
    r"|\berror: no such instruction",
    re.IGNORECASE,
)
"""How gcc, clang and their assembler say, on one line, that they do not know an option, a target or an instruction."""
_NO_ROOM = re.compile(r"no space left|quota exceeded|file too large", re.IGNORECASE)
"""How they pass on that a disk is full."""


class RefusedError(Exception):
    """A library that is not to be used, with why, behind "it"; `known` where that was found out before."""

    def __init__(self, why: str, known: proof.Mark | None = None) -> None:
        super().__init__(why)
        self.known = known


@dataclass
class Built:
    """What became of a file.

    loaded     the library; None where plain torch does the work
    variant    how it was compiled; path where it lies
    mark       its proof; None where it could not be tried
    note       why it is used without
    elsewhere  why it does not stand in the cache
    refused    the ways that were better, and why they are not used
    error      why nothing could be compiled or loaded
    """

    loaded: ctypes.CDLL | None = None
    variant: Variant | None = None
    path: Path | None = None
    mark: proof.Mark | None = None
    note: str = ""
    elsewhere: str = ""
    refused: list[tuple[Variant, RefusedError]] = field(default_factory=list)
    error: Exception | None = None


def load(name: str) -> ctypes.CDLL | None:
    """The library of `native/NAME.c`, from the cache; where that cannot be written or run from, from a folder for
    temporary files, with a warning. None, and a warning, where none can be compiled, loaded or proved right. Raises
    RequestError where TOPWORK_AMX says what nobody knows."""
    if os.environ.get(OFF):
        return None
    found = built(name)
    _tell_all(name, found)
    return found.loaded


def built(name: str) -> Built:
    """The best that there is of a file, compiled and tried where that was not done before. Says nothing."""
    found = Built()
    try:
        compiler()
        ways = variants(name)
    except OSError as error:
        found.error = error
        return found
    for variant in ways:
        try:
            _take(name, variant, found)
        except RefusedError as refused:
            found.refused.append((variant, refused))
        except (OSError, subprocess.SubprocessError) as error:
            found.error = found.error or error
            unmade = RefusedError(f"could not be compiled or loaded ({told(error)})")
            unmade.__cause__ = error
            found.refused.append((variant, unmade))
        else:
            found.variant, found.error = variant, None
            break
    if found.loaded is not None and not found.elsewhere:
        _keep_uncompiled(name, found)
    return found


def looked_up(name: str) -> Built:
    """What the cache or, where nothing stands there, the folder for temporary files knows of a file: nothing is
    compiled, tried or loaded."""
    found = Built()
    for variant in variants(name):
        target, mark = next(_marks(name, variant), (None, None))
        if target is None or mark is None:
            found.note = "was not compiled and tried yet"
            return found
        if mark.right:
            found.variant, found.path, found.mark = variant, target, mark
            if target.parent != cache_root() / "native":
                found.elsewhere = f"it lies in {target.parent}, for want of a cache that may be written and run from"
            return found
        found.refused.append((variant, RefusedError(mark.why, mark)))
    return found


def refusals(name: str) -> Iterator[proof.Mark]:
    """The marks of all that was refused of a file, wherever they are."""
    for variant in variants(name):
        yield from (mark for _, mark in _marks(name, variant) if not mark.right)


def _marks(name: str, variant: Variant) -> Iterator[tuple[Path, proof.Mark]]:
    """Of one way to compile a file, with where its library is: of the cache, then of temporary files."""
    under = _key(amx_refusal() if variant.amx else "")
    for root in (cache_root, temporary_root):
        target = _path(name, root() / "native", variant)
        if (mark := proof.kept(target, under)) is not None:
            yield target, mark


def _take(name: str, variant: Variant, found: Built) -> None:
    """From the cache or, where that cannot be written or run from, from temporary files. A compiler that fails in the
    one fails in the other, but for want of room."""
    folder = cache_root() / "native"
    try:
        _loaded(name, variant, folder, found)
    except (OSError, subprocess.CalledProcessError) as error:
        if isinstance(error, subprocess.CalledProcessError) and not _NO_ROOM.search(error.stderr):
            raise
        instead = temporary_root() / "native"
        _loaded(name, variant, instead, found)
        found.elsewhere = f"the C kernels cannot be kept in {folder} ({told(error)}) and are in {instead}. {advice()}"


def _loaded(name: str, variant: Variant, folder: Path, found: Built) -> None:
    target = _path(name, folder, variant)
    asked = amx_refusal() if variant.amx else ""
    under = _key(asked)
    mark = proof.kept(target, under)
    if mark is not None and not mark.right:
        raise RefusedError(mark.why, mark)
    if asked:
        why = f"may not use AMX's registers: the operating system refuses them to this process ({asked})"
        proof.keep(target, under, False, why)
        raise RefusedError(why)
    if mark is None:
        mark, found.note = _proved(name, variant, target, under)
    found.loaded, found.path, found.mark = ctypes.CDLL(str(target)), target, mark


def _proved(name: str, variant: Variant, target: Path, under: str) -> tuple[proof.Mark | None, str]:
    """A mark, or why there is none. What lies there is compiled anew before it is refused: a full disk may have cut it
    short."""
    for fresh in (False, True) if target.exists() else (True,):
        with proof.trial(name, OFF) as trial:
            if fresh:
                _build(name, target, variant)
            verdict = trial.of(target)
        if verdict.kind == "right":
            return proof.keep(target, under, True, ""), ""
        if verdict.kind == "untried":
            break
    if verdict.kind == "not loaded":
        raise OSError(verdict.why)
    if verdict.kind == "refused":
        proof.keep(target, under, False, verdict.why)
        raise RefusedError(verdict.why)
    if variant.amx:
        raise RefusedError(verdict.why)
    return None, verdict.why


def _keep_uncompiled(name: str, found: Built) -> None:
    """What this compiler does not take, where it took another way, is not given to it at every start. That it was
    ended or a disk was full says nothing of a way."""
    for variant, refused in found.refused:
        error = refused.__cause__
        if isinstance(error, subprocess.CalledProcessError) and _NOT_TAKEN.search(error.stderr):
            asked = amx_refusal() if variant.amx else ""
            proof.keep(_path(name, cache_root() / "native", variant), _key(asked), False, str(refused))


def _key(asked: str) -> str:
    """Of marks; another compiler under the same name is another one."""
    found = shutil.which(compiler().split()[0])
    with suppress(OSError):
        return proof.key(asked, str(Path(found).stat().st_mtime_ns) if found else "")
    return proof.key(asked)


def _path(name: str, folder: Path, variant: Variant | None = None) -> Path:
    """Of one way to compile a file, or of the best."""
    flags = _flags(variant or variants(name)[0])
    made_of = [*sources(name).values(), compiler().encode(), " ".join(flags).encode(), processor()]
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()
    return folder / f"{name}-{key[:16]}.so"


def _build(name: str, target: Path, variant: Variant) -> None:
    """Compile aside and move, so that two processes cannot disturb each other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        written, made = Path(work) / f"{name}.c", Path(work) / f"{name}.so"
        for file, source in sources(name).items():
            (Path(work) / file).write_bytes(source)
        print(f"compiling C kernels for this processor, once: {name}.c ...", file=sys.stderr, flush=True)
        subprocess.run(
            [*compiler().split(), *_flags(variant), str(written), "-o", str(made), "-lm"],
            check=True, capture_output=True, text=True, errors="replace", timeout=300,
            env={**os.environ, "LC_ALL": "C"},  # what it says is read
        )  # fmt: skip
        made.replace(target)


def _sweep(folder: Path) -> None:
    """Remove the folders of compiles that were killed. What cannot be removed stays."""
    for left in folder.glob(_OF_COMPILE):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > LEFT_SECONDS and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)


def _flags(variant: Variant) -> tuple[str, ...]:
    return (*variant.flags, *FLAGS)


# What is told


def _tell_all(name: str, found: Built) -> None:
    if found.loaded is None and found.error is not None:
        _tell(
            "none",
            "the C kernels are not to be had here, so plain torch does their work, several times slower: "
            f"{told(found.error)}. Install a C compiler (gcc or clang) and set {CACHE} to a folder that may be "
            f"written and run from, or set {OFF}=1 to be told no more",
        )
        return
    if found.loaded is None:
        reasons = "; ".join(f"compiled {variant.name} it {refused}" for variant, refused in found.refused)
        _tell(name, f"plain torch does the work of the C kernel {name}.c, several times slower: {reasons}. {MORE}")
        return
    for variant, refused in found.refused:
        if refused.known is None and found.variant is not None:
            _tell(
                f"{name} {variant.name}",
                f"the C kernel {name}.c compiled {variant.name} is not used: it {refused}; as compiled "
                f"{found.variant.name} it takes its place. {MORE}",
            )
    if found.note:
        _tell("untried", f"the C kernel {name}.c is used without a proof on this processor: it {found.note}")
    if found.elsewhere:
        _tell("elsewhere", found.elsewhere)


def told(error: Exception) -> str:
    """What the compiler or the system said, in a line."""
    said = (error.stderr or str(error)) if isinstance(error, subprocess.CalledProcessError) else why(error)
    return " ".join(said.split())[-300:]


def _tell(kind: str, what: str) -> None:
    """Once for each kind of reason, not for each library."""
    if kind not in TOLD:
        TOLD.add(kind)
        warnings.warn(what, RuntimeWarning, stacklevel=5)
