"""Pairs of real processes on one folder, for the tests and for benchmarks/pairs_on_one_folder.py."""

import re
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from run import tiny
from run.processes import Commands
from topwork.run.ownership import is_run

KINDS = ("new", "overwrite", "resume", "overwrite and resume", "sweep")
STEPS = 12
ONE = ("the first went on", "the second went on")


def pair(kind: str, commands: Commands, base: Path, rows: Path, work: Path) -> str:
    """One of ONE, or what was wrong. `work` is an empty folder, or that of an earlier pair.

    The two learn from other seeds where both begin, so that the adapter shows whose it is.
    """
    seeds = (0, 0) if kind in ("resume", "overwrite and resume", "sweep") else (0, 1)
    run = work / ("run-sweep" if kind == "sweep" else "run")
    recipes = [_recipe(work, base, rows, work / "run", seed) for seed in seeds]
    _prepare(kind, commands, recipes[0], run)
    asked = [_command(kind, recipe, first) for recipe, first in zip(recipes, (True, False), strict=True)]
    found = commands.at_once(*asked)
    winners = [index for index, (code, _, _) in enumerate(found) if code == 0]
    if len(winners) != 1:
        return f"{len(winners)} went on: {[(code, said[-600:]) for code, said, _ in found]}"
    winner = winners[0]
    code, said, _ = found[1 - winner]
    named = rf"process {found[winner][2]} on {re.escape(socket.gethostname())} since 20"
    if code != 2 or not re.search(named, said) or "Traceback" in said:
        return f"the other ended with {code} and said {said[-600:]!r}"
    return _wrong(kind, commands, recipes[winner], run) or ONE[winner]


def _wrong(kind: str, commands: Commands, recipe: Path, run: Path) -> str:
    """What is there that is not the winner's, to the byte as one alone gives it."""
    left = [path.name for path in run.rglob(".topwork-*")]
    if left:
        return f"left behind: {left}"
    runs = [run / "r-2", run / "r-4"] if kind == "sweep" else [run]
    for place in runs:
        alone = _alone(kind, commands, recipe, place)
        if tiny.folder_bytes(place / "adapter") != tiny.folder_bytes(alone / "adapter"):
            return f"{place}: another adapter than that of one alone"
        lines, expected = (len((each / "metrics.jsonl").read_bytes().splitlines()) for each in (place, alone))
        if lines != expected:
            return f"{place}: {lines} lines of metrics, not {expected}"
    return ""


def _alone(kind: str, commands: Commands, recipe: Path, run: Path) -> Path:
    """What one process alone makes of the recipe, made once for each recipe."""
    name = f"alone-{recipe.stem}-{run.name}" if kind != "sweep" else f"alone-{recipe.stem}"
    place = recipe.parent.parent / name
    target = place if kind != "sweep" else Path(f"{place}-sweep")
    if not target.exists():
        command = _command("sweep", recipe, True) if kind == "sweep" else ["train", str(recipe)]
        code, said = commands.run([*command, "--set", f"output_dir={place}"])
        assert code == 0, said
    return target / run.name if kind == "sweep" else target


def _prepare(kind: str, commands: Commands, recipe: Path, run: Path) -> None:
    if kind in ("new", "sweep"):
        shutil.rmtree(run, ignore_errors=True)
        return
    kept = run.parent.parent / f"begun-{recipe.stem}"
    if not kept.exists():
        code, said = commands.run(["train", str(recipe), "--set", f"output_dir={kept}"])
        assert code == 0, said
    if not is_run(run):
        shutil.copytree(kept, run)
    if "resume" in kind:  # half of it
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        shutil.rmtree(run / "adapter")
        for path in (run / "checkpoints").iterdir():
            if path.name > f"step-{STEPS // 3:06d}":
                shutil.rmtree(path)


def _command(kind: str, recipe: Path, first: bool) -> Sequence[str]:
    flags = {
        "new": [], "overwrite": ["--overwrite"], "resume": ["--resume"],
        "overwrite and resume": ["--overwrite"] if first else ["--resume"],
    }  # fmt: skip
    if kind == "sweep":
        return ["sweep", str(recipe), "--grid", "adapter.r=2,4"]
    return ["train", str(recipe), *flags[kind]]


def _recipe(work: Path, base: Path, rows: Path, run: Path, seed: int) -> Path:
    training = {"max_steps": STEPS, "seed": seed, "save_steps": 2, "eval_steps": 4, "save_total_limit": 9}
    return tiny.write_recipe(work / f"seed-{seed}.yaml", tiny.recipe_values(base, rows, run, training=training))
