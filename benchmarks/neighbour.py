"""A training step beside a busy process, and alone: Topwork with threads chosen and held, and its peers.

    python benchmarks/neighbour.py --data-dir DATA [--rounds 3] [--batch 4] [--tokens 768] [--model smollm2-135m]
        [--systems topwork,topwork_2,topwork_1,topwork_of_4,trl_tuned,peft_loop] [--out OUT] [--add]

Every system is a process that stays loaded and takes a step when it is asked, always of the same rows of GSM8K. They
take turns: one takes some steps alone, then a process is started that spins (Python, on one core), then it takes some
more, and the spinning one is killed. What is compared stands within a minute of each other. The first step beside the
neighbour is told by itself: whoever looks at the load has not seen it yet.

topwork        threads chosen (`training.threads: auto`), OMP_NUM_THREADS as many as there are cores
topwork_2 _1   held at two, at one
topwork_of_4   chosen, with OMP_NUM_THREADS=4
trl_tuned, peft_loop  as in compare.py

Writes OUT.json and OUT.md (benchmarks/results/neighbour). --add puts rounds of the same question to those that OUT.json
has: the whole takes about seven minutes, and a machine may have less to give at once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from workers import Worker

from common import (
    BENCHMARKS,
    model_argument,
    read_rows,
    run_process,
    surroundings,
    surroundings_text,
    table,
    threads,
    write_chats,
    write_record,
)

OURS = "topwork"
SYSTEMS: dict[str, tuple[tuple[str, ...], int | None]] = {
    OURS: (("topwork", "auto"), None),
    "topwork_2": (("topwork", "2"), None),
    "topwork_1": (("topwork", "1"), None),
    "topwork_of_4": (("topwork", "auto"), 4),
    "trl_tuned": (("trl_tuned",), None),
    "peft_loop": (("peft_loop",), None),
}
"""What peers/stepwise.py is called with, and OMP_NUM_THREADS where it is not the number of cores."""
PEERS = ("trl_tuned", "peft_loop")
WARM_UP, COUNTED = 2, 3
"""Steps alone that are not counted, and steps that are, alone and beside."""
PEERS_WARM_UP, PEERS_COUNTED = 1, 2
"""A peer's steps are long; beside the neighbour they are all alike, and the first counts."""
SPIN = "while True: pass"

Row = dict[str, Any]


def main() -> None:
    given = arguments()
    question = {name: getattr(given, name) for name in ("model", "batch", "tokens")}
    record: dict[str, Any] = {"question": question, "surroundings": surroundings(), "rounds": []}
    if given.add and given.out.with_suffix(".json").exists():
        before = json.loads(given.out.with_suffix(".json").read_text("utf-8"))
        if before["question"] != question:
            sys.exit(f"{given.out}.json answers another question: {before['question']}")
        record["rounds"] = before["rounds"]
    first = 1 + max((row["round"] for row in record["rounds"]), default=-1)
    with tempfile.TemporaryDirectory() as folder:
        job = prepared(given, Path(folder))
        workers = {name: begun(name, job) for name in given.systems}
        try:
            for number in range(first, first + given.rounds):
                for name, worker in workers.items():
                    record["rounds"].append({"round": number, "system": name, **measured(name, worker, number)})
                    print(json.dumps(record["rounds"][-1]), flush=True)
                    write_record(given.out, record, text(record))
        finally:
            for worker in workers.values():
                worker.close()
    print(text(record))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=768, help="that these have together, or nearly")
    parser.add_argument("--model", default="smollm2-135m", help="an alias, a Hub id or a folder")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "neighbour", help="without its ending")
    parser.add_argument("--add", action="store_true", help="to the rounds that OUT.json has")
    given = parser.parse_args()
    given.systems = given.systems.split(",")
    unknown = [name for name in given.systems if name not in SYSTEMS]
    if unknown:
        parser.error(f"unknown system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    return given


def prepared(given: argparse.Namespace, work: Path) -> str:
    """The job's file: the same rows in every step."""
    rows = work / "rows.jsonl"
    write_chats(rows, read_rows("gsm8k", given.data_dir))
    options = json.dumps({"steps": 1, "batch": given.batch, "tokens_per_pass": given.tokens})
    ready = run_process("peers.prepare", model_argument(given.model), str(rows), str(work / "job"), options)
    if "error" in ready:
        sys.exit(f"peers.prepare: {ready['error']}")
    job = json.loads(Path(ready["job"]).read_text("utf-8"))
    steps = given.rounds * (WARM_UP + 2 * COUNTED + 1) + 1
    ordered = Path(job["ordered"])
    ordered.write_text(ordered.read_text("utf-8") * steps, encoding="utf-8")
    Path(ready["job"]).write_text(json.dumps(job | {"steps": steps}), encoding="utf-8")
    return str(ready["job"])


def begun(name: str, job: str) -> Worker:
    arguments, asked = SYSTEMS[name]
    return Worker("peers.stepwise", job, *arguments, threads=asked or threads())


def measured(name: str, worker: Worker, number: int) -> Row:
    """Steps alone, the first beside a neighbour, and steps beside it."""
    warm_up, counted = (PEERS_WARM_UP, PEERS_COUNTED) if name in PEERS else (WARM_UP, COUNTED)
    worker.ask("warm", number)
    for _ in range(warm_up - 1):
        worker.step()
    alone = [worker.step() for _ in range(counted)]
    with neighbour():
        first = worker.step()
        beside = [first] if name in PEERS else []
        beside += [worker.step() for _ in range(counted - len(beside))]
    return {
        "alone": seconds(alone), "first": first["seconds"], "beside": seconds(beside),
        "threads": [alone[-1]["threads"], beside[-1]["threads"]], "tokens": alone[-1].get("tokens"),
        "told": list(dict.fromkeys(step["told"] for step in (first, *beside) if step["told"])),
    }  # fmt: skip


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def seconds(steps: Sequence[Row]) -> list[float]:
    return [round(step["seconds"], 4) for step in steps]


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    asked, systems = record["question"], list(dict.fromkeys(row["system"] for row in record["rounds"]))
    by_system = {name: [row for row in record["rounds"] if row["system"] == name] for name in systems}
    tokens = next((row["tokens"] for row in record["rounds"] if row["tokens"]), asked["tokens"])
    head = ["system", "threads", "alone, s", "beside, s", "beside / alone", "first beside, s", "beside / Topwork's"]
    ours = {row["round"]: median(row["beside"]) for row in by_system.get(OURS, [])}
    lines = [line(name, rows, ours) for name, rows in by_system.items()]
    told = [sentence for row in by_system.get(OURS, []) for sentence in row["told"]]
    return "\n\n".join([
        f"# A step beside a busy process: {asked['model']}, LoRA r = 16 on all linear layers, bf16",
        f"{tokens:,} tokens of GSM8K in {asked['batch']} rows, the same in every step; a process that spins on one "
        "core beside. Medians, quartiles in brackets. The ratio is taken turn by turn; the first step beside the "
        "neighbour is not in it, but for the peers, who do not look.",
        table(head, lines),
        *([f"Topwork says: {told[0]}."] if told else []),
        surroundings_text(record["surroundings"]),
    ]) + "\n"  # fmt: skip


def line(name: str, rows: Sequence[Row], ours: dict[int, float]) -> list[str]:
    """One system's row of the table."""
    ratios = [median(row["beside"]) / median(row["alone"]) for row in rows]
    more = [median(row["beside"]) / ours[row["round"]] for row in rows if row["round"] in ours]
    counts = [max(row["threads"][at] for row in rows) for at in (0, 1)]
    alone, beside = ([one for row in rows for one in row[key]] for key in ("alone", "beside"))
    return [
        name, f"{counts[0]} → {counts[1]}" if counts[0] != counts[1] else str(counts[0]), spread(alone), spread(beside),
        spread(ratios), f"{median(row['first'] for row in rows):.2f}", f"{median(more):.2f}" if more else "–",
    ]  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """The median, and the quartiles; of two values these two."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    main()
