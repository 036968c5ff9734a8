"""Memory and time as they are planned beside what runs really took.

    python benchmarks/planned.py [--only NAME,…] [--resume] [--bases FOLDER]

Each case (`planned_cases.py`) is a fresh process of `topwork train`; its peak is the largest resident size that the
system counted (VmHWM), moment by moment (`planned_worker.py`). What is predicted follows from config.json alone. Writes
benchmarks/results/planned.* after each case, and docs/planning-errors.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from planned_cases import CASES, SHAPES, STORIES, Case, write_rows

from common import BENCHMARKS, run_process, surroundings, surroundings_text, table, write_record

OUT = BENCHMARKS / "results" / "planned"
MIB = 2**20
MOMENTS = ("loading", "forward", "loss", "backward", "update", "saving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of cases, or beginnings of names, by commas")
    parser.add_argument("--resume", action="store_true", help="leave out what the record has")
    parser.add_argument("--again", action="store_true", help="predict anew, measure nothing")
    parser.add_argument("--bases", type=Path, default=BENCHMARKS / "bases", help="where random bases are written")
    parser.add_argument("--out", type=Path, default=OUT, help="without its ending")
    given = parser.parse_args()
    file = given.out.with_name(given.out.name + ".json")
    old = json.loads(file.read_text("utf-8")) if file.is_file() else {"cases": {}}
    asked = [name for name in CASES if not given.only or name.startswith(tuple(given.only.split(",")))]
    record = {"surroundings": old.get("surroundings") or surroundings(), "cases": old["cases"]}
    for name in asked:
        case = CASES[name]
        there = record["cases"].get(name)
        if given.again and there is None or given.resume and there is not None and not given.again:
            continue
        with tempfile.TemporaryDirectory() as folder:
            recipes = recipes_of(case, given.bases, Path(folder))
            found = there["measured"] if given.again else run_process("planned_worker", *map(str, recipes))
            if "error" in found:
                sys.exit(f"{name}: {found['error']}")
            record["cases"][name] = {"predicted": predicted(recipes, found, case), "measured": found}
        tell(name, record["cases"][name])
        record["surroundings"] = surroundings()
        write_record(given.out, record, text(record))


def recipes_of(case: Case, bases: Path, folder: Path) -> list[Path]:
    """The recipes of a case's members, with their rows."""
    rows = write_rows(folder / "rows.jsonl", case, case.batch_size * case.steps)
    return [_recipe(case, bases, rows, folder / f"member-{number}") for number in range(case.members)]


def _recipe(case: Case, bases: Path, rows: Path, run: Path) -> Path:
    where = {"stories260k": str(STORIES), "smollm2-135m": case.base}
    values: dict[str, Any] = {
        "model": {"model_name_or_path": where.get(case.base, str(bases / case.base)), "device": "cpu"},
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
    shape = PassShape(*fill(case, read[0].adapter.virtual_tokens), case.length)
    usages = moments(setup_of(read, structure), shape, found["checkpointed_layers"])
    return {"moments": {usage.moment: dict(usage.parts) for usage in usages}}


def fill(case: Case, virtual: int) -> tuple[int, int]:
    """(tokens, learned tokens) of a pass: as many of a step's rows as fit, with their virtual tokens."""
    rows = min(case.batch_size * case.members, max(1, case.tokens // (case.length + virtual)))
    return rows * (case.length + virtual), round(rows * case.learned * case.length)


def tell(name: str, case: Mapping[str, Any]) -> None:
    said, seen = totals(case), case["measured"]["peaks"]
    each = " ".join(f"{moment[:4]} {said[moment] / MIB:.0f}/{seen.get(moment, 0) / MIB:.0f}" for moment in MOMENTS)
    print(f"{name:36} {error(case):+7.2%}  {each}  {case['measured']['seconds'][-1]:.1f} s", flush=True)


def totals(case: Mapping[str, Any]) -> dict[str, int]:
    """Predicted bytes by moment."""
    return {moment: sum(parts.values()) for moment, parts in case["predicted"]["moments"].items()}


def error(case: Mapping[str, Any]) -> float:
    """Of the peak, relative to what was measured; negative where less was predicted."""
    return max(totals(case).values()) / max(case["measured"]["peaks"].values()) - 1


def text(record: Mapping[str, Any]) -> str:
    """The record for people."""
    cases = record["cases"]
    errors = [error(case) for case in cases.values()]
    rows = []
    for name, case in cases.items():
        said, seen = totals(case), case["measured"]["peaks"]
        rows.append([
            name, f"{case['measured']['pass_tokens'][-1]:,}", f"{max(said.values()) / MIB:,.0f}",
            f"{max(seen.values()) / MIB:,.0f}", f"{error(case):+.1%}", max(said, key=lambda key: said[key]),
            max(seen, key=lambda key: seen[key]),
        ])  # fmt: skip
    told = (
        f"{len(errors)} runs: median of the errors' sizes {median(map(abs, errors)):.1%}, worst "
        f"{max(map(abs, errors)):.1%}, furthest under {min(errors):+.1%}."
    )
    head = ["run", "tokens", "predicted MiB", "measured MiB", "error", "predicted moment", "measured moment"]
    return (
        "\n\n".join(["# Planned and measured", told, table(head, rows), surroundings_text(record["surroundings"])])
        + "\n"
    )


if __name__ == "__main__":
    main()
