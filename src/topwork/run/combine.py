"""`topwork combine`: several adapters of one base into one, as a plain PEFT folder that says how it was made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from topwork.adapters.graft import bare_base
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import BaseId, check_base
from topwork.common.errors import AdapterError, RequestError, did_you_mean
from topwork.common.files import MANIFEST
from topwork.merging.changes import Changes, changes_of
from topwork.merging.combine.driver import Combined, combine_changes, share
from topwork.merging.combine.places import alone
from topwork.merging.combine.request import settings_for, told
from topwork.merging.combine.result import RECORD, folder_of, rounding, write_combined
from topwork.merging.combine.settings import Settings
from topwork.merging.combine.table import way_of
from topwork.plan.count import base_skeleton
from topwork.reporting.card import add_card
from topwork.run.base_weights import base_weights
from topwork.run.combine_scores import check_rows, scores_of
from topwork.run.console import Counter
from topwork.run.folder import ADAPTER, RECIPE, TEMPLATE, check_place
from topwork.run.given import Given, given_adapter, is_adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Log = Callable[[str], None]


@dataclass(frozen=True)
class Sources:
    """Adapters that were read, what each changes, their base as a skeleton without weights, and its parameters."""

    given: tuple[Given, ...]
    labels: tuple[str, ...]
    changes: tuple[Changes, ...]
    bare: Bare

    @property
    def base(self) -> BaseId:
        """As the first names it, with a fingerprint where any knows one."""
        known = [g.saved.base.fingerprint for g in self.given if g.saved.base.fingerprint]
        return BaseId(self.given[0].saved.base.name or self.given[0].model.model_name_or_path, next(iter(known), None))


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
    **options: Any,
) -> dict[str, Any]:
    """Combine the adapters of runs or PEFT folders and write the PEFT folder `out`; returns what stands in its
    combine.json.

    weights   one for each source (1), of any sign
    density   one for all, or one for each source: the share of values that is kept
    rank      of the result; None for what the method gives (`merging/combine/table.py`)
    model     the base of PEFT folders, where their own name for it is not to be found here
    evaluate  score the result on every source's held-out rows, or on `data`, beside the source and the bare base
    options   ties_weights, scale (λ), epsilon, gamma, seed: for the methods that read them

    Raises RequestError and AdapterError before anything is written; `out` appears whole or not at all.
    """
    places, out = [Path(source) for source in sources], Path(out)
    labels = _labels(places)
    settings = settings_for(method, labels, weights, density, rank, **options)
    if dtype not in DTYPES:
        raise RequestError(f"--dtype {dtype}: expected {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    if not evaluate and (data is not None or max_rows is not None):
        raise RequestError("--data and --max-rows go with --evaluate, which scores on them")
    _check_out(out, places, overwrite)
    read = read_sources(places, model, force, log)
    if evaluate:
        check_rows(read.given, read.labels, data)
    _tell_alike(read, log)
    slow = log if way_of(method).entrywise is not None else lambda _: None
    with Counter(f"{method}: modules", len({p for c in read.changes for p in c.adapted}), slow) as counter:
        combined = combine_changes(read.changes, settings, read.bare, lambda: counter(1))
    folder, template = folder_of(combined, read.bare, read.base, DTYPES[dtype]), _template(read, log)
    record = _record(read, settings, combined, dtype)
    if DTYPES[dtype].itemsize < 4:
        record["rounding"] = rounding(combined, folder)
    write_combined(out, folder, record, template, overwrite, lambda place: add_card(place, out.name))
    if evaluate:
        record["evaluation"] = scores_of(read.given, read.labels, folder.saved(str(out)), data, max_rows, force, log)
        write_combined(out, folder, record, template, True, lambda place: add_card(place, out.name))
    return record


def read_sources(places: Sequence[Path], model: str | None = None, force: bool = False, log: Log = print) -> Sources:
    """Adapters of one base, and what each changes of it. Raises RequestError for a place that holds none or is named
    twice, AdapterError for different bases (unless `force`) and for what has no change of weights."""
    _refuse_twice(places)
    runs = [(place / RECIPE).is_file() for place in places]
    given = tuple(
        given_adapter(place, model if not run or all(runs) else None) for place, run in zip(places, runs)
    )  # fmt: skip
    labels = _labels(places)
    for other, label in zip(given[1:], labels[1:]):
        _check_bases(given[0], labels[0], other, label, force, log)
    bare = bare_base(base_skeleton(given[0].model))
    changes = tuple(
        changes_of(label, g.saved, bare, base_weights(g, log)) for g, label in zip(given, labels)
    )  # fmt: skip
    return Sources(given, tuple(labels), changes, bare)


def _labels(places: Sequence[Path]) -> list[str]:
    """By the ends of their paths that tell them apart, so that no path of this machine stands in the result; a run's
    inner folder goes by the run's name too."""
    parts = [place.resolve().parts for place in places]
    count = 2 if any(path[-1] == ADAPTER for path in parts) else 1
    while len(set(short := ["/".join(path[-count:]) for path in parts])) < len(set(parts)):
        count += 1
    return short


def _refuse_twice(places: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for place in places:
        if place.resolve() in seen:
            raise RequestError(f"{place} is named twice; name it once, with the sum of its weights")
        seen[place.resolve()] = place


def _check_bases(first: Given, label: str, other: Given, other_label: str, force: bool, log: Log) -> None:
    try:
        warning = check_base(other.saved, first.saved.base, force)
    except AdapterError as error:
        ours, theirs = first.saved.base.name, other.saved.base.name
        raise AdapterError(
            f"{label} is an adapter of {ours!r} and {other_label} of {theirs!r}, and they are not the same ({error}). "
            "Deltas of different weights do not add; combine adapters of one base, or pass --force if you know the "
            "bases to be alike"
        ) from error
    if warning:
        log(f"warning: {warning}")


def _check_out(out: Path, places: Sequence[Path], overwrite: bool) -> None:
    """Nothing but a folder that `combine` wrote is replaced."""
    if is_adapter(out) and not (out / RECORD).is_file() and not overwrite:
        raise RequestError(f"OUT comes last, and {out} is an adapter; name a new folder as the last: combine A B OUT")
    check_place(out, "OUT")
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


def _tell_alike(read: Sources, log: Log) -> None:
    held = {label: given.quantization for label, given in zip(read.labels, read.given) if given.recipe is not None}
    if any(one != next(iter(held.values())) for one in held.values()):
        log(f"warning: {', '.join(held)} were trained on the same base held in different bits; their deltas are added")
    contents = [source.content for source in read.changes]
    for label, content in zip(read.labels, contents):
        first = read.labels[contents.index(content)]
        if first != label:
            log(f"warning: {label} and {first} hold the very same adapter")
    if len(read.changes) > 1:
        for label, count in alone(read.changes).items():
            if count:
                log(f"{label}: {count} modules are changed by it alone; the others count as zero there")


def _template(read: Sources, log: Log) -> str | None:
    """The chat template that all were trained with, for who prompts the result; none where they differ. A PEFT folder
    without one says nothing of it."""
    found: dict[str, str | None] = {}
    for given, label in zip(read.given, read.labels):
        stored = given.folder / TEMPLATE
        if given.recipe is not None:
            found[label] = given.template
        elif stored.is_file():
            found[label] = stored.read_text("utf-8")
    if len(set(found.values())) > 1:
        log(
            f"warning: the sources were trained with different chat templates ({', '.join(found)}); prompts of one are "
            "not the others', and the result names none: give it the one that it should answer to"
        )
        return None
    return next(iter(found.values()), None)


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
        "base": {"name": base.name, "fingerprint": base.fingerprint},
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
