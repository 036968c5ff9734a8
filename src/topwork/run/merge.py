"""`topwork merge`: the adapter folded into its base, checked on real inputs, as an ordinary Hugging Face folder."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from topwork.common.errors import RequestError
from topwork.common.files import write_json
from topwork.data.chat.template import stop_ids
from topwork.data.examples import load_data
from topwork.merging.merge import save_merged
from topwork.merging.verify import merge_and_verify
from topwork.models.tokenizer import open_tokenizer
from topwork.quantization.linear import packed_modules
from topwork.run.folder import ADAPTER_NAME, OpenRun, check_out, data_of, finished_recipe, open_run, read_recipe

INPUTS = 100
BASES = ("dequantized", "16bit")
_DEQUANTIZED = (
    "the base is quantized: merged onto its dequantized weights, which the adapter was trained on "
    "(--base 16bit takes those from before)"
)
LARGEST_FP32_DIFFERENCE = 1e-5
"""Of merged and unmerged logits, relative to the largest logit."""


def merge(
    run: Path | str,
    out: Path | str,
    dtype: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
    force: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fold a run's adapter into its base and write `out`; returns what the check measured.

    dtype: the type of the merged weights; the recipe's where left out
    base: what the adapter of a quantized run is added to: `dequantized`, the very weights it was trained on, so that
        the merged model answers as the run does (the default), or `16bit`, the base before it was quantized

    Raises RequestError where `out` holds files.
    """
    if base not in (None, *BASES):
        raise RequestError(f"--base {base}: expected {' or '.join(BASES)}")
    out = Path(out)
    read_recipe(Path(run))
    check_out(out, Path(run), "the run's own folder", overwrite)
    tokenizer, inputs = _inputs(Path(run), log)  # before the weights: the rows may be gone
    opened = open_run(Path(run), dtype, force, log, base != "16bit", tokenizer)
    if packed_modules(opened.base.module):
        _refuse_packed(opened, base)
        log(_DEQUANTIZED)
    verified = asdict(merge_and_verify(opened.base, opened.adapters, ADAPTER_NAME, inputs))
    verified["dtype"] = str(opened.base.module.dtype).removeprefix("torch.")
    if verified["dtype"] == "float32" and verified["largest_relative_difference"] > LARGEST_FP32_DIFFERENCE:
        log(
            f"warning: in float32 the merged model differs by {verified['largest_relative_difference']:.1e} of the "
            f"largest logit, more than the {LARGEST_FP32_DIFFERENCE:.0e} that rounding explains for an ordinary update"
        )
    save_merged(opened.base, out, opened.template.jinja, overwrite, sorted(stop_ids(opened.template)))
    write_json(Path(run) / "merge.json", {"folder": out.name, **verified})
    return verified


def _refuse_packed(opened: OpenRun, base: str | None) -> None:
    if base == "16bit":
        raise RequestError(
            f"--base 16bit: {opened.base.name} is a quantized checkpoint, and its weights from before are not in it; "
            "leave --base out, or train on the 16-bit model with quantization: {load_in_4bit: true}"
        )


def _inputs(run: Path, log: Callable[[str], None]) -> tuple[PreTrainedTokenizerBase, list[list[int]]]:
    """The base's tokenizer, and up to a hundred real sequences: held-out rows first, then training rows."""
    recipe = finished_recipe(run)
    tokenizer, context_length = open_tokenizer(recipe.model, log)
    data = load_data(data_of(run, recipe), tokenizer, context_length, recipe.training.seed, lambda _: None)
    return tokenizer, [example.tokens.tolist() for example in islice(chain(data.eval, data.train), INPUTS)]
