"""`topwork combine`: several adapters of one base into one, as a plain PEFT folder that says how it was made."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from topwork.common.errors import RequestError, did_you_mean
from topwork.common.files import MANIFEST
from topwork.common.os_errors import explained
from topwork.merging.combine.driver import Combined, combine_changes, share
from topwork.merging.combine.request import settings_for, told
from topwork.merging.combine.result import RECORD, Folder, folder_of, rounding, write_combined
from topwork.merging.combine.settings import Settings
from topwork.merging.combine.table import way_of
from topwork.reporting.card import add_card
from topwork.reporting.card_source import is_hub_id, last_part
from topwork.run.combining.scores import check_rows, scores_of
from topwork.run.combining.sources import Sources, labels_of, read_sources, shared_template, tell_alike
from topwork.run.console import Counter
from topwork.run.folder import check_place
from topwork.run.given import is_adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Log = Callable[[str], None]


@explained()
def combine(
    sources: Sequence[Path | str],
    out: Path | str,
    method: str = "cat",
    weights: Sequence[float] | None = None,
    density: Sequence[float] | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    model: str | None = None,
    evaluate: bool = False,
    data: str | None = None,
    max_rows: int | None = None,
    force: bool = False,
    overwrite: bool = False,
    log: Log = print,
    *,
    ties_weights: str | None = None,
    scale: float | None = None,
    epsilon: float | None = None,
    gamma: float | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Combine the adapters of runs or PEFT folders and write the PEFT folder `out`; returns what stands in its
    combine.json.

    weights   one for each source (1), of any sign
    density   one for all, or one for each source: the share of values that is kept
    rank      of the result; None for what the method gives (`merging/combine/table.py`)
    model     the base of PEFT folders, where their own name for it is not to be found here
    evaluate  score the result on every source's held-out rows, or on `data`, beside the source and the bare base
    ties_weights, scale (λ), epsilon, gamma, seed   for the methods that read them (`merging/combine/settings.py`)

    Raises RequestError and AdapterError before anything is written; `out` appears whole or not at all.
    """
    places, out = [Path(source) for source in sources], Path(out)
    settings = settings_for(
        method, labels_of(places), weights, density, rank, ties_weights, scale, epsilon, gamma, seed
    )  # fmt: skip
    _check_rest(dtype, evaluate, data, max_rows)
    _check_out(out, places, overwrite)
    read = read_sources(places, model, force, log)
    if evaluate:
        check_rows(read.given, read.labels, data)
    tell_alike(read, log)
    folder, record = _combined(read, settings, dtype, log)
    template = shared_template(read, log)
    write_combined(out, folder, record, template, overwrite, add_card)
    if evaluate:
        record["evaluation"] = scores_of(read.given, read.labels, folder.saved(str(out)), data, max_rows, force, log)
        write_combined(out, folder, record, template, True, add_card)
    return record


def _combined(read: Sources, settings: Settings, dtype: str, log: Log) -> tuple[Folder, dict[str, Any]]:
    """What is to be written, and its record."""
    slow = way_of(settings.method).entrywise is not None
    count = len({path for source in read.changes for path in source.adapted})
    with Counter(f"{settings.method}: modules", count, log if slow else lambda _: None) as counter:
        combined = combine_changes(read.changes, settings, read.bare, lambda: counter(1))
    folder = folder_of(combined, read.bare, read.base, DTYPES[dtype])
    record = _record(read, settings, combined, dtype)
    if DTYPES[dtype].itemsize < 4:
        record["rounding"] = rounding(combined, folder)
    return folder, record


def _check_rest(dtype: str, evaluate: bool, data: str | None, max_rows: int | None) -> None:
    if dtype not in DTYPES:
        raise RequestError(f"--dtype {dtype}: expected {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    if not evaluate and (data is not None or max_rows is not None):
        raise RequestError("--data and --max-rows go with --evaluate, which scores on them")


def _check_out(out: Path, places: Sequence[Path], overwrite: bool) -> None:
    """Nothing but a folder that `combine` wrote is replaced."""
    check_place(out, "OUT")
    if is_adapter(out) and not (out / RECORD).is_file() and not overwrite:
        raise RequestError(f"OUT comes last, and {out} is an adapter; name a new folder as the last: combine A B OUT")
    target = out.resolve()
    for place in places:
        own = place.resolve()
        if target == own or target in own.parents or own in target.parents:
            raise RequestError(f"{out} is the source {place}, lies in it or holds it; name a folder of its own")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise RequestError(f"{out} holds files already; give an empty or new folder, or --overwrite")
    if not ((out / MANIFEST).is_file() and (out / RECORD).is_file()):
        raise RequestError(
            f"{out} holds files that `topwork combine` has not written; --overwrite replaces its own results only. "
            "Name another OUT"
        )


def _record(read: Sources, settings: Settings, combined: Combined, dtype: str) -> dict[str, Any]:
    way = way_of(settings.method)
    base = read.base
    return {
        "method": settings.method,
        "says": way.says,
        "reference": way.reference,
        "settings": dict(told(settings)),
        "rank": combined.rank,
        "dtype": dtype,
        "base": {"name": base.name if is_hub_id(base.name) else last_part(base.name), "fingerprint": base.fingerprint},
        "sources": [_source(read, settings, i) for i in range(len(read.given))],
        "modules": len(combined.deltas),
        "whole_modules": sorted({path for path, _ in combined.whole}),
        "discarded_energy": {
            "overall": combined.discarded,
            "modules": {path: share(e.discarded, e.total) for path, e in combined.energies.items()},
        },
    }


def _source(read: Sources, settings: Settings, at: int) -> dict[str, Any]:
    changes, saved = read.changes[at], read.given[at].saved
    return {
        "name": changes.label,
        "content": changes.content,
        "method": "dora" if getattr(saved.config, "use_dora", False) else saved.config.method,
        "rank": changes.rank,
        "weight": settings.weights[at],
        "modules": len(changes.adapted),
    }
