"""The whole way on a real model: train, measure before and after, write the report, ask.

    make quickstart            (or: python examples/quickstart.py runs/support)

Training takes a few minutes on two cores; an interrupted quickstart goes on where it was when it is run again.
"""

import sys
from pathlib import Path

import topwork
from topwork.common.errors import TopworkError
from topwork.run.console import training_progress
from topwork.run.ownership import is_run

RECIPE = Path(__file__).parent / "support" / "recipe.yaml"
TICKET = (
    "hi, my brewlow came on 12 March 2026 (order FW-48213) and since yesterday it leaks all over the counter. "
    "can somebody mend it today please!!"
)


def main(folder: str) -> None:
    print("1/4  training (about 120,000 tokens)", flush=True)
    try:
        run = topwork.train(RECIPE, [f"output_dir={folder}"], resume=is_run(Path(folder)), progress=training_progress())
    except topwork.RunInterrupted:
        sys.exit("interrupted; run `make quickstart` again to go on")
    print("\n2/4  measuring on 300 tickets worded unlike any in training, without and with the adapter", flush=True)
    scores = topwork.evaluate(folder)
    print_scores(run.result, scores)
    print(f"     run folder: {run.folder}")
    print("\n3/4  writing the report", flush=True)
    page = topwork.report(folder).html
    print(f"     {page}")
    print(f"\n4/4  a ticket it has not seen:\n     {TICKET}\n     -> {topwork.answer(folder, TICKET)}")
    print_next(folder)


def print_scores(result: dict, scores: dict) -> None:
    before, after = scores["before"], scores["after"]
    print(f"     {'':18}{'before':>10}{'after':>10}")
    print(f"     {'loss':18}{before['loss']:>10.3f}{after['loss']:>10.3f}")
    for key in ("json_valid", "exact_match"):
        print(f"     {key.replace('_', ' '):18}{before[key]:>10.1%}{after[key]:>10.1%}")
    for key, share in after["fields"].items():
        print(f"       {key:16}{before['fields'][key]:>10.1%}{share:>10.1%}")
    print(
        f"     trained {result['tokens']:,} tokens in {result['seconds']:,.0f} s: "
        f"{result['tokens_per_second']:,.0f} tokens/s, peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB"
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
