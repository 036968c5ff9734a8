"""`topwork merge`: the adapter folded into its base, checked on real inputs, as an ordinary Hugging Face folder."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.common.files import write_json
from topwork.data.examples import load_data
from topwork.merging.merge import save_merged
from topwork.merging.verify import merge_and_verify
from topwork.run.folder import ADAPTER_NAME, OpenRun, check_place, open_run

INPUTS = 100


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
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise RequestError(f"{out} holds files already; give an empty or new folder, or --overwrite")
    opened = open_run(Path(run), dtype, force, report)
    verified = asdict(merge_and_verify(opened.base, opened.adapters, ADAPTER_NAME, _inputs(opened)))
    verified["dtype"] = str(opened.base.module.dtype).removeprefix("torch.")
    save_merged(opened.base, out, opened.template.jinja, replace=overwrite)
    write_json(Path(run) / "merge.json", {"folder": out.name, **verified})
    return verified


def _inputs(opened: OpenRun) -> list[list[int]]:
    """Up to a hundred real sequences: held-out rows first, then training rows."""
    recipe = opened.recipe
    data = load_data(
        recipe.data, opened.base.tokenizer, opened.base.context_length, recipe.training.seed, lambda _: None
    )
    return [example.tokens.tolist() for example in (*data.eval, *data.train)[:INPUTS]]
