"""`topwork sweep`: many runs over one loaded base, in waves of as many as fit into memory, and one report of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter
from topwork.common.errors import NonFiniteLossError, RequestError
from topwork.recipe.recipe import Recipe
from topwork.reporting.sweep import write_sweep_report
from topwork.reporting.sweep_points import diminishing_returns, points
from topwork.run.evaluate import Finished, evaluate_members
from topwork.run.folder import ADAPTER
from topwork.run.outcome import TrainedRun
from topwork.run.sweep_book import Book, clear, open_book
from topwork.run.sweep_cost import cost, measure_alone, pass_cost
from topwork.run.sweep_plan import SweepOptions, SweepPlan, plan_sweep, waves
from topwork.run.together import Together, members_that_fit, open_together, train_together
from topwork.training.progress import Progress

ENDED = ("finished", "early stopping", "diverged")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Swept:
    """A sweep's folder, and all that it found, as in sweep.json. `stopped` is finished or interrupted."""

    folder: Path
    result: dict[str, Any]
    stopped: str


@dataclass(frozen=True)
class _Sweep:
    """A sweep under way."""

    plan: SweepPlan
    book: Book
    resumed: bool
    overwrite: bool
    progress: Callable[[], Callable[[str], Progress]] | None
    report: Report
    on: Together
    trained: dict[str, str] = field(default_factory=dict)
    """Members whose adapters are on the base, and their names there."""

    def recipe(self, name: str) -> Recipe:
        return next(member.recipe for member in self.plan.members if member.name == name)


def sweep(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    options: SweepOptions = SweepOptions(),
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[], Callable[[str], Progress]] | None = None,
    report: Report = print,
) -> Swept:
    """Train all members of a sweep over one base, score them on the same rows and write OUT/sweep.{json,md,html}.

    Each member is an ordinary run in OUT/NAME. `progress` is asked at each wave for what gives members' Progress by
    name. `resume` goes on with what is not finished. Raises RequestError where
    something is wrong with the request (nothing is written then), RunError where the sweep fails.
    """
    plan = plan_sweep(Path(recipe), overrides, options)
    book = open_book(plan, resume, overwrite)
    resumed = resume and bool(book.waves)
    tell_plan(plan, report)
    if not _is_done(plan, book):
        on = open_together(plan.members[0].recipe, report)
        if overwrite:
            clear(plan.out)
        if not _trained(_Sweep(plan, book, resumed, overwrite, progress, report, on)):
            return Swept(plan.out, book.values, "interrupted")
    if options.measure_alone:
        measure_alone(book, {member.name: member.recipe for member in plan.members}, report)
    book.values |= {
        "points": [point.as_json() for point in points(book.values)],
        "diminishing_returns": [verdict.as_json() for verdict in diminishing_returns(book.values)],
        "cost": cost(book.values),
    }
    book.save()
    write_sweep_report(plan.out, report)
    return Swept(plan.out, book.values, "finished")


def _is_done(plan: SweepPlan, book: Book) -> bool:
    """Whether nothing is left to train or to score, so that the report alone is made anew."""
    last = [wave for wave in book.waves if wave["rung"] == len(plan.stops)]
    return bool(last) and all(wave["done"] and wave["scored"] for wave in last)


def tell_plan(plan: SweepPlan, report: Report) -> None:
    """What will be trained."""
    if plan.ready is not None:
        report(plan.ready.text)
        for left in plan.ready.left_out:
            report(f"left out: {left}")
    report(f"{len(plan.members)} members in {plan.out}: {', '.join(member.name for member in plan.members)}")
    if plan.halving is not None and plan.stops:
        stops = ", ".join(map(str, plan.stops))
        report(f"halving: after steps {stops} one of {plan.halving.factor} goes on, by validation loss")


def _trained(going: _Sweep) -> bool:
    """All rungs, or the one rung there is. False where it was interrupted."""
    stops: list[int | None] = [*going.plan.stops, None]
    for rung, stop_at in enumerate(stops):
        begun = [wave for wave in going.book.waves if wave["rung"] == rung]
        if not begun:
            begun = _new_waves(going, rung, stop_at)
            going.book.waves.extend(begun)
        for wave in begun:
            if not wave["begun"]:
                begun += _cut_again(going, wave)
            if not wave["done"] and not _wave_trained(going, wave):
                return False
            if stop_at is None and not wave["scored"]:
                _score(going, wave)
            _take_off(going)
        if stop_at is not None:
            _drop(going, rung)
    return True


def _new_waves(going: _Sweep, rung: int, stop_at: int | None) -> list[dict[str, Any]]:
    names = going.book.alive()
    told: dict[int, int] = {}

    def fits(rest: Sequence[str]) -> int:
        told[len(told)] = members_that_fit(going.on, [going.recipe(name) for name in rest])
        return told[len(told) - 1]

    parts = waves(names, fits) if names else []
    if len(parts) > 1:
        going.report(
            f"{told[0]} of {len(names)} members fit into free memory beside the base, so they train in {len(parts)} "
            f"waves of {', '.join(str(len(part)) for part in parts)}"
        )
    return [
        {
            "rung": rung,
            "stop_at": stop_at,
            "members": part,
            "why": "all fit into memory" if len(parts) == 1 else f"{told[index]} fit into free memory beside the base",
            "begun": False,
            "done": False,
            "scored": False,
        }
        for index, part in enumerate(parts)
    ]


def _cut_again(going: _Sweep, wave: dict[str, Any]) -> list[dict[str, Any]]:
    """Waves for the members that a wave has no memory for any more, to be trained after all others."""
    names = wave["members"]
    fit = members_that_fit(going.on, [going.recipe(name) for name in names])
    if fit >= len(names):
        return []
    rest = {**wave, "members": names[fit:]}
    wave |= {"members": names[:fit], "why": f"{fit} still fitted into free memory beside the base"}
    going.book.waves.append(rest)
    going.report(f"{fit} of {', '.join(names)} still fit into free memory; the others train in a wave of their own")
    return [rest]


def _wave_trained(going: _Sweep, wave: dict[str, Any]) -> bool:
    """Train a wave's members together, to the end or to where its rung compares them."""
    book, names, stop_at = going.book, wave["members"], wave["stop_at"]
    first = not any(other["done"] for other in book.waves) and not going.resumed
    for name in names:
        book.member(name)["state"] = "training"
    wave["begun"] = True
    book.save()
    begun = going.resumed or wave["rung"] > 0
    recipes = [going.recipe(name) for name in names]
    progress = going.progress() if going.progress else None
    try:
        runs = train_together(
            recipes, resume=begun, overwrite=going.overwrite and not begun, progress=progress,
            report=going.report, stop_at=stop_at, on=going.on,
        )  # fmt: skip
    except NonFiniteLossError as error:  # one alone; among several it leaves and the others go on
        if len(names) > 1:
            raise
        book.member(names[0]).update(state="diverged", rung=wave["rung"], error=str(error))
        going.report(f"{names[0]} diverged: {error}")
    except RequestError:
        if first and not any(Path(recipe.output_dir).exists() for recipe in recipes):
            book.discard()
        raise
    else:
        if not _taken(book, wave, dict(zip(names, runs)), going.trained):
            book.save()
            return False
    wave |= {"done": True} | pass_cost(book, wave)
    book.save()
    return True


def _taken(book: Book, wave: dict[str, Any], runs: dict[str, TrainedRun], trained: dict[str, str]) -> bool:
    """Write down how members ended. False where they were interrupted before that."""
    stop_at, interrupted = wave["stop_at"], False
    for name, run in runs.items():
        ended, steps = run.result["stopped"], run.result["steps"]
        book.take_result(name, run.result)
        trained[name] = run.name
        at_rung = stop_at is not None and steps >= stop_at
        if ended in ENDED or at_rung:
            book.member(name).update(state=ended if ended in ENDED else "training", rung=wave["rung"])
        else:
            interrupted = True
    return not interrupted


def _drop(going: _Sweep, rung: int) -> None:
    """The points that go on: the best of `factor` by the mean validation loss of their members at the rung."""
    book, halving = going.book, going.plan.halving
    assert halving is not None
    if any(member["left_at"] == rung for member in book.values["members"]):
        return  # dropped before the sweep was resumed
    losses: dict[str, list[float]] = {}
    for member in book.values["members"]:
        if member["state"] == "left":
            continue
        loss = (member["result"] or {}).get("last_eval_loss")
        if loss is None or member["state"] == "diverged":  # a point of which one seed diverged is no candidate
            loss = float("inf")
        losses.setdefault(member["point"], []).append(loss)
    ranked = sorted(losses, key=lambda point: sum(losses[point]) / len(losses[point]))
    kept = ranked[: max(1, ceil(len(ranked) / halving.factor))]
    gone = [name for name in book.alive() if book.member(name)["point"] not in kept]
    for name in gone:
        book.member(name).update(state="left", left_at=rung)
    book.save()
    stop = going.plan.stops[rung]
    going.report(
        f"rung {rung + 1}, step {stop}: {', '.join(book.alive()) or 'none'} go on; {', '.join(gone) or 'none'} leave"
    )


def _score(going: _Sweep, wave: dict[str, Any]) -> None:
    """Exact answers and loss of a wave's members; those that diverged and jobs without rows to score on have none."""
    todo = []
    for name in wave["members"]:
        member, recipe = going.book.member(name), going.recipe(name)
        measured = recipe.evaluation.data or (member["result"] or {}).get("last_eval_loss") is not None
        if measured and member["state"] in ("finished", "early stopping"):
            todo.append(Finished(name, Path(recipe.output_dir), recipe, _on_base(going, name)))
    if todo:
        seed = min(member.recipe.training.seed for member in going.plan.members)
        for name, scored in evaluate_members(going.on.base, todo, seed, going.report).items():
            going.book.take_scores(name, scored, going.recipe(name).evaluation.data is None)
    wave["scored"] = True
    going.book.save()


def _on_base(going: _Sweep, name: str) -> str:
    """The name on the base of a member's adapter: it is there since it was trained, or is read from its folder."""
    if name not in going.trained:
        base = going.on.base
        saved = read_adapter(Path(going.recipe(name).output_dir) / ADAPTER)
        going.trained[name] = f"member{len(going.trained)}"
        load_adapter(going.on.adapters, going.trained[name], saved, BaseId(base.name, base.fingerprint), False)
    return going.trained[name]


def _take_off(going: _Sweep) -> None:
    """Make room for the next wave."""
    for adapter in going.trained.values():
        going.on.adapters.remove(adapter)
    going.trained.clear()
