"""One base and many adapters served from memory: this engine beside transformers, PEFT and llama.cpp, in turns.

    python benchmarks/serving_speed.py --data-dir DATA [--rounds 7] [--tokens 64] [--threads 2,1]
        [--systems topwork,topwork_nf4,…] [--model smollm2-135m] [--out OUT]

Greedy answers of so many tokens after GSM8K questions, none ended before: one alone, sixteen at once, and sixteen over
eight LoRA adapters (r 16, all linear layers). Every system is a process that stays loaded; a round asks each of them
for each of its arms, in an order that changes, for the round's own questions. The bound is one reading of the weights a
token, at what a C loop reads in the same round. `http` is the whole server (`topwork serve`) and sixteen clients.
Writes OUT.json and OUT.md (benchmarks/results/serving).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from serving_text import text
from workers import Worker

from common import BENCHMARKS, model_argument, read_rows, run_process, surroundings, write_chats, write_record

ALONE, SIXTEEN, MIXED = "alone", "sixteen", "sixteen_adapters"
SYSTEMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bandwidth": (("peers.bandwidth",), ("read",)),
    "topwork": (("peers.serving_topwork", "bf16"), (ALONE, SIXTEEN, MIXED)),
    "topwork_nf4": (("peers.serving_topwork", "nf4"), (ALONE, SIXTEEN, MIXED)),
    "topwork_nf4_head8": (("peers.serving_topwork", "nf4_head8"), (ALONE,)),
    "transformers": (("peers.serving_transformers", "plain"), (ALONE, SIXTEEN)),
    "peft": (("peers.serving_transformers", "peft"), (MIXED,)),
    "llama_f16": (("peers.serving_llama_cpp", "f16"), (ALONE, SIXTEEN, MIXED)),
    "llama_bf16": (("peers.serving_llama_cpp", "bf16"), (ALONE,)),
    "llama_q4_0": (("peers.serving_llama_cpp", "q4_0"), (ALONE, SIXTEEN, MIXED)),
    "llama_q4_1": (("peers.serving_llama_cpp", "packaged"), (ALONE,)),
    "http": (("peers.serving_http",), (SIXTEEN, MIXED)),
}
"""Name -> module and what it is called with after the job, and its arms."""
BESIDE_JOB = ("bandwidth",)
"""Systems that take no job."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--threads", default="2,1", help="for each of them all rounds are run")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated")
    parser.add_argument("--model", default="smollm2-135m", help="llama.cpp's arms need an embedded one")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "serving", help="without its ending")
    given = parser.parse_args()
    given.systems = given.systems.split(",")
    given.threads = [int(count) for count in given.threads.split(",")]
    unknown = [name for name in given.systems if name not in SYSTEMS]
    if unknown:
        parser.error(f"unknown system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    return given


def main() -> None:
    given = arguments()
    asked = {key: getattr(given, key) for key in ("rounds", "tokens", "threads", "systems", "model")}
    record: dict[str, Any] = {"question": asked, "surroundings": surroundings(), "systems": {}, "rounds": []}
    record["surroundings"]["hardware"]["threads"] = " and ".join(map(str, given.threads))
    with tempfile.TemporaryDirectory() as work:
        ready = prepared(given, Path(work))
        record["question"]["prompt_tokens"] = ready["prompt_tokens"]
        for threads in given.threads:
            for row in in_turns(given, ready["job"], threads, record["systems"]):
                record["rounds"].append({"threads": threads, **row})
                write_record(given.out, record, text(record))
    print(given.out.with_name(given.out.name + ".md").read_text(encoding="utf-8"))


def prepared(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The job that all systems start from."""
    questions = work / "questions.jsonl"
    write_chats(questions, read_rows("gsm8k", given.data_dir))
    options = {"rounds": given.rounds, "tokens": given.tokens}
    options["gguf"] = any(name.startswith("llama") for name in given.systems)
    model = model_argument(given.model)
    ready = run_process("peers.serving_job", model, str(questions), str(work), json.dumps(options))
    if "error" in ready:
        sys.exit(f"peers.serving_job: {ready['error']}")
    return ready


def in_turns(given: argparse.Namespace, job: str, threads: int, told: dict[str, Any]) -> Any:
    """Each measurement as it comes; `told` gets what the systems say of themselves."""
    workers: dict[str, Worker] = {}
    try:
        for name in given.systems:
            [module, *more], _ = SYSTEMS[name]
            workers[name] = Worker(module, *([] if name in BESIDE_JOB else [job]), *more, threads=threads)
            told[name] = workers[name].told
            print(f"{name}: {json.dumps(told[name])}", flush=True)
        turns = [(name, arm) for name in given.systems for arm in SYSTEMS[name][1]]
        answers: dict[tuple[str, str], list[list[int]]] = {}
        for number in range(given.rounds):
            shift = number * 3 % len(turns)  # neighbours stay neighbours, but none is always the first
            for name, arm in [*turns[shift:], *turns[:shift]]:
                row = workers[name].ask(arm, number)
                answers[name, arm] = row.pop("answers", [])
                row["tokens"] = sum(map(len, answers[name, arm]))
                yield {"system": name, **row}
            for row in agreeing(answers):
                yield {"round": number, **row}
    finally:
        for worker in workers.values():
            worker.close()


def agreeing(answers: dict[tuple[str, str], list[list[int]]]) -> list[dict[str, Any]]:
    """How many tokens each system's answers begin with that ours have too: were it another model, none."""
    found = []
    for (name, arm), said in answers.items():
        ours = answers.get(("topwork", arm), [])
        if name != "topwork" and ours and said:
            found.append({"system": name, "agrees": arm, "leading": [_shared(a, b) for a, b in zip(ours, said)]})
    bare, adapted = (answers.get(("topwork", arm), []) for arm in (SIXTEEN, MIXED))
    if bare and adapted:
        found.append({"system": "topwork", "changed": sum(a != b for a, b in zip(bare, adapted))})
    return found


def _shared(ours: list[int], theirs: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))


if __name__ == "__main__":
    main()
