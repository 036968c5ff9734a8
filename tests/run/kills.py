"""Runs killed at random moments of every phase, resumed, and held to one that nobody disturbed."""

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run import tiny
from run.processes import Commands
from run.strike import OVER, struck, usual_seconds
from topwork.common.errors import CheckpointError
from topwork.common.files import verify_folder
from topwork.run.ownership import is_run
from topwork.training.checkpoint import checkpoint_step, list_checkpoints

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TRAINING = {"loading": 1, "training": 6, "validation": 2, "saving": 3, "ending": 1}
"""Phase of a training -> among how many of its first turns one is drawn."""
EVALUATION = {"asking": 1, "writing scores": 1}
STEPS, SAVE_EVERY = 16, 2
TOO_MANY = 20
"""So much that is wrong ends it."""


@dataclass
class Told:
    """What came of it: kills by (signal, phase), signals that came too late to find their phase, and what was wrong."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    late: int = 0
    runs: int = 0
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)


class Kills:
    """Trains, kills, resumes and compares; every draw follows from the seed."""

    def __init__(self, commands: Commands, base: Path, rows: Path, work: Path, seed: int = 0) -> None:
        self.told = Told()
        self._commands, self._base, self._rows, self._work = commands, base, rows, work
        self._draw = random.Random(seed)
        self._events = work / "events"
        self._unbroken = work / "unbroken"
        recipe, usual = self._recipe("unbroken"), {}
        for arguments in (["train", str(recipe)], ["eval", str(self._unbroken)]):
            code, said = commands.run(arguments, strike={"events": str(self._events)})
            assert code == 0, said
            usual |= usual_seconds(self._events)
        self._usual_seconds = usual

    def run(self, kills: int, a_run: int = 8, tell: Callable[[str], None] = lambda _: None) -> Told:
        """At least so many kills, about `a_run` in each run."""
        while sum(self.told.kills.values()) < kills and len(self.told.wrong) < TOO_MANY:
            self.told.runs += 1
            self._one(f"run{self.told.runs}", a_run)
            tell(f"{sum(self.told.kills.values())} kills in {self.told.runs} runs, {len(self.told.wrong)} wrong")
        return self.told

    def _one(self, name: str, kills: int) -> None:
        recipe, run = self._recipe(name), self._work / name
        until = sum(self.told.kills.values()) + kills - len(EVALUATION)
        code = -1
        while code != 0 and sum(self.told.kills.values()) < until:
            code = self._struck(run, ["train", str(recipe), *_resume(run)], TRAINING)
        code, said = self._commands.run(["train", str(recipe), *_resume(run)])
        self._hold(code == 0, f"{name} could not go on: {said}")
        self._same(run, "adapter")
        self._same(run, f"checkpoints/step-{STEPS:06d}")
        for phase in EVALUATION:
            self._struck(run, ["eval", str(run)], {phase: 1})
        code, said = self._commands.run(["eval", str(run)])
        self._hold(code == 0, f"{name} could not be scored: {said}")
        self._hold(_scores(run) == _scores(self._unbroken), f"{name}: other scores than the unbroken run's")

    def _struck(self, run: Path, arguments: list[str], phases: dict[str, int]) -> int:
        """Run a command, kill it, and look at what it left; its exit code."""
        phase, number = self._draw.choice(list(phases)), self._draw.choice(SIGNALS)
        delay = self._draw.uniform(0, 1.1 * self._usual_seconds[phase])
        strike = {
            "events": str(self._events), "phase": phase, "number": int(number),
            "nth": self._draw.randint(1, phases[phase]), "delay_seconds": delay,
        }  # fmt: skip
        code, said = self._commands.run(arguments, strike=strike)
        self.told.resumed += "--resume" in arguments
        hit = struck(self._events)
        if hit is None:
            self.told.late += 1
            self._hold(code == 0, f"{arguments} ended with {code} by itself: {said}")
            return code
        self.told.kills[number.name, hit] += 1
        where = f"{number.name} in {hit} ({delay:.4f} s into {phase} {strike['nth']}) of {' '.join(arguments)}"
        self._hold(code in _codes(number, hit), f"{where}: exit code {code}: {said}")
        for wrong in [*_half_written(run), *_lost(run, code, said)]:
            self._hold(False, f"{where}: {wrong}")
        return code

    def _same(self, run: Path, folder: str) -> None:
        here, there = (tiny.folder_bytes(place / folder) for place in (run, self._unbroken))
        self._hold(bool(here) and here == there, f"{run.name}: {folder} has other bytes than the unbroken run's")

    def _hold(self, right: bool, told: str) -> None:
        if not right:
            self.told.wrong.append(told)

    def _recipe(self, name: str) -> Path:
        training = {"max_steps": STEPS, "eval_steps": 4, "save_steps": SAVE_EVERY, "tokens_per_pass": 200}
        values = tiny.recipe_values(
            self._base, self._rows, self._work / name, training=training, data={"eval_fraction": 0.3}
        )
        return tiny.write_recipe(self._work / f"{name}.yaml", values)


def _resume(run: Path) -> list[str]:
    return ["--resume"] if is_run(run) else []


def _codes(number: signal.Signals, hit: str) -> set[int]:
    """How a command may end by a signal in a phase: saved and told to go on (1), done all the same (0), or stopped."""
    if number == signal.SIGKILL:
        return {-number}
    if hit == OVER:
        return {0, 1, 128 + number, -number}
    if hit in ("training", "validation", "saving"):
        return {0, 1} if hit == "saving" else {1}
    return {0, 1, 128 + number} if hit in ("between", "ending") else {0, 128 + number}


def _half_written(run: Path) -> list[str]:
    """Files of a run that are not whole."""
    found = []
    for folder in [*list_checkpoints(run / "checkpoints"), *filter(Path.is_dir, [run / "adapter"])]:
        try:
            verify_folder(folder)
        except CheckpointError as error:
            found.append(str(error))
    for path in run.glob("*.json") if run.is_dir() else ():
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            found.append(f"{path}: {error}")
    return found


def _lost(run: Path, code: int, said: str) -> list[str]:
    """Steps that are in the metrics and not in a checkpoint: none once it was asked to stop, else since the last."""
    steps = [record["step"] for record in _records(run) if record["kind"] == "train"]
    kept = [checkpoint_step(path) for path in list_checkpoints(run / "checkpoints")]
    reached, saved = max(steps, default=0), max(kept, default=0)
    allowed = 0 if code in (0, 1) else SAVE_EVERY
    told = [f"step {reached} was reached and {saved} is kept"] if reached - saved > allowed else []
    if code == 1 and f"interrupted after step {saved}" not in said:
        told.append(f"it did not say that it was interrupted after step {saved}: {said}")
    return told


def _records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics; what is torn may only be the last."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _scores(run: Path) -> Any:
    """evaluation.json without how long it took; None where there is none."""
    path = run / "evaluation.json"
    return _untimed(json.loads(path.read_bytes())) if path.exists() else None


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(inner) for key, inner in value.items() if key not in ("seconds", "tokens_per_second")}
    return value
