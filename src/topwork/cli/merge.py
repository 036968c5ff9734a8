"""`topwork merge` as the command line takes it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from topwork.cli.options import AsJson, Checkpoint, teller

EPILOG = (
    "Example: topwork merge runs/support merged/support --dtype float32\n\n"
    "topwork merge downloads/adapter merged/model --model models/base --data rows.jsonl"
)
WORTH_ADVICE = 0.1
"""From which share on rounding takes enough of an adapter to say what to do."""

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
    given: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's folder, or any PEFT folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    model: Annotated[str | None, typer.Option(help="The base, where RUN or ADAPTER does not name it rightly.")] = None,
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
    from topwork.run.merge import merge as fold

    result = fold(
        given, out, dtype, base, overwrite, force, teller(as_json), model=model, check=check, data=data,
        checkpoint=checkpoint,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return
    for line in _lines(result):
        print(line)
    print(f"written to {out}")


def _lines(result: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"merged in {result['dtype']}, {result['weight_bytes'] / 2**20:,.1f} MiB of weights"]
    if "sequences" in result:
        lines[0] = f"merged in {result['dtype']} and compared on {result['sequences']} inputs: {result['inputs']}"
        told = {key: name for key, name in FIGURES.items() if result.get(key) is not None}
        lines += [f"  {name:48} {_figure(key, result[key])}" for key, name in told.items()]
    return lines + _rounding(result)


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
