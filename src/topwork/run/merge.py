"""`topwork merge`: an adapter folded into its base, tensor by tensor, checked on real inputs, as an ordinary folder.

Nothing but one tensor and what is merged into it is in memory, whatever the model's size; the check afterwards runs the
model, and needs the memory that this takes.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError, RunError, TopworkError
from topwork.common.files import write_folder, write_json
from topwork.common.memory import memory_for
from topwork.common.os_errors import explained
from topwork.common.paths import plain_path
from topwork.common.telling import doing
from topwork.merging.threshold import UNCHECKED, Verdict, verdict
from topwork.reporting.card import add_card
from topwork.run.folder import check_beside_base, check_out
from topwork.run.given import Given, given_adapter
from topwork.run.keeping import keep_json
from topwork.run.merging.check import after_merge, before_merge, refuse_small_disk, refuse_small_memory
from topwork.run.merging.inputs import merge_inputs
from topwork.run.merging.plan import DEQUANTIZED, ORIGINAL, MergePlan, plan_merge

INPUTS = 100
BASES = ("auto", ORIGINAL, DEQUANTIZED)
REPORT = "merge.json"
LESS = "the check runs the whole model, and --check 0 leaves it out; --dtype bfloat16 halves what fp32 takes"


@explained()
def merge(
    given: Path | str,
    out: Path | str,
    dtype: str | None = None,
    base: str = "auto",
    overwrite: bool = False,
    force: bool = False,
    log: Callable[[str], None] = print,
    *,
    model: str | None = None,
    check: int = INPUTS,
    data: str | None = None,
    checkpoint: str | int | None = None,
) -> dict[str, Any]:
    """Fold the adapter of a run, of a PEFT folder or of a Hub id into its base and write `out`; returns what
    OUT/merge.json says.

    dtype: the type of the merged weights; a run's own, or the base's, where left out
    base: what the adapter of a quantized run is added to: `dequantized`, the very weights it was trained on, or
        `16bit`, the base before it was quantized; `auto` is `merging.plan.AUTO`
    model: the base, where the one that the run or the adapter's file names is not to be found here
    check: so many inputs go through base + adapter and through the merged model; 0 leaves the check out
    data: rows for the check; left out, a run's held-out rows and then its training rows, and for an adapter alone, or
        where these are gone, texts that Topwork brings
    checkpoint: a step of the run, `best` or `last`; left out, the finished adapter, or where there is none yet the
        newest checkpoint's
    force: merge an adapter of another base, and keep a result that the check refuses

    Raises RequestError where `out` holds files, what is asked does not fit, or there is too little memory for the
    check; RunError where the merged model is not the one that was trained; nothing is at `out` then.
    """
    out = Path(out)
    _refuse_request(base, check, data)
    adapter = given_adapter(given, model, checkpoint, log)
    check_out(out, adapter.place, "the run's own folder" if adapter.recipe else "the adapter's own folder", overwrite)
    check_beside_base(out, adapter.model, overwrite)
    fill = prepared_merge(adapter, out, dtype, base, force, log, check, data)
    found: dict[str, Any] = {}

    def whole(folder: Path) -> None:
        found.update(fill(folder))
        add_card(folder, adapter.run)

    write_folder(out, whole, overwrite)
    if adapter.run is not None:
        _keep_in(adapter.run, found | {"folder": out.name}, log)
    return found


def _keep_in(run: Path, found: dict[str, Any], log: Callable[[str], None]) -> None:
    """Also RUN/merge.json, where the run is one's own to write."""
    try:
        keep_json(found, run / REPORT, run)
    except (OSError, TopworkError) as error:
        log(f"{REPORT} stands beside the merged model alone: {run} cannot be written ({error})")


@memory_for("preparing the merge", LESS)
def prepared_merge(
    adapter: Given, out: Path, dtype: str | None = None, base: str = "auto", force: bool = False,
    log: Callable[[str], None] = print, check: int = INPUTS, data: str | None = None,
) -> Callable[[Path], dict[str, Any]]:  # fmt: skip
    """What fills an empty folder on the disk of `out` with the merged model, checks it there and returns what its
    merge.json says: for `topwork merge`, and for exports of what it gives. Arguments and errors as there."""
    inputs = merge_inputs(adapter, check, data, log)  # before the weights: the rows may be gone
    plan = plan_merge(adapter, inputs, dtype, base, force, log)
    refuse_small_disk(out, plan.nbytes)
    if check:
        refuse_small_memory(plan.nbytes, log, 3 if plan.changes_base else 2)
        doing(log, f"running base + adapter on {len(inputs.sequences)} inputs")
    before = before_merge(adapter, plan, inputs, force, log) if check else None

    @memory_for("merging", LESS)
    def fill(folder: Path) -> dict[str, Any]:
        started = time.perf_counter()
        doing(log, "folding the adapter into the base")
        plan.write(folder)
        found = told(adapter, plan, inputs.source) | {"merge_seconds": round(time.perf_counter() - started, 2)}
        if before is not None:
            doing(log, "running the merged model on the same inputs")
            verified = after_merge(folder, adapter, plan, before, inputs)
            judged = verdict(verified, plan.dtype, plan.changes_base)
            _refuse(judged, force, log)
            found |= {"verdict": judged.as_json(), **asdict(verified)}
        else:
            found["verdict"] = UNCHECKED.as_json()
        write_json(folder / REPORT, found)
        return found

    return fill


def _refuse_request(base: str, check: int, data: str | None) -> None:
    if base not in BASES:
        raise RequestError(f"--base {base}: expected {', '.join(BASES[:-1])} or {BASES[-1]}")
    if check < 0:
        raise RequestError(f"--check {check}: expected a number of inputs, or 0 to leave the check out")
    if data is not None and not check:
        raise RequestError("--data names the inputs of the check, which --check 0 leaves out; leave one of them out")


def told(adapter: Given, plan: MergePlan, inputs: str = "") -> dict[str, Any]:
    """What OUT/merge.json says but for the check, on `inputs`; no place on this machine."""
    lost = plan.rounding.loss()
    quantization = adapter.quantization
    return {
        "adapter": adapter.name,
        **({} if adapter.checkpoint is None else {"checkpoint": adapter.checkpoint}),
        "method": adapter.saved.config.method,
        "base_model": _public(plan.source.name),
        "base_fingerprint": plan.fingerprint or adapter.saved.base.fingerprint,
        "base_weights": plan.base or "as they are",
        "quantization": quantization.model_dump(mode="json") if quantization.active else None,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "weight_bytes": plan.nbytes,
        "inputs": inputs or None,
        "rounding": asdict(lost) if lost is not None else None,
        "topwork_version": version("topwork"),
    }


def _public(name: str) -> str:
    """A base's name without the folders that lead to it here."""
    return Path(name).name if Path(plain_path(name)).exists() else name


def _refuse(judged: Verdict, force: bool, log: Callable[[str], None]) -> None:
    """Raises RunError where the merged model is another than rounding explains, unless that is what was asked for."""
    if judged.grade == "unsure":
        log(f"warning: {judged.text}")
    if judged.grade != "another":
        return
    if force:
        log(f"warning: {judged.text}; kept all the same, as you asked")
        return
    raise RunError(
        f"{judged.text}. Nothing was written. Merge in float32 (--dtype float32), look whether the adapter is this "
        "base's, or take the result all the same (--force; --check 0 leaves the check out)"
    )
