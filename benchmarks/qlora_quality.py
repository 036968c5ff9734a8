"""Does a 4-bit base cost quality? Full fine-tuning, LoRA and QLoRA on the same rows, steps and seeds.

    python benchmarks/qlora_quality.py --data-dir DATA --work WORK --data banking77
    python benchmarks/qlora_quality.py --data-dir DATA --work WORK --data gsm8k

Each arm and seed is a fresh process; WORK keeps what is done, so that a stopped benchmark goes on. Writes
benchmarks/results/qlora_quality_DATA.{json,md}, or --out. With --workers 2 two arms run side by side, a thread each:
the losses and answers are no timings.
"""

import argparse
import json
import math
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from banking77_data import convert

from common import (
    BENCHMARKS,
    read_chats,
    run_process,
    surroundings,
    surroundings_text,
    table,
    write_chats,
    write_record,
)

NF4 = {"load_in_4bit": True}
ARMS: dict[str, dict[str, Any]] = {
    "full": {"title": "full fine-tuning", "learning_rate": 5e-5},
    "lora_r16": {"title": "LoRA r = 16", "adapter": {"r": 16, "lora_alpha": 32}, "quantization": {}},
    "qlora_r16": {"title": "QLoRA r = 16", "adapter": {"r": 16, "lora_alpha": 32}, "quantization": NF4},
    "qlora_r64": {"title": "QLoRA r = 64", "adapter": {"r": 64, "lora_alpha": 64}, "quantization": NF4},
}
"""r = 64 has alpha 64: the update's scale falls with the root of the rank, so that one learning rate serves both."""
TASKS = {
    "banking77": {"rows": 2000, "test_rows": 1000, "graded": True},
    "gsm8k": {"rows": 192, "test_rows": 100, "graded": False},
}
TRAINING = {"learning_rate": 5e-4, "batch_size": 16, "warmup_ratio": 0.05, "num_train_epochs": 1}


def main() -> None:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    task = TASKS[given.data] | {key: value for key in ("rows", "test_rows") if (value := getattr(given, key))}
    files = prepare(given.data, given.data_dir, given.work, task)
    jobs = [(arm, seed) for seed in range(given.seeds) for arm in given.arms.split(",")]
    with ThreadPoolExecutor(given.workers) as pool:
        results = list(pool.map(lambda job: measured(given, task, files, *job), jobs))
    failed = [result for result in results if "error" in result]
    if failed:
        sys.exit(f"{len(failed)} runs failed, first: {failed[0]['error']}")
    record = {
        "surroundings": surroundings(),
        "question": {"data": given.data, **task, "training": TRAINING, "arms": ARMS, "model": given.model},
        "runs": [{"arm": arm, "seed": seed, **result} for (arm, seed), result in zip(jobs, results)],
    }
    record["summary"] = summary(record["runs"], task["graded"])
    usual = BENCHMARKS / "results" / f"qlora_quality_{given.data}"
    write_record(given.out or usual, record, text(record))
    print(text(record))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(TASKS), required=True)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds banking77/train.csv, gsm8k/train.jsonl …")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--test-rows", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the record's path without its ending")
    given = parser.parse_args()
    given.work = given.work.resolve()
    if given.workers > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // given.workers))
    return given


def prepare(data: str, folder: Path, work: Path, task: dict[str, Any]) -> dict[str, str]:
    """A shuffled share of the rows, the same for every arm and seed."""
    files = {}
    for split, count in (("train", task["rows"]), ("test", task["test_rows"])):
        out = work / f"{data}-{split}.jsonl"
        if data == "banking77":
            convert(folder / data / f"{split}.csv", out)
            chats = read_chats(out)
        else:
            with open(folder / data / f"{split}.jsonl", encoding="utf-8") as lines:
                pairs = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
            chats = [
                [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                for asked, answer in pairs
            ]
        random.Random(0).shuffle(chats)
        write_chats(out, chats[:count])
        files[split] = str(out)
    return files


def measured(
    given: argparse.Namespace, task: dict[str, Any], files: dict[str, str], arm: str, seed: int
) -> dict[str, Any]:
    """One run's figures, from WORK where they are."""
    name = f"{given.data}-{arm}-{seed}"
    done = given.work / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    chosen = ARMS[arm]
    training = TRAINING | {"seed": seed} | {key: chosen[key] for key in ("learning_rate",) if key in chosen}
    job = {
        "arm": arm, "model": given.model, "work": str(given.work / name), "graded": task["graded"], **files,
        "training": training, "adapter": chosen.get("adapter"), "quantization": chosen.get("quantization"),
    }  # fmt: skip
    written = given.work / f"{name}.job.json"
    written.write_text(json.dumps(job), encoding="utf-8")
    result = run_process("peers.quality_arm", str(written))
    print(f"{name}: {json.dumps({key: result.get(key) for key in ('error', 'exact_match', 'loss')})}", flush=True)
    if "error" not in result:
        done.write_text(json.dumps(result), encoding="utf-8")
    return result


def summary(runs: list[dict[str, Any]], graded: bool) -> dict[str, Any]:
    """Per arm the mean over seeds and its standard error; for the adapters the difference to LoRA, seed by seed."""
    measures = ["loss", *(["exact_match"] if graded else [])]
    found: dict[str, Any] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = {run["seed"]: run for run in runs if run["arm"] == arm}
        lora = {run["seed"]: run for run in runs if run["arm"] == "lora_r16"}
        found[arm] = {"seeds": len(own)}
        for key in measures:
            values = [run[key] for run in own.values()]
            found[arm][key] = {"mean": mean(values), "standard_error": standard_error(values)}
            apart = [own[seed][key] - lora[seed][key] for seed in own if seed in lora]
            if apart:
                found[arm][key] |= {"to_lora": mean(apart), "to_lora_error": standard_error(apart)}
    return found


def standard_error(values: list[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    asked, found = record["question"], record["summary"]
    rates = TRAINING["learning_rate"], ARMS["full"]["learning_rate"]
    parts = [f"# Quality of a 4-bit base: {asked['data']}, {asked['model']}"]
    parts.append(
        f"{asked['rows']:,} training rows once, {asked['training']['batch_size']} a step, learning rate "
        f"{rates[0]:g} ({rates[1]:g} for full fine-tuning), the same rows and order for all; "
        f"{asked['test_rows']:,} test rows. QLoRA is NF4 with double quantization at block 64. ± is one standard error "
        "over the seeds; differences are taken seed by seed."
    )
    head = ["", "seeds", "loss on the test answers", "difference to LoRA r = 16"]
    head += ["exact answers", "difference to LoRA r = 16"] if asked["graded"] else []
    rows = []
    for arm, values in found.items():
        row = [ARMS[arm]["title"], str(values["seeds"]), shown(values["loss"], "mean", "standard_error", False)]
        row.append(shown(values["loss"], "to_lora", "to_lora_error", False))
        if asked["graded"]:
            row.append(shown(values["exact_match"], "mean", "standard_error", True))
            row.append(shown(values["exact_match"], "to_lora", "to_lora_error", True))
        rows.append(row)
    parts += [table(head, rows), surroundings_text(record["surroundings"])]
    return "\n\n".join(parts) + "\n"


def shown(values: dict[str, Any], key: str, error: str, share: bool) -> str:
    if values.get(key) is None:
        return "–"
    sign = "+" if key == "to_lora" else ""
    form = f"{sign}.2%" if share else f"{sign}.4f"
    return format(values[key], form) + (
        f" ± {format(values[error], form.lstrip('+'))}" if values[error] is not None else ""
    )


if __name__ == "__main__":
    main()
