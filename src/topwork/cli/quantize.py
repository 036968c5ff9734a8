"""`topwork quantize`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson, starting

EPILOG = "Example: topwork quantize smollm2-135m models/smollm2-nf4\n\ntopwork quantize smollm2-135m --analyze"


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
        if block_size is not None or not double_quant or overwrite:
            raise RequestError(
                "--analyze measures every block size, with and without double quantization, and "
                "replaces nothing; leave --block-size, --no-double-quant and --overwrite out"
            )
        log = starting(to_errors=True)
        from topwork.run.analyze import analyze as measure

        found = measure(config, text, windows, out, log)
        log.quiet()
        print(json.dumps(found.as_json()) if as_json else found.as_text())
        return
    if out is None:
        raise RequestError("give a new folder to write to, or --analyze to measure only")
    if text is not None:
        raise RequestError("--text goes with --analyze, which takes the perplexity on it")
    log = starting(as_json)
    from topwork.run.quantize import quantize as write

    result = write(config, out, kind or "nf4", block_size, double_quant, overwrite, log)
    log.quiet()
    if as_json:
        print(json.dumps(result.as_json()))
        return
    print(
        f"{result.layers} linear layers in {result.type}: {result.quantized_parameters:,} parameters in "
        f"{result.quantized_bytes:,} bytes, {result.bits_per_parameter:.3f} bits each"
    )
    print(f"the whole model: {result.model_bytes / 2**20:,.1f} MiB, written to {out}")
