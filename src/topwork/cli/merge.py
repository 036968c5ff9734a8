"""`topwork merge` as the command line takes it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from topwork.cli.naming import Adapter, Model, named_first, needed
from topwork.cli.options import AsJson, Checkpoint, starting
from topwork.common.paths import plain_path

EPILOG = (
    "Example: topwork merge runs/support merged/support --dtype float32\n\n"
    "topwork merge --model models/base --adapter someone/adapter merged/model --data rows.jsonl"
)
WORTH_ADVICE = 0.1
"""From which share on rounding takes enough of an adapter to say what to do."""

WARNED = ("unsure", "another")
"""Verdicts that were a warning already, while the model was checked."""
FIGURES = {
    "largest_logit_difference": "largest difference of a logit",
    "largest_relative_difference": "  as a share of the largest logit",
    "largest_logprob_difference": "largest difference of a log-probability",
    "top1_agreement": "places with the same likeliest token",
    "mean_kl": "KL from base + adapter to merged, nats a token",
    "adapter_kl": "KL from base + adapter to the bare base",
    "unmerged_perplexity": "perplexity of base + adapter",
    "merged_perplexity": "perplexity of the merged model",
    "unmerged_tokens_per_second": "tokens a second of base + adapter",
    "merged_tokens_per_second": "tokens a second of the merged model",
}
"""What merge.json's keys are, for people."""


def merge(
    given: Annotated[
        str | None, typer.Argument(metavar="[RUN|ADAPTER]", help="A run's folder, or any PEFT folder.")
    ] = None,
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)] = None,
    model: Model = None,
    adapter: Adapter = None,
    checkpoint: Checkpoint = None,
    base: Annotated[
        str,
        typer.Option(
            help="After QLoRA: `dequantized`, the weights that were trained on, `16bit`, the original, or auto."
        ),
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; left out, the recipe's or base's.")
    ] = None,
    check: Annotated[int, typer.Option(min=0, help="Compare on so many inputs; 0 leaves it out.")] = 100,
    data: Annotated[str | None, typer.Option(help="Rows for the check: a file, folder or Hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Merge an adapter of another base; keep what the check refuses.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base and write an ordinary Hugging Face folder, tensor by tensor."""
    place, (named,) = named_first((given, out), adapter, ("RUN or ADAPTER", "OUT"))
    folder = Path(plain_path(needed(named, "OUT", "name a new folder for the merged model")))
    log = starting(as_json)
    from topwork.run.merge import merge as fold

    result = fold(
        place, folder, dtype, base, overwrite, force, log, model=model, check=check, data=data,
        checkpoint=checkpoint,
    )  # fmt: skip
    log.quiet()
    if as_json:
        print(json.dumps(result))
        return
    for line in _lines(result):
        print(line)
    print(f"written to {folder}")


def _lines(result: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"merged in {result['dtype']}, {result['weight_bytes'] / 2**20:,.1f} MiB of weights"]
    judged = result["verdict"]
    told_already = judged["grade"] in WARNED
    if "sequences" in result:
        lines[0] = f"merged in {result['dtype']} and compared on {result['sequences']} inputs: {result['inputs']}"
        lines += _figures(result)
    return [*([] if told_already else [judged["text"]]), *lines, *_rounding(result)]


def _figures(result: dict[str, Any]) -> list[str]:
    """What was measured; after a merge onto other weights than were trained on that of the fold apart."""

    def rows(found: dict[str, Any]) -> list[str]:
        told = {key: name for key, name in FIGURES.items() if found.get(key) is not None}
        return [f"  {name:48} {_figure(key, found[key])}" for key, name in told.items()]

    if result.get("fold") is None:
        return rows(result)
    return [
        "how exact the fold is, against the 16-bit base + adapter:", *rows(result["fold"]),
        "how far the answers have moved from the run, whose base was quantized:", *rows(result),
    ]  # fmt: skip


def _rounding(result: dict[str, Any]) -> list[str]:
    lost = result["rounding"]
    if lost is None:
        return []
    lines = [
        f"rounding to {result['dtype']} took {lost['share']:.1%} of what the adapter adds "
        f"(most in {lost['worst']}: {lost['worst_share']:.1%})"
    ]
    if lost["share"] >= WORTH_ADVICE:
        lines.append("  --dtype float32 keeps all of it; or serve the adapter apart, beside its base: topwork serve")
    return lines


def _figure(key: str, value: float) -> str:
    if key == "top1_agreement":
        return f"{value:.1%}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.1f}"
