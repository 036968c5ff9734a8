"""`topwork combine` as the command line takes it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from topwork.cli.options import AsJson, starting

EPILOG = (
    "Example: topwork combine runs/support runs/terse combined/both --method ties --density 0.5 --evaluate\n\n"
    "topwork combine runs/support runs/signer combined/unsigned --method task-arithmetic --weights 1,-1\n\n"
    "All methods work on the products ΔW = s B A, never on A and B apart. Exact, in factors: cat (Σ w ΔW, rank Σ r), "
    "linear (divided by Σ w), task-arithmetic (times λ), slerp (two sources, t = w₂/(w₁+w₂)); svd is the best "
    "approximation of cat in the sources' largest rank. Entry by entry, then truncated to Σ r: ties, dare, dare-ties, "
    "magnitude-prune, della, breadcrumbs; knots in directions that the sources share. What a rank leaves out is told. "
    "A source that leaves a module alone counts as zero there."
)


def combine(
    sources: Annotated[list[Path], typer.Argument(metavar="A B …", help="Runs or PEFT folders of one base.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    method: Annotated[
        str,
        typer.Option(
            help="cat, linear, task-arithmetic, svd, slerp, ties, dare, dare-ties, magnitude-prune, della, breadcrumbs "
            "or knots."
        ),
    ] = "cat",
    weights: Annotated[
        str | None, typer.Option(metavar="W,W…", help="One for each source, of any sign; left out, each 1.")
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(
            metavar="D[,D…]",
            help="The share of a source's values that is kept, for all or for each; left out, 0.5 (breadcrumbs 0.9).",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Of the result; left out, what holds the sum: Σ r (svd: the largest r)."),
    ] = None,
    ties_weights: Annotated[
        str | None,
        typer.Option(
            help="Whose meaning weights have where signs are elected: mergekit's (left out; the sign of the weighted "
            "sum, divided by the agreeing weights) or peft's (of the plain sum, divided by how many agree)."
        ),
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--lambda", help="What the combined change is multiplied by; left out, 1.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="della: chances lie this far around the density; left out, 0.15.")
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(help="breadcrumbs: the share of largest values dropped; left out, 0.01.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what drops at random; left out, 0.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the written tensors: float32, bfloat16 or float16.")] = "float32",
    model: Annotated[
        str | None, typer.Option(help="The base of PEFT folders, where their own name for it is not found here.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Score the result on each source's held-out rows, beside the source.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="With --evaluate: rows to score all on: a file, folder or Hub id.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="With --evaluate: only so many rows of each.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, an earlier result.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Combine adapters of different bases all the same.")] = False,
    as_json: AsJson = False,
) -> None:
    """Combine adapters of one base into one adapter, a plain PEFT folder."""
    log = starting(as_json)
    from topwork.run.combine import combine as combine_adapters

    record = combine_adapters(
        sources, out, method, numbers("--weights", weights), numbers("--density", density), rank, dtype, model,
        evaluate, data, max_rows, force, overwrite, log, ties_weights=ties_weights, scale=scale,
        epsilon=epsilon, gamma=gamma, seed=seed,
    )  # fmt: skip
    log.quiet()
    if as_json:
        print(json.dumps(record))
        return
    _print_record(record, out)


def numbers(flag: str, text: str | None) -> list[float] | None:
    """`1,-0.5` as numbers. Raises RequestError for what is none."""
    from topwork.common.errors import RequestError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{flag} {text!r}: expected numbers with commas between them, such as 1,-0.5") from None


def _print_record(record: dict[str, Any], out: Path) -> None:
    lost = record["discarded_energy"]
    print(f"{record['method']}: {record['says']}")
    for source in record["sources"]:
        rank = f"rank {source['rank']}" if source["rank"] else source["method"]
        print(f"  {source['weight']:+g} {source['name']} ({rank}, {source['modules']} modules)")
    print(f"rank {record['rank']} in {record['modules']} modules, lora_alpha = r, so nothing is scaled again")
    if lost["overall"] > 1e-12:
        path, worst = max(lost["modules"].items(), key=lambda pair: pair[1])
        print(
            f"this rank leaves out {lost['overall']:.2%} of the combined change's energy (most in {path}: "
            f"{worst:.2%}); a larger --rank leaves out less"
        )
    else:
        print("exact: this rank leaves nothing out")
    if "rounding" in record:
        print(f"storing it in {record['dtype']} moves the change by {record['rounding']:.2%} of its norm")
    for tested in record.get("evaluation", []):
        _print_scores(tested)
    print(f"written to {out}")


def _print_scores(tested: dict[str, Any]) -> None:
    scores = tested["scores"]
    width = max(12, *(len(arm) + 2 for arm in scores))
    print(f"{tested['data']}: {tested['rows']} rows, graded as {tested['grader']}")
    print(f"{'':16}" + "".join(f"{arm:>{width}}" for arm in scores))
    for key in ("loss", "json_valid", "exact_match"):
        if all(key in summary for summary in scores.values()):
            figures = (f"{s[key]:.4f}" if key == "loss" else f"{s[key]:.1%}" for s in scores.values())
            print(f"  {key.replace('_', ' '):14}" + "".join(f"{figure:>{width}}" for figure in figures))
