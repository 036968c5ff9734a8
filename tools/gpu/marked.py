"""The repository's own tests and cases for a card, where it stands: kernels' case files, and tests marked `gpu`.

A test file that imports what a bare machine lacks is no failure: which one, and what it lacks, is told.
"""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from common import run_process
from gpu.result import Result

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "ops"
LACKING = re.compile(r"No module named '([\w.]+)'|could not import '([\w.]+)'")
FEW = 12
"""Cases of a file that are tried on a CPU."""


def case_runs() -> list[str]:
    """`FILE` or `FILE:FAMILY` for each set of cases that kernels are tried with (`tests/ops/triton_*cases.py`); a file
    whose cases take no device is for the interpreter alone."""
    runs: list[str] = []
    for file in sorted(CASES.glob("triton_*cases.py")):
        module = module_of(file)
        if "device" in inspect.signature(module.cases).parameters:
            families = getattr(module, "FAMILIES", None)
            runs += [file.stem] if families is None else [f"{file.stem}:{family}" for family in families]
    return runs


def module_of(file: Path) -> ModuleType:
    """A file as a module, by its own name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def cases_of(run: str, device: torch.device) -> Iterator[tuple[str, float]]:
    """(name, tolerances away from the truth) of a set of cases; some files only say whether the two are equal."""
    file, _, family = run.partition(":")
    cases = module_of(CASES / f"{file}.py").cases
    given = {"family": family, "device": device, "interpreted": device.type == "cpu"}
    wanted = inspect.signature(cases).parameters
    for name, found in cases(**{key: value for key, value in given.items() if key in wanted}):
        yield name, (0.0 if found else float("inf")) if isinstance(found, bool) else float(found)


def try_cases(run: str, tiny: bool) -> dict[str, Any]:
    """A set's cases: how many, and those that are further from the truth than they may be."""
    found = cases_of(run, torch.device("cpu" if tiny else "cuda"))
    done = list(islice(found, FEW)) if tiny else list(found)
    wrong = [(name, far) for name, far in done if not far <= 1]
    return {"cases": len(done), "furthest": max((far for _, far in done), default=0.0), "wrong": wrong}


def all_cases(result: Result) -> None:
    """Every set in a process of its own, several at once: compiling is most of it."""

    def tried(run: str) -> tuple[str, dict[str, Any]]:
        return run, run_process("gpu.kernels", "--cases", run, *(["--tiny"] if result.tiny else []))

    runs = case_runs()
    with ThreadPoolExecutor(workers()) as pool:
        chosen = [run for run in runs if run.endswith(":loss")] if result.tiny else runs
        for done in as_completed([pool.submit(tried, run) for run in chosen]):
            judge(result, *done.result())


def judge(result: Result, run: str, found: dict[str, Any]) -> None:
    """What became of a set of cases."""
    result.add("cases", {"run": run, **found})
    if "error" in found:
        result.values["failed"][f"cases {run}"] = found["error"]
        result.write()
        return
    result.check(f"cases {run}: wrong of {found['cases']}", len(found["wrong"]), 0)
    for name, far in found["wrong"][:5]:
        result.tell(f"WRONG: {run}, {name}: {far:.3g} tolerances from the truth")


def workers() -> int:
    """Processes at once: their compilers want cores, and the card's memory holds them all."""
    return max(1, min(8, (os.cpu_count() or 1) - 1))


def marked_files(under: Iterable[Path]) -> list[Path]:
    """Test files with a test that needs a card."""
    files = (file for folder in under for file in sorted(folder.rglob("test_*.py")))
    return [file for file in files if "mark.gpu" in file.read_text("utf-8")]


def run_marked(result: Result, name: str, files: list[Path]) -> None:
    """Run their tests marked `gpu` with pytest, where it is, for as long as there is."""
    missing = "pytest is not here" if importlib.util.find_spec("pytest") is None else "there are none"
    if not files or importlib.util.find_spec("pytest") is None:
        result.tell(f"{name}: {missing}, so no tests marked gpu were run")
        return
    spread = ["-n", str(workers())] if importlib.util.find_spec("xdist") and workers() > 1 else []
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--junitxml", str(report)]
        command += ["--tb=short", "-rfE", *spread, *map(str, files)]
        subprocess.run(command, cwd=ROOT, timeout=min(result.left(), threading.TIMEOUT_MAX), check=False)
        found = outcome(report.read_text("utf-8"))
    result.put(name, found)
    result.check(f"{name}: tests failed of {found['run']}", len(found["failed"]), 0)
    for told in (*found["failed"], *found["lacking"]):
        result.tell(f"{name}: {told}")


def outcome(report: str) -> dict[str, Any]:
    """What pytest's JUnit report says: tests that ran, those that failed, files that lack a module, tests skipped."""
    found: dict[str, Any] = {"run": 0, "failed": [], "lacking": [], "skipped": {}}
    for case in ET.fromstring(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}".strip(":")
        wrong = [entry for kind in ("failure", "error") for entry in case.findall(kind)]
        skipped = case.find("skipped")
        if skipped is not None:
            reason = str(skipped.get("message"))
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
        elif wrong and "collection" in str(wrong[0].get("message")) and (lacks := LACKING.search(str(wrong[0].text))):
            found["lacking"].append(f"{name} was left out: {lacks[1] or lacks[2]} is not installed")
        else:
            found["run"] += 1
            first_line = str(wrong[0].get("message")).splitlines()[:1] if wrong else []
            found["failed"] += [f"{name}: {''.join(first_line)[:200]}"] if wrong else []
    return found
