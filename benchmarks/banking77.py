"""banking77, whole: one epoch in Topwork and in TRL + PEFT by one recipe, both graded on the 3,080 test rows.

    python benchmarks/banking77.py prepare --data-dir DATA --work WORK
    python benchmarks/banking77.py topwork --work WORK         # trains; WORK/topwork is the run
    python benchmarks/banking77.py trl     --work WORK         # trains the peer; WORK/trl is its adapter
    python benchmarks/banking77.py score   --work WORK         # grades base, ours, peer; writes the record

Every stage can be run alone, in any order after `prepare`. `score` keeps WORK/scores-ARM.json and grades only what is
new; the record tells of the arms that there are. --again replaces what is there.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from banking77_data import convert

from common import BENCHMARKS, run_process, surroundings, surroundings_text, table, threads, write_record

RECIPE = BENCHMARKS / "banking77.yaml"
ARMS = ("before", "topwork", "trl")
TITLES = {"before": "base model", "topwork": "Topwork", "trl": "TRL + PEFT"}
LOGGED = 10
"""Steps over which the peer logs a mean, so ours is shown as the same mean."""


def main() -> None:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    STAGES[given.stage](given)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="where rows, runs and answers are kept")
    parser.add_argument("--data-dir", type=Path, help="prepare: holds banking77/train.csv and test.csv")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="topwork: change the recipe")
    parser.add_argument("--resume", action="store_true", help="topwork: go on from the newest checkpoint")
    parser.add_argument("--arms", default=",".join(ARMS), help="score: which to grade")
    parser.add_argument("--again", action="store_true", help="topwork, score: replace what is there")
    parser.add_argument("--max-rows", type=int, help="score: only so many test rows, for a trial")
    parser.add_argument(
        "--disturbed",
        default="",
        help="score: runs that were paused or shared the machine, by name; their speed is left out",
    )
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "banking77")
    given = parser.parse_args()
    given.work = given.work.resolve()
    if given.stage == "prepare" and given.data_dir is None:
        parser.error("prepare needs --data-dir, the folder that holds banking77/train.csv")
    for names, known in ((given.arms, ARMS), (given.disturbed, ARMS[1:])):
        unknown = [name for name in names.split(",") if name and name not in known]
        if unknown:
            parser.error(f"unknown arm {unknown[0]!r}; there are {', '.join(known)}")
    if given.stage != "prepare" and not (given.work / "train.jsonl").exists():
        parser.error(f"{given.work} has no train.jsonl; run the stage prepare first")
    return given


def prepare(given: argparse.Namespace) -> None:
    for split in ("train", "test"):
        rows = convert(given.data_dir / "banking77" / f"{split}.csv", given.work / f"{split}.jsonl")
        print(f"{split}: {rows:,} rows")


def topwork(given: argparse.Namespace) -> None:
    overrides = [f"data.train={given.work / 'train.jsonl'}", f"output_dir={given.work / 'topwork'}", *given.set]
    words = [word for override in overrides for word in ("--set", override)]
    how = ["--resume"] if given.resume else ["--overwrite"] if given.again else []
    process("-m", "topwork", "train", str(RECIPE), *words, *how)


def trl(given: argparse.Namespace) -> None:
    source = "from topwork.models.config import ModelConfig as C; from topwork.models.source import find_source as f; "
    source += "from topwork.recipe.recipe import load_recipe as r; from pathlib import Path as P; import sys; "
    folder = process("-c", source + "print(f(r(P(sys.argv[1])).model, lambda _: None).folder)", str(RECIPE), keep=True)
    peer = BENCHMARKS / "peers" / "trl_banking77.py"
    process(str(peer), folder, str(given.work / "train.jsonl"), str(given.work / "trl"))


def process(*words: str, keep: bool = False) -> str:
    """Run this Python with the same number of threads as every measurement; its output is shown, or kept."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads())}
    done = subprocess.run(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE if keep else None, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return (done.stdout or "").strip()


def score(given: argparse.Namespace) -> None:
    adapters = {"before": None, "topwork": given.work / "topwork" / "adapter", "trl": given.work / "trl"}
    for arm in filter(None, given.arms.split(",")):
        out, adapter = given.work / f"scores-{arm}.json", adapters[arm]
        weights = adapter and adapter / "adapter_model.safetensors"
        if weights is not None and not weights.exists():
            print(f"{arm}: no adapter in {adapter} yet, left out")
            continue
        if not given.again and _is_graded(out, weights, _rows_wanted(given)):
            continue
        words = [str(RECIPE), str(given.work / "test.jsonl"), str(out), *([str(adapter)] if adapter else [])]
        words += ["--max-rows", str(given.max_rows)] if given.max_rows else []
        result = run_process("peers.answers", *words)
        print(f"{arm}: {json.dumps(result)}", flush=True)
        if "error" in result:
            sys.exit(1)
    record = collected(given.work, [name for name in given.disturbed.split(",") if name])
    write_record(given.out, record, text(record))
    print(given.out.with_name(given.out.name + ".md").read_text(encoding="utf-8"))


def _rows_wanted(given: argparse.Namespace) -> int:
    with open(given.work / "test.jsonl", encoding="utf-8") as lines:
        return min(sum(1 for _ in lines), given.max_rows or sys.maxsize)


def _is_graded(scores: Path, weights: Path | None, rows: int) -> bool:
    """Whether these scores are of that many rows and of these weights, not of earlier ones."""
    if not scores.exists() or _json(scores)["rows"] != rows:
        return False
    return weights is None or scores.stat().st_mtime > weights.stat().st_mtime


def collected(work: Path, disturbed: Sequence[str]) -> dict[str, Any]:
    """The record of what is in WORK, without the speed of disturbed runs."""
    graded = {arm: _json(work / f"scores-{arm}.json") for arm in ARMS if (work / f"scores-{arm}.json").exists()}
    right = {arm: [answer["right"] for answer in scored.pop("answers")] for arm, scored in graded.items()}
    for scored in graded.values():
        share, rows = scored["exact_match"], scored["rows"]
        scored["standard_error"] = round(math.sqrt(share * (1 - share) / rows), 5)
    trained = {"topwork": _ours(work / "topwork"), "trl": _theirs(work / "trl")}
    for name in disturbed:
        trained[name] = trained[name] and trained[name] | {"seconds": None, "tokens_per_second": None}
    record: dict[str, Any] = {
        "surroundings": surroundings(),
        "recipe": RECIPE.read_text(encoding="utf-8"),
        "graded": graded,
        "trained": {name: figures for name, figures in trained.items() if figures},
    }
    if {"topwork", "trl"} <= right.keys() and len(right["topwork"]) == len(right["trl"]):
        record["paired"] = _paired(right["topwork"], right["trl"])
    return record


def _paired(ours: Sequence[bool], theirs: Sequence[bool]) -> dict[str, Any]:
    """Both answered the same rows, so the rows on which they differ tell more than two shares do."""
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    error = math.sqrt(max(1, only_ours + only_theirs)) / len(ours)
    return {
        "only_topwork_right": only_ours,
        "only_trl_right": only_theirs,
        "difference": round((only_ours - only_theirs) / len(ours), 5),
        "standard_error": round(error, 5),
    }


def _ours(run: Path) -> dict[str, Any] | None:
    if not (run / "result.json").exists():
        return None
    result = _json(run / "result.json")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    groups = [steps[start : start + LOGGED] for start in range(0, len(steps) - LOGGED + 1, LOGGED)]
    return {
        "seconds": result["seconds"],
        "tokens": result["tokens"],
        "tokens_per_second": result["tokens_per_second"],
        "peak_mib": result["peak_memory_bytes"] // 2**20,
        "losses": [round(mean(step["loss"] for step in group), 5) for group in groups],
        "grad_norms": [round(group[-1]["grad_norm"], 4) for group in groups],
    }


def _theirs(folder: Path) -> dict[str, Any] | None:
    if not (folder / "result.json").exists():
        return None
    result = _json(folder / "result.json")
    return {**result, "tokens_per_second": round(result["tokens"] / result["seconds"], 1)}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    parts = ["# banking77: SmolLM2-135M-Instruct, LoRA r = 16, one epoch of 10,003 rows, bf16"]
    rows = {scored["rows"] for scored in record["graded"].values()}
    parts.append(
        f"Accuracy is the share of {' / '.join(f'{count:,}' for count in sorted(rows))} test rows whose answer, "
        "written greedily, is exactly the intent; ± is one standard error. The same code asked and graded all. The "
        "recipe is `benchmarks/banking77.yaml`; the peer's is `benchmarks/peers/trl_banking77.py`."
    )
    parts.append(accuracy_table(record["graded"]))
    if "paired" in record:
        pair = record["paired"]
        within = abs(pair["difference"]) <= 2 * pair["standard_error"]
        parts.append(
            f"Only Topwork's adapter is right on {pair['only_topwork_right']} rows, only TRL's on "
            f"{pair['only_trl_right']}: a difference of {pair['difference']:+.2%} ± {pair['standard_error']:.2%}, "
            f"{'within' if within else 'beyond'} two standard errors."
        )
    if record["trained"]:
        parts.append(training_table(record["trained"]))
        parts.append(
            f"Losses are means of {LOGGED} steps; TRL's also learns the line break after the end of turn, one easy "
            "token more per row. Seconds are Topwork's steps and TRL's `train()`, from single runs that were not taken "
            "in turns (–: paused or sharing the machine): for speed see the records of `benchmarks/compare.py`."
        )
    parts.append(surroundings_text(record["surroundings"]))
    return "\n\n".join(parts) + "\n"


def accuracy_table(graded: dict[str, Any]) -> str:
    head = ["", "accuracy", "± (one standard error)", "loss on the test answers"]
    lines = [
        [TITLES[arm], f"{scored['exact_match']:.2%}", f"{scored['standard_error']:.2%}", f"{scored['loss']:.4f}"]
        for arm, scored in graded.items()
    ]
    return table(head, lines)


def training_table(trained: dict[str, Any]) -> str:
    head = ["training", "first loss", "last loss", "last gradient norm", "tokens/s", "seconds", "peak MiB"]
    lines = [
        [
            TITLES[name], f"{run['losses'][0]:.4f}", f"{run['losses'][-1]:.4f}", f"{run['grad_norms'][-1]:.3f}",
            *("–" if run[key] is None else f"{run[key]:,.0f}" for key in ("tokens_per_second", "seconds")),
            f"{run['peak_mib']:,}",
        ]
        for name, run in trained.items()
        if run["losses"]
    ]  # fmt: skip
    return table(head, lines)


STAGES = {"prepare": prepare, "topwork": topwork, "trl": trl, "score": score}


if __name__ == "__main__":
    main()
