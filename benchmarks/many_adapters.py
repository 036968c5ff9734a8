"""Six adapters in one pass beside the same six one by one: the same rows and updates, in turns in one process.

    python benchmarks/many_adapters.py --data-dir DATA [--rows gsm8k|banking77] [--rounds 5] [--batch 8] [--tokens 2048]
        [--quantized]

LoRA of ranks 2 to 64 on all linear layers of SmolLM2, `--batch` rows a step and member. A round trains one step of all
of them in shared passes, and one step of each alone, from the same weights; which goes first changes. Peaks are of
fresh processes: the six together, and each alone. Writes benchmarks/results/many_adapters[_banking77][_batchN][_nf4].*
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from common import (
    BENCHMARKS,
    peak_mib,
    read_rows,
    run_processes,
    surroundings,
    surroundings_text,
    table,
    threads,
    write_chats,
    write_record,
)

if TYPE_CHECKING:
    from topwork.training.step import StepResult

RANKS = (2, 4, 8, 16, 32, 64)
WARM_UP = 1
PEAK_STEPS = 3
MAX_LENGTH = 512


class Members:
    """A base with an adapter of each rank, and their optimizers."""

    def __init__(self, rows: str, ranks: tuple[int, ...], batch: int, tokens: int, nf4: bool) -> None:
        import torch
        from peers.topwork_step import open_adapted, read_examples

        torch.set_num_threads(threads())
        first, *others = ranks
        self.trained = open_adapted("smollm2-135m", first, 2 * first, nf4=nf4, others=others)
        self.batch, self.tokens = batch, tokens
        self.examples = read_examples(self.trained.base, rows, MAX_LENGTH)
        self.learners = [self.trained.learner(name) for name in self.trained.adapters.configs]

    def step(self, number: int, which: slice = slice(None)) -> tuple[float, int, list["StepResult"]]:
        """One step of some members, each with rows of its own: seconds, passes and results."""
        from topwork.training.passes import step_passes

        chosen = list(range(len(self.learners)))[which]
        groups = [(self.learners[at].name, self._rows(number, at)) for at in chosen]
        start = time.perf_counter()
        passes = step_passes(groups, self.tokens, self.trained.base.device)
        results = self.trained.steps([self.learners[at] for at in chosen], passes)
        return time.perf_counter() - start, len(passes), results

    def _rows(self, number: int, member: int) -> list[Any]:
        first = (number * len(RANKS) + member) * self.batch
        return [self.examples[(first + at) % len(self.examples)] for at in range(self.batch)]


def in_turns(members: Members, rounds: int) -> list[dict[str, Any]]:
    """Each round's seconds together and alone, and how far their losses differ."""
    found = []
    for number in range(WARM_UP + rounds):
        before = [[p.detach().clone() for p in learner.parameters] for learner in members.learners]
        row: dict[str, Any] = {}
        for way in ("together", "alone") if number % 2 else ("alone", "together"):
            _restore(members, before)
            if way == "together":
                seconds, passes, results = members.step(number)
            else:
                steps = [members.step(number, slice(at, at + 1)) for at in range(len(members.learners))]
                seconds, passes = sum(step[0] for step in steps), sum(step[1] for step in steps)
                results = [step[2][0] for step in steps]
            row[way] = {
                "seconds": round(seconds, 4), "passes": passes, "tokens": sum(result.tokens for result in results),
                "losses": [result.loss for result in results],
            }  # fmt: skip
        found.append(row)
    return found[WARM_UP:]


def _restore(members: Members, weights: list[list[Any]]) -> None:
    import torch

    with torch.no_grad():
        for learner, saved in zip(members.learners, weights):
            for parameter, value in zip(learner.parameters, saved):
                parameter.copy_(value)


def peak(given: argparse.Namespace) -> dict[str, int]:
    """Of a process with some of the members, and what its heap then still holds in use."""
    from products import heap_bytes

    ranks = tuple(int(rank) for rank in given.process.split(","))
    members = Members(given.file, ranks, given.batch, given.tokens, given.quantized)
    for number in range(PEAK_STEPS):
        members.step(number)
    return {"peak_mib": peak_mib(), "heap_mib": heap_bytes() // 2**20}


def peaks(given: argparse.Namespace, file: str) -> dict[str, dict[str, int]]:
    """`peak` of all together, and of each rank alone."""
    options = ["--file", file, "--batch", str(given.batch), "--tokens", str(given.tokens)]
    options += ["--quantized"] if given.quantized else []
    arms = {"together": ",".join(map(str, RANKS))} | {f"r{rank}": str(rank) for rank in RANKS}
    done = run_processes("many_adapters", ["--data-dir", ".", *options], arms.values())
    return {name: done[ranks] for name, ranks in arms.items()}


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    turns = record["rounds"]
    ratios = [turn["together"]["seconds"] / turn["alone"]["seconds"] for turn in turns]
    low, middle, high = quantiles(ratios, n=4)
    peak_of = {name: peak["peak_mib"] for name, peak in record["peaks"].items()}
    largest = max((name for name in peak_of if name != "together"), key=lambda name: peak_of[name])
    worst = max(abs(a - b) / b for turn in turns for a, b in zip(turn["together"]["losses"], turn["alone"]["losses"]))
    rows = [
        [
            way, f"{median(turn[way]['seconds'] for turn in turns):.2f}",
            f"{median(turn[way]['passes'] for turn in turns):g}",
            f"{median(turn[way]['tokens'] / turn[way]['seconds'] for turn in turns):,.0f}",
        ]
        for way in ("together", "alone")
    ]  # fmt: skip
    memory = [[name, f"{peak['peak_mib']:,}", f"{peak['heap_mib']:,}"] for name, peak in record["peaks"].items()]
    ratio = peak_of["together"] / peak_of[largest]
    held = "an NF4 base" if record["quantized"] else "a bf16 base"
    parts = [
        f"# Six adapters in one pass beside one by one: SmolLM2-135M, ranks 2 to 64, {held}",
        f"{record['batch']} rows of {record['rows']} a step and member, at most {record['tokens']} tokens a pass; "
        f"{len(turns)} rounds in turns, each a step of all members from the same weights. Medians.",
        table(["way", "seconds a round", "passes", "tokens/s"], rows),
        f"Time together / sum alone, round by round: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}, from "
        f"{min(ratios):.3f} to {max(ratios):.3f}. Losses differ by at most {worst:.1e} of themselves.",
        table(["fresh process", "peak, MiB", "heap in use after a step, MiB"], memory),
        f"Together over the largest alone ({largest}): {ratio:.2f}.",
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--quantized", action="store_true")
    parser.add_argument("--rows", choices=("gsm8k", "banking77"), default="gsm8k")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--process", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process:
        print(json.dumps(peak(given)))
        return
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows.jsonl"
        write_chats(rows, read_rows(given.rows, given.data_dir))
        found = peaks(given, str(rows))
        turns = in_turns(Members(str(rows), RANKS, given.batch, given.tokens, given.quantized), given.rounds)
    record = {
        "rows": given.rows, "batch": given.batch, "tokens": given.tokens, "quantized": given.quantized,
        "rounds": turns, "peaks": found,
        "surroundings": surroundings(),
    }  # fmt: skip
    name = "many_adapters" + ("_banking77" if given.rows == "banking77" else "")
    name += (f"_batch{given.batch}" if given.batch != 8 else "") + ("_nf4" if given.quantized else "")
    write_record(BENCHMARKS / "results" / name, record, text(record))
    print(text(record))


if __name__ == "__main__":
    main()
