"""Real processes of the command line, to be killed. One process imports torch once and forks a child per command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys
import topwork.run.train, topwork.run.console, topwork.cli.app as app, torch
from pathlib import Path
from topwork.recipe.recipe import load_recipe
from topwork.run.train import train_together
torch.set_num_threads(1)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["topwork", *asked["arguments"]]
        code = 0
        try:
            exec(asked["before"])
            if asked["arguments"][0] == "together":
                train_together([load_recipe(Path(path)) for path in asked["arguments"][1:]], resume=True)
            else:
                app.main()
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(json.dumps(child), flush=True)
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""
LIMIT_SECONDS = 120


class Commands:
    """Runs `topwork` commands in children of their own."""

    def __init__(self, logs: Path) -> None:
        self._logs, self._count = logs, 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip

    def run(
        self, arguments: Sequence[str], during: Callable[[int], None] | None = None, before: str = ""
    ) -> tuple[int, str]:
        """(exit code, or minus the signal that ended it; everything it printed). `during` gets the child's id, and
        `before` is Python that the child runs first.

        Beside the command line's own there is `together RECIPE…`, which trains or resumes them in one pass.
        """
        self._count += 1
        log = self._logs / f"{self._count}.log"
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"arguments": list(arguments), "log": str(log), "before": before}) + "\n")
        self._server.stdin.flush()
        child = self._read()
        if during is not None:
            during(child)
        return self._read(), log.read_text("utf-8")

    def close(self) -> None:
        """End the process that forks."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(LIMIT_SECONDS)

    def _read(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())


def signal_at(run: Path, step: int, number: signal.Signals, delay_seconds: float = 0.0) -> Callable[[int], None]:
    """For `Commands.run`: send the signal once metrics.jsonl has reached a step, and a moment later."""

    def during(child: int) -> None:
        limit = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < limit and reached(run) < step and Path(f"/proc/{child}").exists():
            time.sleep(0.001)
        time.sleep(delay_seconds)
        os.kill(child, number)

    return during


def reached(run: Path) -> int:
    """The last step in a run's metrics; -1 where there is none."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return -1
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=-1)
