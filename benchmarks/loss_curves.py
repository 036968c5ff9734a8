"""Do Topwork and a bare PEFT loop learn alike? Loss curves of the same rows, order and first weights, seed by seed.

    python benchmarks/loss_curves.py --data-dir DATA [--steps 200] [--batch 2] [--seeds 3] [--peers peft_loop]
        [--side-by-side] [--out OUT]

GSM8K, LoRA r16 on all linear layers, bf16; a seed decides the adapter's first weights and the order of the rows. Each
arm and seed is a fresh process; --side-by-side runs two at a time with a thread each, since no time is taken. The PEFT
loop keeps its adapters in bf16; `peft_loop_fp32` keeps them in fp32, as Topwork keeps its masters. Writes
benchmarks/results/loss_curves.{json,md,png}, or OUT.*.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import (
    BENCHMARKS,
    MAX_ROWS,
    model_argument,
    read_rows,
    run_process,
    surroundings,
    surroundings_text,
    table,
    write_chats,
    write_record,
)

OURS = "topwork"
ARMS = {
    OURS: ("peers.topwork_run",),
    "peft_loop": ("peers.peft_loop",),
    "peft_loop_fp32": ("peers.peft_loop", "fp32_adapters"),
}
"""Name -> module and what it is called with, after the job."""
WINDOW = 20
"""Steps that a smoothed loss is the mean of, and that the last loss is."""

Curves = dict[str, list[list[float]]]
"""By arm, for each seed the loss of every step."""


def main() -> None:
    given = arguments()
    if given.side_by_side:
        os.environ["OMP_NUM_THREADS"] = "1"
    names = [OURS, *given.peers]
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows.jsonl"
        write_chats(rows, read_rows("gsm8k", given.data_dir))
        prepared = [prepare(given, rows, Path(work) / str(seed), seed) for seed in range(given.seeds)]
        jobs = [(name, ready["job"]) for ready in prepared for name in names]
        with ThreadPoolExecutor(2 if given.side_by_side else 1) as pool:
            results = list(pool.map(lambda job: measured(*job), jobs))
    kept = [{key: run[key] for key in ("losses", "grad_norms")} for run in results]
    record = {
        "question": {key: getattr(given, key) for key in ("steps", "batch", "seeds", "side_by_side")},
        "model": prepared[0]["model"], "window": WINDOW,
        "arms": {name: kept[at :: len(names)] for at, name in enumerate(names)},
        "surroundings": surroundings(),
    }  # fmt: skip
    drawn = draw(given.out.with_name(given.out.name + ".png"), curves_of(record))
    write_record(given.out, record, text(record, drawn))
    print(text(record, drawn))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peers", default="peft_loop", help=f"comma-separated, of {', '.join([*ARMS][1:])}")
    parser.add_argument("--side-by-side", action="store_true")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "loss_curves")
    given = parser.parse_args()
    given.peers = given.peers.split(",")
    unknown = [name for name in given.peers if name not in ARMS or name == OURS]
    if unknown:
        parser.error(f"unknown peer {unknown[0]!r}; there are {', '.join([*ARMS][1:])}")
    if given.steps * given.batch > MAX_ROWS:
        parser.error(f"--steps times --batch is at most {MAX_ROWS:,} rows")
    return given


def prepare(given: argparse.Namespace, rows: Path, work: Path, seed: int) -> dict[str, Any]:
    """One seed's job."""
    options = json.dumps({"steps": given.steps, "batch": given.batch, "seed": seed})
    ready = run_process("peers.prepare", model_argument(given.model), str(rows), str(work), options)
    if "error" in ready:
        sys.exit(f"peers.prepare: {ready['error']}")
    return ready


def measured(name: str, job: str) -> dict[str, Any]:
    """One arm and seed."""
    module, *mode = ARMS[name]
    result = run_process(module, job, *mode)
    if "error" in result:
        raise SystemExit(f"{name}: {result['error']}")
    print(f"seed {Path(job).parent.name}, {name}: {last_loss(result['losses']):.4f}", flush=True)
    return result


def curves_of(record: dict[str, Any]) -> Curves:
    return {name: [run["losses"] for run in runs] for name, runs in record["arms"].items()}


def smoothed(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Means over `window` steps, from the first such window to the last; of fewer steps the mean of all."""
    window = min(window, len(losses))
    return [mean(losses[at : at + window]) for at in range(len(losses) - window + 1)]


def last_loss(losses: Sequence[float]) -> float:
    """The mean of the last steps."""
    return mean(losses[-WINDOW:])


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """How far two arms are apart, from each seed's losses: smoothed curves, and the last steps' mean, seed by seed.

    `last_error` is the standard error of the mean over seeds; NaN for one seed.
    """
    apart = [a - b for mine, other in zip(ours, theirs) for a, b in zip(smoothed(mine), smoothed(other), strict=True)]
    last = [last_loss(mine) - last_loss(other) for mine, other in zip(ours, theirs, strict=True)]
    return {
        "mean": mean(abs(value) for value in apart),
        "bias": mean(apart),
        "largest": max(abs(value) for value in apart),
        "last": mean(last),
        "last_error": stdev(last) / math.sqrt(len(last)) if len(last) > 1 else math.nan,
    }


def text(record: dict[str, Any], drawn: str | None) -> str:
    """The record for people."""
    curves, asked = curves_of(record), record["question"]
    names = list(curves)
    last = [[str(seed), *(f"{last_loss(curves[name][seed]):.4f}" for name in names)] for seed in range(asked["seeds"])]
    figures = {name: difference(curves[OURS], curves[name]) for name in names if name != OURS}
    apart = [
        [name, *(f"{f[key]:.4f}" for key in ("mean", "largest")), f"{f['bias']:+.4f}",
         f"{f['last']:+.4f} ± {f['last_error']:.4f}"]
        for name, f in figures.items()
    ]  # fmt: skip
    parts = [
        f"# Loss curves: {record['model']} on GSM8K, LoRA r = 16 on all linear layers, bf16",
        f"{asked['steps']} steps of {asked['batch']} rows, {asked['seeds']} seeds (first weights and row order, "
        f"the same for all arms of a seed). Smoothed: means over {WINDOW} steps.",
        table(["Topwork less", "smoothed: mean distance", "largest", "mean difference", f"last {WINDOW} steps"], apart),
        f"Mean loss of the last {WINDOW} steps:",
        table(["seed", *names], last),
        "The last column of the first table is the mean over seeds with its standard error, in nats a token.",
        f"![Loss curves]({drawn})" if drawn else "No plot: matplotlib is not installed.",
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def draw(path: Path, curves: Curves) -> str | None:
    """Smoothed curves, a panel a seed; returns the file's name, or None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    seeds = len(curves[OURS])
    figure = Figure(figsize=(4 * seeds, 3.2), layout="constrained")
    for seed, axes in enumerate(figure.subplots(1, seeds, sharey=True, squeeze=False)[0]):
        for number, (name, runs) in enumerate(curves.items()):
            line = smoothed(runs[seed])
            steps = range(len(runs[seed]) - len(line) + 1, len(runs[seed]) + 1)
            axes.plot(steps, line, label=name, linestyle=("-", "--", ":")[number], linewidth=1.4)
        axes.set(title=f"seed {seed}", xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"loss, mean of {WINDOW} steps")
    figure.axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path.name


if __name__ == "__main__":
    main()
