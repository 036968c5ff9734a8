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
import topwork.run.train, topwork.run.evaluate, topwork.run.console, topwork.run.sweep.run, torch
import topwork.cli.app as app
from pathlib import Path
from topwork.recipe.recipe import load_recipe
from topwork.run.ownership import is_run
from topwork.run.train import train_together
torch.set_num_threads(1)
for line in sys.stdin:
    children, (blocked, go) = [], os.pipe()
    for asked in json.loads(line):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(blocked, 1)  # until all are there
            log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.argv = ["topwork", *asked["arguments"]]
            code = 0
            if asked["strike"]:
                from run.strike import arm
                arm(**asked["strike"])
            try:
                exec(asked["before"])
                if asked["arguments"][0] == "together":
                    recipes = [load_recipe(Path(path)) for path in asked["arguments"][1:]]
                    train_together(recipes, resume=any(is_run(Path(recipe.output_dir)) for recipe in recipes))
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
        children.append(child)
    os.close(blocked), os.close(go)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""
LIMIT_SECONDS = 120
TESTS = Path(__file__).parents[1]


class Commands:
    """Runs `topwork` commands in children of their own."""

    def __init__(self, logs: Path) -> None:
        self._logs, self._count = logs, 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {
                "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))),
            },
        )  # fmt: skip

    def run(
        self,
        arguments: Sequence[str],
        during: Callable[[int], None] | None = None,
        strike: Any = None,
        before: str = "",
    ) -> tuple[int, str]:
        """(exit code, or minus the signal that ended it; everything it printed). `during` gets the child's id, and
        `strike` is what `strike.arm` is called with in the child, and `before` Python that it runs first.

        Beside the command line's own there is `together RECIPE…`, which trains them in one pass, or goes on.
        """
        [child], logs = self._begin([arguments], strike, before)
        if during is not None:
            during(child)
        return self._read()[0], logs[0].read_text("utf-8")

    def at_once(self, *several: Sequence[str]) -> list[tuple[int, str, int]]:
        """(exit code, what it printed, its process) of commands that are let go at one moment."""
        children, logs = self._begin(several)
        return [
            (code, log.read_text("utf-8"), child) for code, log, child in zip(self._read(), logs, children, strict=True)
        ]

    def _begin(
        self, several: Sequence[Sequence[str]], strike: Any = None, before: str = ""
    ) -> tuple[list[int], list[Path]]:
        logs = [self._logs / f"{self._count + number}.log" for number in range(len(several))]
        self._count += len(several)
        asked = [
            {"arguments": list(each), "log": str(log), "strike": strike, "before": before}
            for each, log in zip(several, logs, strict=True)
        ]
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return self._read(), logs

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
