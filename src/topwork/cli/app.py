"""The command line. Every command imports what it needs when it runs, so that `--help` answers at once."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from topwork.cli.chat import chat
from topwork.cli.combine import EPILOG as COMBINE_EPILOG
from topwork.cli.combine import combine
from topwork.cli.compare import EPILOG as COMPARE_EPILOG
from topwork.cli.compare import compare
from topwork.cli.convert import EPILOG as CONVERT_EPILOG
from topwork.cli.convert import convert
from topwork.cli.export import EPILOG as EXPORT_EPILOG
from topwork.cli.export import export
from topwork.cli.lint import EPILOG as LINT_EPILOG
from topwork.cli.lint import lint
from topwork.cli.merge import EPILOG as MERGE_EPILOG
from topwork.cli.merge import merge
from topwork.cli.options import AsJson, Force, Overrides, Run, teller
from topwork.cli.push import EPILOG as PUSH_EPILOG
from topwork.cli.push import push
from topwork.cli.serve import serve
from topwork.cli.serve_key import serve_key
from topwork.cli.sweep import sweep
from topwork.common.errors import TopworkError

app = typer.Typer(
    name="topwork",
    help="One frozen base, many adapters, one pass: LoRA fine-tuning of open LLMs, from a recipe to an adapter in use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """The entry point: runs a command and turns Topwork's errors into one message and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except TopworkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a name that is too long, a file system that only reads, a disk that is gone
        print(f"error: {error}; look at that place, or name another", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


@app.command(epilog="Example: topwork train examples/support/recipe.yaml --set adapter.r=8")
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in output_dir.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter."""
    from topwork.recipe.recipe import load_recipe

    read = load_recipe(recipe, overrides or [])
    from topwork.run.console import training_progress
    from topwork.run.train import train as run
    from topwork.training.progress import Silent

    done = run(read, (), resume, overwrite, Silent() if as_json else training_progress(), teller(as_json))
    if as_json:
        print(json.dumps(done.result))
    if done.result["stopped"] == "interrupted":
        told = f"interrupted after step {done.result['steps']}; the checkpoint is kept. Go on with:"
        print(f"{told}\n  {_resuming(recipe, overrides)}", file=sys.stderr)
        raise typer.Exit(1)
    if not as_json:
        _print_trained(done.folder, done.result)


app.command(epilog=LINT_EPILOG)(lint)


app.command(
    epilog="Example: topwork sweep recipe.yaml --preset rank --seeds 3\n\n"
    "topwork sweep recipe.yaml --grid adapter.r=4,8,16 --grid training.learning_rate=1e-4..1e-2*5 --halving"
)(sweep)


app.command(
    epilog="Example: topwork serve smollm2-135m --adapter support=runs/support\n\ntopwork serve --config serve.yaml"
)(serve)

app.command(name="serve-key", epilog="Example: topwork serve-key support-team")(serve_key)


@app.command(name="eval", epilog="Example: topwork eval runs/support --data examples/support/test.jsonl")
def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run's folder.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to score: a file, folder or Hub id.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Score only so many rows.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of RUN: any base …")] = None,
    adapter: Annotated[Path | None, typer.Option(help="… and any PEFT folder on top of it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, with --model.")] = 256,
    only_after: Annotated[bool, typer.Option("--only-after", help="Leave the bare base out.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Score a run: loss, exact answers, JSON fields, before and after."""
    from topwork.common.errors import RequestError

    if (run is None) == (model is None):
        raise RequestError("give a run's folder, or --model with --data and perhaps --adapter")
    if run is not None:
        from topwork.run.evaluate import evaluate as score_run

        result = score_run(run, data, max_rows, not only_after, force, teller(as_json))
    else:
        result = _evaluate_model(str(model), data, adapter, max_rows, max_new_tokens, force, as_json)
    if as_json:
        print(json.dumps(result))
    else:
        _print_scores(result)


app.command(
    epilog='Example: topwork chat runs/support "The Nimbus 2 has been leaking since 3 May 2026!"\n\n'
    'topwork chat --compare runs/support runs/terse "Where is my order 4711?"'
)(chat)


app.command(epilog=MERGE_EPILOG)(merge)

app.command(epilog=COMBINE_EPILOG)(combine)

app.command(epilog=COMPARE_EPILOG)(compare)

app.command(epilog=EXPORT_EPILOG)(export)

app.command(epilog=CONVERT_EPILOG)(convert)

app.command(epilog=PUSH_EPILOG)(push)


@app.command(
    epilog="Example: topwork quantize smollm2-135m models/smollm2-nf4\n\ntopwork quantize smollm2-135m --analyze"
)
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An alias, a folder, a .gguf file or a Hub id.")],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="A new folder.")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="nf4 (left out), fp4 or int8.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Values that share a constant, 32 to 4096 (64).")] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Hold the constants in 8 bits as well.")
    ] = True,
    dtype: Annotated[
        str, typer.Option(help="The type of what stays dense: bfloat16, float16, float32 or auto.")
    ] = "bfloat16",
    analyze: Annotated[bool, typer.Option("--analyze", help="Measure the error of every type and block size.")] = False,
    text: Annotated[Path | None, typer.Option(help="With --analyze: a text file to take the perplexity on.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="With --text: how many windows of 256 tokens.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a base in 4 or 8 bits as a bitsandbytes checkpoint, or measure what that costs."""
    from topwork.common.errors import RequestError
    from topwork.models.config import ModelConfig

    if kind is not None and analyze:
        raise RequestError("--analyze measures every type; leave --type out")
    if dtype not in ("bfloat16", "float16", "float32", "auto"):
        raise RequestError(f"--dtype {dtype}: expected bfloat16, float16, float32 or auto")
    config = ModelConfig.model_validate({"model_name_or_path": model, "dtype": dtype, "device": "cpu"})
    if analyze:
        from topwork.run.analyze import analyze as measure

        if block_size is not None or not double_quant or overwrite:
            raise RequestError(
                "--analyze measures every block size, with and without double quantization, and "
                "replaces nothing; leave --block-size, --no-double-quant and --overwrite out"
            )
        found = measure(config, text, windows, out, teller(as_json))
        print(json.dumps(found.as_json()) if as_json else found.as_text())
        return
    if out is None:
        raise RequestError("give a new folder to write to, or --analyze to measure only")
    if text is not None:
        raise RequestError("--text goes with --analyze, which takes the perplexity on it")
    from topwork.run.quantize import quantize as write

    result = write(config, out, kind or "nf4", block_size, double_quant, overwrite, teller(as_json))
    if as_json:
        print(json.dumps(result.as_json()))
        return
    print(
        f"{result.layers} linear layers in {result.type}: {result.quantized_parameters:,} parameters in "
        f"{result.quantized_bytes:,} bytes, {result.bits_per_parameter:.3f} bits each"
    )
    print(f"the whole model: {result.model_bytes / 2**20:,.1f} MiB, written to {out}")


@app.command(epilog="Example: topwork count llama-3-8b --rank 16")
def count(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or a model's name, folder or config.json.")
    ],
    rank: Annotated[list[int] | None, typer.Option(help="Ranks of the table; may be given several times.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Table trainable, frozen and total parameters per target set and rank, from the configuration alone."""
    from topwork.run.count import count as counted

    result = counted(what, rank, overrides or [])
    print(json.dumps(result.as_json()) if as_json else result.as_text())


@app.command(epilog="Example: topwork report runs/support")
def report(run: Run) -> None:
    """Write a run's page: curves, scores, samples, counts, memory and speed."""
    from topwork.run.report import report as write

    paths = write(run)
    print(f"{paths.html}\n{paths.curves_png}")


def _resuming(recipe: Path, overrides: list[str] | None) -> str:
    changes = [part for override in overrides or [] for part in ("--set", override)]
    return shlex.join(["topwork", "train", str(recipe), *changes, "--resume"])


def _evaluate_model(
    model: str, data: str | None, adapter: Path | None, max_rows: int | None, max_new_tokens: int, force: bool,
    as_json: bool,
) -> dict[str, Any]:  # fmt: skip
    from topwork.common.errors import RequestError
    from topwork.data.config import DataConfig
    from topwork.evaluation.config import EvaluationConfig
    from topwork.models.config import ModelConfig
    from topwork.run.evaluate import evaluate_model

    if data is None:
        raise RequestError("--model needs --data: rows with known answers")
    config = EvaluationConfig(data=data, max_rows=max_rows, max_new_tokens=max_new_tokens)
    return evaluate_model(
        ModelConfig(model_name_or_path=model), DataConfig(train=data), config, adapter, force, log=teller(as_json)
    )


def _print_trained(folder: Path, result: dict[str, Any]) -> None:
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    if before is not None and after is not None:
        print(f"validation loss {before:.4f} -> {after:.4f} (lowest at step {result['best_step']})")
    print(f"training loss {result['first_loss']:.4f} -> {result['last_loss']:.4f}, {result['steps']} steps")
    print(
        f"{result['tokens']:,} tokens in {result['seconds']:,.0f} s: {result['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
    print(f"adapter: {folder / 'adapter'}")
    print(f"next: topwork eval {folder}   topwork chat {folder}   topwork report {folder}")


def _print_scores(result: dict[str, Any]) -> None:
    arms = [arm for arm in ("before", "after") if arm in result]
    print(f"{result['rows']} rows, graded as {result['grader']}")
    print(f"{'':24}" + "".join(f"{arm:>12}" for arm in arms))
    for key in ("loss", "json_valid", "exact_match"):
        if key in result[arms[0]]:
            print(f"{key.replace('_', ' '):24}" + "".join(_figure(key, result[arm][key]) for arm in arms))
    for key in result[arms[0]].get("fields", {}):
        print(f"  {key:22}" + "".join(_figure(key, result[arm]["fields"].get(key, 0.0)) for arm in arms))


def _figure(key: str, value: float) -> str:
    return f"{value:12.4f}" if key == "loss" else f"{value:12.1%}"
