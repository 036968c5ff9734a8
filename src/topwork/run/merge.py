"""`topwork merge`: the adapter folded into its base, checked on real inputs, as an ordinary Hugging Face folder."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.common.files import MANIFEST, write_json
from topwork.data.examples import load_data
from topwork.data.template import stop_ids
from topwork.merging.merge import save_merged
from topwork.merging.verify import merge_and_verify
from topwork.run.folder import ADAPTER_NAME, OpenRun, check_place, open_run, read_recipe

INPUTS = 100
LARGEST_FP32_DIFFERENCE = 1e-5
"""Of merged and unmerged logits, relative to the largest logit."""


def merge(
    run: Path | str,
    out: Path | str,
    dtype: str | None = None,
    overwrite: bool = False,
    force: bool = False,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fold a run's adapter into its base and write `out`; returns what the check measured.

    dtype: the type of the merged weights; the recipe's where left out. Raises RequestError where `out` holds files.
    """
    out = Path(out)
    check_place(out, "OUT")
    read_recipe(Path(run))
    _check_out(out, Path(run), overwrite)
    opened = open_run(Path(run), dtype, force, report)
    verified = asdict(merge_and_verify(opened.base, opened.adapters, ADAPTER_NAME, _inputs(opened)))
    verified["dtype"] = str(opened.base.module.dtype).removeprefix("torch.")
    if verified["dtype"] == "float32" and verified["largest_relative_difference"] > LARGEST_FP32_DIFFERENCE:
        report(
            f"warning: in float32 the merged model differs by {verified['largest_relative_difference']:.1e} of the "
            f"largest logit, more than the {LARGEST_FP32_DIFFERENCE:.0e} that rounding explains for an ordinary update"
        )
    save_merged(opened.base, out, opened.template.jinja, overwrite, sorted(stop_ids(opened.template)))
    write_json(Path(run) / "merge.json", {"folder": out.name, **verified})
    return verified


def _check_out(out: Path, run: Path, overwrite: bool) -> None:
    """Nothing but an earlier merge is ever replaced."""
    place, own = out.resolve(), run.resolve()
    if place == own or place in own.parents or own in place.parents:
        raise RequestError(f"{out} is the run's own folder, lies in it or holds it; name a folder of its own")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise RequestError(f"{out} holds files already; give an empty or new folder, or --overwrite")
    if not ((out / MANIFEST).is_file() and (out / "config.json").is_file()):
        raise RequestError(
            f"{out} holds files that no merge has written; --overwrite replaces an earlier merge only. Name another OUT"
        )


def _inputs(opened: OpenRun) -> list[list[int]]:
    """Up to a hundred real sequences: held-out rows first, then training rows."""
    recipe = opened.recipe
    data = load_data(
        recipe.data, opened.base.tokenizer, opened.base.context_length, recipe.training.seed, lambda _: None
    )
    return [example.tokens.tolist() for example in (*data.eval, *data.train)[:INPUTS]]
