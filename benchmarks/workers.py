"""Processes that stay loaded and measure when they are asked, so that what is compared takes turns on one machine."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import BENCHMARKS

PAUSE_SECONDS = 0.3
"""Before each measurement: threads of the process that was asked before go to sleep meanwhile."""

Arms = Mapping[str, Callable[[int], dict[str, Any]]]


class Worker:
    """`python -m MODULE ARGUMENTS` in this folder, with so many threads; it says what it loaded before it is asked."""

    def __init__(self, module: str, *arguments: str, threads: int) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
        self.module = module
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=BENCHMARKS, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self.told = self._said()

    def ask(self, arm: str, number: int) -> dict[str, Any]:
        """What this arm measured in this round, and the load average before it."""
        time.sleep(PAUSE_SECONDS)
        assert self._process.stdin is not None
        load = round(os.getloadavg()[0], 2)
        self._process.stdin.write(json.dumps({"arm": arm, "round": number}) + "\n")
        self._process.stdin.flush()
        return {"arm": arm, "round": number, "load_before": load, **self._said()}

    def step(self) -> dict[str, Any]:
        """What it says to another line at once, for a worker that has one thing to do."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._said()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _said(self) -> dict[str, Any]:
        """Its next line, which begins as an object; libraries print others. Exits with what it died of."""
        for line in self._process.stdout or ():
            if line.startswith(('{"', "{}")):  # and not a dictionary that Python prints
                return json.loads(line)  # type: ignore[no-any-return]
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()[-12:]
        sys.exit("\n".join([f"{self.module} ended with {self._process.returncode}:", *lines]))


def answer(arms: Arms, **told: Any) -> None:
    """In a worker: say what was loaded, then measure what is asked for, until nobody asks."""
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(arms[asked["arm"]](asked["round"])), flush=True)


def resident_mib(process: int) -> float:
    """A process's resident memory now."""
    pages = int(Path(f"/proc/{process}/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
