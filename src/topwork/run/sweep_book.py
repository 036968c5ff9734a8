"""sweep.json: everything a sweep knows, written whole after each change, so that a killed sweep goes on from it.

members  name, folder, point and values (without the seed), seed, state (waiting, training, finished, early stopping,
         diverged, left), rung, left_at, result (from result.json), scores, before,
         on_validation
waves    what trains together: rung, stop_at, members, why, begun, done, pass_seconds, pass_tokens
"""

import json
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.common.files import write_json
from topwork.recipe.recipe import Recipe
from topwork.recipe.sweep_config import Member
from topwork.reporting.readers import Record, number, read_metrics
from topwork.run.folder import RECIPE, read_json
from topwork.run.sweep_plan import SweepPlan
from topwork.training.metrics import METRICS

SWEEP = "sweep.json"
REPORTS = ("sweep.md", "sweep.html")
PICTURES = "pictures"
KEPT_RESULTS = (
    "stopped", "steps", "planned_steps", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes", "first_loss",
    "last_loss", "eval_loss_before", "eval_loss_after", "best_step", "best_eval_loss", "shared_with",
    "base_weights_bytes", "warnings",
)  # fmt: skip
"""Of a member's result.json."""
KEPT_SCORES = ("exact_match", "json_valid", "fields", "loss")
IDLE = {
    "tokens_per_pass", "activation_checkpointing", "logging_steps", "save_steps", "save_total_limit", "report_to",
}  # fmt: skip
"""Training options that do not change what a member is."""


class Book:
    """A sweep's state."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.folder, self.values = folder, values
        self._by_name: dict[str, dict[str, Any]] = {member["name"]: member for member in values["members"]}

    def save(self) -> None:
        """Write sweep.json."""
        write_json(self.folder / SWEEP, self.values)

    def member(self, name: str) -> dict[str, Any]:
        """What is known of a member; to be changed and saved."""
        return self._by_name[name]

    @property
    def waves(self) -> list[dict[str, Any]]:
        """All waves that were begun, in order."""
        waves: list[dict[str, Any]] = self.values["waves"]
        return waves

    def alive(self) -> list[str]:
        """Members that are still in the race, in order."""
        return [name for name, member in self._by_name.items() if member["state"] not in ("diverged", "left")]

    def take_result(self, name: str, result: Mapping[str, Any]) -> None:
        """What training gave."""
        trained = result.get("parameters", {}).get("trainable")
        kept = {key: result[key] for key in KEPT_RESULTS if key in result}
        validated = [number(record, "loss") for record in self.records(name) if record["kind"] == "eval"]
        last = validated[-1] if validated else None
        self.member(name)["result"] = kept | {"trained": trained, "last_eval_loss": last}

    def records(self, name: str) -> list[Record]:
        """A member's metrics; none where it has not begun."""
        try:
            return read_metrics(self.folder / self.member(name)["folder"] / METRICS)
        except RequestError:
            return []

    def take_scores(self, name: str, scored: Mapping[str, Any], on_validation: bool) -> None:
        """What the answers were worth, with the adapter and before; `on_validation` where the rows are validation's, of
        which training knows the loss over all."""
        self.member(name)["on_validation"] = on_validation
        rows = {"rows": scored["rows"], "grader": scored["grader"], "data": scored["data"]}
        for key, arm in (("scores", "after"), ("before", "before")):
            self.member(name)[key] = {k: scored[arm][k] for k in KEPT_SCORES if k in scored[arm]} | rows

    def discard(self) -> None:
        """Take back a sweep of which nothing was begun."""
        (self.folder / SWEEP).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def open_book(plan: SweepPlan, resume: bool, overwrite: bool) -> Book:
    """The state of a sweep that begins, or goes on with `resume`; nothing is written yet.

    Raises RequestError where the folder holds something else, a sweep that neither `resume` nor `overwrite` was asked
    for, or one with other members.
    """
    if resume and overwrite:
        raise RequestError("--resume goes on with a sweep and --overwrite deletes it; give one of the two")
    folder, file = plan.out, plan.out / SWEEP
    if file.is_file() and resume:
        return _resumed(plan, _read(file))
    if file.is_file() and not overwrite:
        raise RequestError(
            f"output_dir {folder} holds a sweep already; go on with it by --resume, replace it by --overwrite, or name "
            "another with --set output_dir=…"
        )
    if not file.is_file() and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RequestError(
            f"output_dir {folder} holds other files; name an empty or a new folder by --set output_dir=…"
        )
    return Book(folder, _fresh(plan))


def clear(folder: Path) -> None:
    """Take an earlier sweep out of its folder: its files, and the runs in it that it made."""
    file = folder / SWEEP
    if not file.is_file():
        return
    for member in _read(file).get("members", []):
        run = folder / str(member.get("folder"))
        if run.resolve().parent == folder.resolve() and (run / RECIPE).is_file():
            shutil.rmtree(run)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)
    for name in (SWEEP, *REPORTS):
        (folder / name).unlink(missing_ok=True)


def _fresh(plan: SweepPlan) -> dict[str, Any]:
    ready, halving = plan.ready, plan.halving
    return {
        "format": 1,
        "name": plan.out.name,
        "model": plan.members[0].recipe.model.model_name_or_path,
        "preset": ready.name if ready else None,
        "text": ready.text if ready else None,
        "left_out": list(ready.left_out) if ready else [],
        "jobs": plan.jobs,
        "axes": plan.axes,
        "halving": {**halving.model_dump(), "stops": list(plan.stops)} if halving else None,
        "members": [_member(plan.out, member) for member in plan.members],
        "waves": [],
        "alone": {},
    }


def _member(out: Path, member: Member) -> dict[str, Any]:
    folder = Path(member.recipe.output_dir)
    inside = folder.resolve().is_relative_to(out.resolve())
    return {
        "name": member.name,
        "folder": str(folder.resolve().relative_to(out.resolve()) if inside else folder.resolve()),
        "point": member.point,
        "values": member.values,
        "seed": member.recipe.training.seed,
        "recipe": recipe_hash(member.recipe),
        "state": "waiting",
        "rung": None,
        "left_at": None,
        "result": None,
        "scores": None,
        "before": None,
        "on_validation": None,
    }


def recipe_hash(recipe: Recipe) -> str:
    """What makes a member what it is; files may have moved (their hashes stand in provenance.json)."""
    values = recipe.model_dump(mode="json")
    told = {
        "adapter": values["adapter"],
        "quantization": values["quantization"],
        "evaluation": {key: value for key, value in values["evaluation"].items() if key != "data"},
        "training": {key: value for key, value in values["training"].items() if key not in IDLE},
        "data": {key: value for key, value in values["data"].items() if key not in ("train", "eval", "chat_template")},
    }
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _resumed(plan: SweepPlan, values: dict[str, Any]) -> Book:
    before = {member["name"]: member["recipe"] for member in values["members"]}
    now = {member.name: recipe_hash(member.recipe) for member in plan.members}
    changed = [name for name in now if name in before and before[name] != now[name]]
    other = sorted(before.keys() ^ now.keys())
    halving = values["halving"] != _fresh(plan)["halving"]
    if other or changed or halving:
        told = [f"{len(other)} members are in one of the two only (first {other[0]})"] if other else []
        told += [f"{len(changed)} have other options (first {changed[0]})"] if changed else []
        told += ["halving is not the same"] if halving else []
        raise RequestError(
            f"{plan.out} was begun with another sweep: {'; '.join(told)}. Resume with the same, or begin anew in "
            "another output_dir"
        )
    return Book(plan.out, values)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ValueError as error:
        raise RequestError(f"{file} is not JSON ({error}); take the folder away and begin anew") from error
