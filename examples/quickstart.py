"""The whole way on a real model: train, measure before and after, write the report, ask.

    make quickstart            (or: python examples/quickstart.py runs/support)

It takes a few minutes on two cores and says in the end what took how long; an interrupted quickstart goes on where it
was when it is run again.
"""

import math
import sys
import time
from pathlib import Path

import topwork
from topwork.common.errors import TopworkError
from topwork.run.console import Teller, training_progress
from topwork.run.ownership import is_run

MEASURED = 100
"""Test tickets that are asked, of 300: enough to see what was learned, and a third of the time."""
RECIPE = Path(__file__).parent / "support" / "recipe.yaml"
TICKET = (
    "hi, my brewlow came on 12 March 2026 (order FW-48213) and since yesterday it leaks all over the counter. "
    "can somebody mend it today please!!"
)


def main(folder: str) -> None:
    with Teller() as log:
        seconds = [time.perf_counter()]
        log("1/4  training (about 120,000 tokens)")
        try:
            run = topwork.train(
                RECIPE, [f"output_dir={folder}", f"evaluation.max_rows={MEASURED}"], resume=is_run(Path(folder)),
                progress=training_progress(log), log=log,
            )  # fmt: skip
        except topwork.RunInterrupted:
            sys.exit("interrupted; run `make quickstart` again to go on")
        seconds.append(time.perf_counter())
        log(f"\n2/4  measuring on {MEASURED} tickets worded unlike any in training, without and with the adapter")
        scores = topwork.evaluate(folder, log=log)
        print_scores(run.result, scores)
        print(f"     run folder: {run.folder}")
        seconds.append(time.perf_counter())
        log("\n3/4  writing the report")
        print(f"     {topwork.report(folder).html}")
        log("\n4/4  a ticket it has not seen:")
        print(f"     {TICKET}\n     -> {topwork.answer(folder, TICKET)}")
        seconds.append(time.perf_counter())
    print_seconds(seconds)
    print_next(folder)


def print_scores(result: dict, scores: dict) -> None:
    before, after, rows = scores["before"], scores["after"], scores["rows"]
    print(f"     {'':18}{'before':>10}{'after':>10}   (± its standard error)")
    print(f"     {'loss':18}{before['loss']:>10.3f}{after['loss']:>10.3f}")
    for key in ("json_valid", "exact_match"):
        print_shares(key.replace("_", " "), before[key], after[key], rows)
    for key, share in after["fields"].items():
        print_shares(f"  {key}", before["fields"][key], share, rows)
    print(
        f"     trained {result['tokens']:,} tokens in {result['seconds']:,.0f} s: "
        f"{result['tokens_per_second']:,.0f} tokens/s, peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )


def print_shares(what: str, before: float, after: float, rows: int) -> None:
    """Of rows that are right; a share p of n rows is uncertain by sqrt(p (1 - p) / n)."""
    print(f"     {what:18}{before:>10.1%}{after:>10.1%} ± {math.sqrt(after * (1 - after) / rows):.1%}")


def print_seconds(stamps: list[float]) -> None:
    training, measuring, rest = (after - before for before, after in zip(stamps, stamps[1:]))
    print(
        f"\ntraining {training:,.0f} s, measuring {measuring:,.0f} s, report and answer {rest:,.0f} s: "
        f"{stamps[-1] - stamps[0]:,.0f} s in all"
    )


def print_next(folder: str) -> None:
    topwork_command = Path(sys.executable).parent / "topwork"
    command = str(topwork_command.relative_to(Path.cwd())) if topwork_command.is_relative_to(Path.cwd()) else "topwork"
    print("\nTry next:")
    for line in (
        f'{command} chat {folder} "Where is my Lampkin, order 10422?" --compare',
        f"{command} chat {folder}",
        f"{command} merge {folder} merged/support --dtype float32",
        f"{command} count examples/support/recipe.yaml",
        f"{command} train examples/support/recipe.yaml --set adapter.r=4 --set output_dir=runs/support-r4",
    ):
        print(f"  {line}")


if __name__ == "__main__":
    run_folder = sys.argv[1] if len(sys.argv) > 1 else "runs/support"
    try:
        main(run_folder)
    except TopworkError as error:
        print(f"error: {error}\n(a new folder begins anew: make quickstart RUN={run_folder}-2)", file=sys.stderr)
        sys.exit(error.exit_code)
