"""Memory and time as they are planned beside what runs really took.

    python benchmarks/planned.py [--only NAME,…] [--resume] [--bases FOLDER]

Each case (`planned_cases.py`) is a fresh process of `topwork train`; its peak is the largest resident size that the
system counted (VmHWM), moment by moment (`planned_worker.py`). What memory is predicted follows from config.json alone;
a step's time is measured on random models of few layers just before (`planned_time.py`). Writes
benchmarks/results/planned.* after each case, and docs/planning-errors.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from planned_cases import CASES, SET_ON, SHAPES, STORIES, Case, words_of, write_rows
from planned_peers import peers_text
from planned_time import error_before, foreseen, measured_step, time_error, time_text

from common import BENCHMARKS, run_process, surroundings, surroundings_text, table, write_record

OUT = BENCHMARKS / "results" / "planned"
PAGE = BENCHMARKS.parent / "docs" / "planning-errors.md"
MIB = 2**20
MOMENTS = ("loading", "forward", "loss", "backward", "update", "saving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of cases, or beginnings of names, by commas")
    parser.add_argument("--resume", action="store_true", help="leave out what the record has")
    parser.add_argument("--again", action="store_true", help="predict anew, measure nothing")
    parser.add_argument("--process", action="store_true", help="print what the record's processes had, and no more")
    parser.add_argument("--bases", type=Path, default=BENCHMARKS / "bases", help="where random bases are written")
    parser.add_argument("--stories", type=Path, default=STORIES, help="stories260K's folder")
    parser.add_argument("--out", type=Path, default=OUT, help="without its ending")
    parser.add_argument("--seconds", type=float, default=10.0, help="for measuring a case's steps before it; 0: do not")
    given = parser.parse_args()
    file = given.out.with_name(given.out.name + ".json")
    old = json.loads(file.read_text("utf-8")) if file.is_file() else {"cases": {}}
    if given.process:
        print(processes(old))
        return
    asked = [name for name in CASES if not given.only or name.startswith(tuple(given.only.split(",")))]
    record = {"surroundings": old.get("surroundings") or surroundings(), "cases": old["cases"]}
    for name in asked:
        case = CASES[name]
        there = record["cases"].get(name)
        if (given.again and there is None) or (given.resume and there is not None and not given.again):
            continue
        if case.base in SHAPES and not (given.bases / case.base / "tokenizer.json").is_file() and not given.again:
            made = run_process("planned_bases", str(given.bases / case.base), case.base)
            print(made, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            recipes = recipes_of(case, given, Path(folder))
            if given.again:
                found, timed = there["measured"], there["time"]
            else:
                found, timed = measured(recipes, given.seconds)
            record["cases"][name] = {"predicted": predicted(recipes, found, case), "measured": found, "time": timed}
        tell(name, record["cases"][name])
        if not given.again:
            record["surroundings"] = surroundings()
        write_record(given.out, record, text(record) + time_text(record["cases"]))
    if given.out == OUT:
        PAGE.write_text(page(record), "utf-8")


def measured(recipes: Sequence[Path], seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """What a run took, and its steps as they were foreseen before it and behind it."""
    before = foreseen(recipes, seconds) if seconds else None
    found = run_process("planned_worker", *map(str, recipes))
    if "error" in found:
        sys.exit(f"{recipes[0].stem}: {found['error']}")
    return found, None if before is None else [before, foreseen(recipes, seconds)]


def recipes_of(case: Case, given: argparse.Namespace, folder: Path) -> list[Path]:
    """The recipes of a case's members, with their rows."""
    words = words_of(given.bases / case.base / "tokenizer.json")
    rows = write_rows(folder / "rows.jsonl", case, case.batch_size * case.steps, words)
    return [_recipe(case, given, rows, folder / f"member-{number}") for number in range(case.members)]


def _recipe(case: Case, given: argparse.Namespace, rows: Path, run: Path) -> Path:
    where = {"stories260k": str(given.stories), "smollm2-135m": case.base}
    values: dict[str, Any] = {
        "model": {"model_name_or_path": where.get(case.base, str(given.bases / case.base)), "device": "cpu"},
        "data": {"train": str(rows), "eval_fraction": 0.0, "max_length": 8192, "chat_template": "raw"},
        "training": {
            "max_steps": case.steps, "save_steps": case.steps, "batch_size": case.batch_size,
            "tokens_per_pass": case.tokens,
        },
        "output_dir": str(run),
    }  # fmt: skip
    for key, value in case.options.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def predicted(recipes: Sequence[Path], found: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """What planning says of a run, moment by moment."""
    from topwork.plan.base import structure_named
    from topwork.plan.setup import setup_of
    from topwork.recipe.recipe import load_recipe
    from topwork.training.memory import PassShape, moments

    read = [load_recipe(path) for path in recipes]
    structure = structure_named(read[0].model)
    shape = PassShape(*fill(case, read[0].adapter.virtual_tokens), case.length, case.passes == 1)
    usages = moments(setup_of(read, structure), shape, found["checkpointed_layers"])
    return {"moments": {usage.moment: dict(usage.parts) for usage in usages}}


def fill(case: Case, virtual: int) -> tuple[int, int]:
    """(tokens, learned tokens) of a pass: as many of a step's rows as fit, with their virtual tokens."""
    rows = min(case.batch_size // case.passes * case.members, max(1, case.tokens // (case.length + virtual)))
    return rows * (case.length + virtual), round(rows * case.learned * case.length)


def tell(name: str, case: Mapping[str, Any]) -> None:
    said, seen = totals(case), case["measured"]["peaks"]
    each = " ".join(f"{moment[:4]} {said[moment] / MIB:.0f}/{seen.get(moment, 0) / MIB:.0f}" for moment in MOMENTS)
    timed = f"{time_error(case):+.1%}, before {error_before(case):+.1%}" if case["time"] else ""
    print(f"{name:36} {error(case):+7.2%}  {each}  {measured_step(case['measured']):.2f} s {timed}", flush=True)


def totals(case: Mapping[str, Any]) -> dict[str, int]:
    """Predicted bytes by moment."""
    return {moment: sum(parts.values()) for moment, parts in case["predicted"]["moments"].items()}


def error(case: Mapping[str, Any]) -> float:
    """Of the peak, relative to what was measured; negative where less was predicted."""
    return max(totals(case).values()) / max(case["measured"]["peaks"].values()) - 1


def text(record: Mapping[str, Any]) -> str:
    """The record for people."""
    cases = record["cases"]
    rows = []
    for name, case in cases.items():
        said, seen = totals(case), case["measured"]["peaks"]
        rows.append([
            name, f"{case['measured']['pass_tokens'][-1]:,}",
            f"{max(said.values()) / MIB:,.0f}", f"{max(seen.values()) / MIB:,.0f}", f"{error(case):+.1%}",
            max(said, key=lambda key: said[key]), max(seen, key=lambda key: seen[key]), "yes" if name in SET_ON else "",
        ])  # fmt: skip
    missing = [name for name in CASES if name not in cases]
    told = [
        summed("All", list(cases.values())),
        summed(
            "Of these, looked at while constants were set", [case for name, case in cases.items() if name in SET_ON]
        ),
        summed("Not looked at", [case for name, case in cases.items() if name not in SET_ON]),
        f"Not run yet, of {len(CASES)} cases: {', '.join(missing) or 'none'}.",
    ]
    head = [
        "run", "tokens", "predicted MiB", "measured MiB", "error", "predicted moment", "measured moment", "set on",
    ]  # fmt: skip
    around = surroundings_text(record["surroundings"])
    return "\n\n".join(["# Planned and measured", *told, table(head, rows), around]) + "\n"


def summed(name: str, cases: Sequence[Mapping[str, Any]]) -> str:
    """How far some runs are off."""
    errors = [error(case) for case in cases]
    if not errors:
        return f"{name}: none."
    return (
        f"{name}: {len(errors)} runs, median of the errors' sizes {median(map(abs, errors)):.1%}, worst "
        f"{max(map(abs, errors)):.1%}, furthest under {min(errors):+.1%}."
    )


def processes(record: Mapping[str, Any]) -> str:
    """What each run's process had before its first step, beside base and adapters: what `memory_process.py` knows."""
    lines = []
    for name, case in record["cases"].items():
        made = next(end for moment, _, end in case["measured"]["ends"] if moment == "made")
        adapter = case["predicted"]["moments"]["saving"]["adapter"]
        lines.append(f"{name:36} {(made - case['measured']['weights'] - adapter) / MIB:,.0f} MiB")
    return "\n".join(lines)


def page(record: Mapping[str, Any]) -> str:
    """docs/planning-errors.md."""
    table_of = text(record).partition("\n\n")[2]
    return (
        "# How far planned memory is from what a run takes\n\n"
        "Made by `python benchmarks/planned.py`. Each line is a fresh `topwork train`; measured is the largest "
        "resident size that the system counted (VmHWM), libraries included; predicted follows from config.json and the "
        "recipe "
        "alone (`training/memory.py`). Errors are of the prediction: below zero it promised too little.\n\n"
    ) + f"{table_of.rstrip()}\n\n{peers_text()}\n"


if __name__ == "__main__":
    main()
