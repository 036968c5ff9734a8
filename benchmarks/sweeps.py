"""The ready experiments on real data: rank, targets, scaling, methods, learning rate on banking77, GSM8K and E2E NLG,
seeds with error bars.

    python benchmarks/sweeps.py --data-dir DATA --work WORK --data banking77 --preset rank [--seeds 3] [--rows 1000]
        [--test-rows 250]

Each is `topwork sweep benchmarks/sweeps/DATA.yaml --preset …`: all members in one pass over one base. WORK keeps the
sweep, so that a stopped one goes on. Copies its report to benchmarks/results/sweep_DATA_PRESET.*, with the machine and
the versions beside it.
"""

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from banking77_data import convert

from common import BENCHMARKS, Chat, read_chats, read_rows, surroundings, surroundings_text, write_chats, write_record

ROWS = {"banking77": (1000, 250), "gsm8k": (96, 64), "e2e_nlg": (96, 32)}
"""Training and test rows."""


def prepare(data: str, source: Path, folder: Path, rows: int, test_rows: int) -> None:
    """train.jsonl and test.jsonl, drawn once for all seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    if data == "gsm8k":  # the test rows are other rows of the training file
        chats = read_rows("gsm8k", source)
        drawn = random.Random(0).sample(chats, rows + test_rows)
        parts = {"train": drawn[:rows], "test": drawn[rows:]}
    elif data == "e2e_nlg":
        parts = described(source / "e2e_nlg" / "devset.csv", rows, test_rows)
    else:
        parts = {}
        for split, count in (("train", rows), ("test", test_rows)):
            convert(source / "banking77" / f"{split}.csv", folder / "all.jsonl")
            parts[split] = random.Random(0).sample(read_chats(folder / "all.jsonl"), count)
    for split, chats in parts.items():
        write_chats(folder / f"{split}.jsonl", chats)


def described(source: Path, rows: int, test_rows: int) -> dict[str, list[Chat]]:
    """Facts about a restaurant and one of the sentences that were written for them. No facts stand on both sides: each
    test row has facts of its own, and the training rows are drawn from the sentences for all others."""
    sentences: dict[str, list[str]] = {}
    with open(source, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            sentences.setdefault(row["mr"], []).append(row["ref"])
    dice = random.Random(0)
    facts = dice.sample(sorted(sentences), len(sentences))
    test = [(asked, dice.choice(sentences[asked])) for asked in facts[:test_rows]]
    others = [(asked, answer) for asked in facts[test_rows:] for answer in sentences[asked]]
    return {
        split: [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
        for split, pairs in (("train", dice.sample(others, rows)), ("test", test))
    }


def swept(data: str, preset: str, seeds: int, folder: Path) -> Path:
    """Run the sweep as its user would; its folder."""
    command = [
        sys.executable, "-m", "topwork", "sweep", str(BENCHMARKS / "sweeps" / f"{data}.yaml"), "--preset", preset,
        "--seeds", str(seeds), "--set", f"data.train={folder / 'train.jsonl'}", "--set",
        f"data.eval={folder / 'test.jsonl'}", "--set", f"output_dir={folder / data}",
    ]  # fmt: skip
    out = folder / f"{data}-{preset}"
    subprocess.run([*command, *(["--resume"] if (out / "sweep.json").exists() else [])], check=True)
    return out


def record(out: Path, name: str, facts: dict[str, Any]) -> None:
    """The sweep's own report among the results; folders' paths left out."""
    place = str(out.resolve().parent)
    found = json.loads((out / "sweep.json").read_text("utf-8").replace(place, ""))
    text = (out / "sweep.md").read_text("utf-8").replace(place, "")
    for picture in sorted((out / "pictures").glob("*.png")):
        shutil.copy(picture, BENCHMARKS / "results" / f"{name}_{picture.name}")
        text = text.replace(f"pictures/{picture.name}", f"{name}_{picture.name}")
    told = f"{facts['rows']} training rows once, {facts['test_rows']} test rows, {facts['seeds']} seeds."
    text = f"{text.rstrip()}\n\n{told} {surroundings_text(facts['surroundings'])}\n"
    write_record(BENCHMARKS / "results" / name, {**facts, "sweep": found}, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", choices=list(ROWS), required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--test-rows", type=int)
    given = parser.parse_args()
    rows, test_rows = given.rows or ROWS[given.data][0], given.test_rows or ROWS[given.data][1]
    folder = given.work / f"{given.data}-{rows}-{test_rows}"
    if not (folder / "test.jsonl").exists():
        prepare(given.data, given.data_dir, folder, rows, test_rows)
    out = swept(given.data, given.preset, given.seeds, folder)
    facts = {"rows": rows, "test_rows": test_rows, "seeds": given.seeds, "surroundings": surroundings()}
    record(out, f"sweep_{given.data}_{given.preset}", facts)


if __name__ == "__main__":
    main()
