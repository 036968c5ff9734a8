"""A sweep in words and tables: its points, what came of each member, what it cost, and where ranks stop paying."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from topwork.reporting import wording
from topwork.reporting.sweep_points import diminishing_returns, final_loss, points
from topwork.reporting.sweep_state import Cost, Estimate, Point, SweepState, TrialRecord, TrialScores, TrialState

RULE = (
    "The rule: the smallest rank whose mean accuracy (loss, where nothing is graded) is within one standard error of "
    "the best rank's. The error is that of the mean over seeds; with one seed it is the binomial one of the graded "
    "rows. Ranks of which a member diverged are not candidates."
)
HELD_OUT = "held out of training"
"""What evaluation.json calls rows that the seed chose."""
STATES = {
    TrialState.FINISHED: "finished",
    TrialState.EARLY_STOPPING: "stopped early",
    TrialState.DIVERGED: "diverged",
    TrialState.WAITING: "not begun",
    TrialState.TRAINING: "not finished",
}
Table = list[list[str]]


@dataclass(frozen=True)
class SweepPage:
    """What the page shows, in words. A table's first row is its head."""

    name: str
    headline: str
    text: str
    left_out: list[str]
    points: Table
    point_notes: list[str]
    returns: list[str]
    rule: str
    members: Table
    rungs: list[str]
    cost: list[str]


def markdown(page: SweepPage, pictures: Mapping[str, str]) -> str:
    """The whole report; `pictures` are paths by title."""
    lines = [f"# Sweep {page.name}", "", page.headline, ""]
    lines += [page.text, ""] if page.text else []
    lines += [f"- left out: {told}" for told in page.left_out] + ([""] if page.left_out else [])
    lines += ["## Results", "", *_table(page.points), "", *page.point_notes, ""]
    for told in page.returns:
        lines += [told, ""]
    if page.returns:
        lines += [f"*{page.rule}*", ""]
    for title, path in pictures.items():
        lines += [f"![{title}]({path})", ""]
    lines += ["## Members", "", *_table(page.members), ""]
    if page.rungs:
        lines += ["## Halving", "", *(f"- {told}" for told in page.rungs), ""]
    lines += ["## Cost", "", *(f"- {told}" for told in page.cost), ""]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def page_of(sweep: SweepState) -> SweepPage:
    """A sweep's page."""
    found = points(sweep)
    return SweepPage(
        name=sweep.name,
        headline=_headline(sweep, found),
        text=sweep.text or "",
        left_out=sweep.left_out,
        points=_points_table(sweep, found),
        point_notes=_point_notes(sweep, found),
        returns=[verdict.sentence for verdict in diminishing_returns(sweep)],
        rule=RULE,
        members=_trials_table(sweep),
        rungs=_rungs(sweep),
        cost=cost_lines(sweep.cost),
    )


def base_scores(sweep: SweepState) -> TrialScores | None:
    """The bare base's scores and loss, where all trials were asked the same rows."""
    scored = [(trial, trial.before) for trial in sweep.trials if trial.before]
    held_out = any(before.data == HELD_OUT for _, before in scored)
    asked = {(before.data, before.rows, held_out and trial.seed) for trial, before in scored}
    if len(asked) != 1:
        return None
    trial, before = scored[0]
    validated = trial.result.eval_loss_before if trial.result else None
    if trial.on_validation and validated is not None:
        return before.model_copy(update={"loss": validated})
    return before


def cost_lines(cost: Cost | None) -> list[str]:
    """Time and memory together, and one by one; an estimate is called one."""
    if cost is None:
        return ["not known before the sweep ends"]
    lines = []
    if cost.tokens_per_second is not None:
        lines.append(
            f"together, in {wording.whole(cost.waves)} wave(s): {wording.duration(cost.pass_seconds)} for "
            f"{wording.whole(cost.tokens)} tokens of all members, {wording.whole(cost.tokens_per_second)} tokens/s"
        )
    if cost.alone_seconds is not None and cost.time_ratio is not None:
        lines.append(
            f"one by one: {wording.duration(cost.alone_seconds)}, from each one's own speed measured alone for "
            f"{wording.whole(cost.alone_steps or 0)} steps; together takes {cost.time_ratio:.2f} of that time"
        )
    elif cost.one_by_one_seconds_estimate is not None:
        lines.append(
            "one by one (an estimate, from the members' tokens at the pass's own speed): "
            f"{wording.duration(cost.one_by_one_seconds_estimate)}, and the base loaded for each; passes of one "
            "member's small batches are slower than that. --measure-alone measures it"
        )
    return lines + _memory_lines(cost)


def _memory_lines(cost: Cost) -> list[str]:
    peak = cost.peak_memory_bytes
    if peak is None:
        return []
    largest = cost.largest_alone_bytes or cost.largest_alone_bytes_estimate
    lines = []
    if largest:
        estimated = "an estimate: without the other members' weights, gradients and optimizer"
        lines.append(
            f"peak memory together {wording.size(peak)}, {peak / largest:.2f} times the largest alone "
            f"({wording.size(largest)}, {'measured' if cost.largest_alone_bytes else estimated})"
        )
    if cost.base_weights_bytes:
        lines.append(
            f"the base ({wording.size(cost.base_weights_bytes)}) is in memory once, not once for each of "
            f"{wording.whole(cost.trials)} members"
        )
    return lines


def _headline(sweep: SweepState, found: Sequence[Point]) -> str:
    states = [trial.state for trial in sweep.trials]
    told = [f"{len(states)} members", f"{len(found)} points" if len(found) < len(states) else ""]
    told.append(f"over {sweep.model}")
    for state, words in (
        (TrialState.DIVERGED, "diverged"),
        (TrialState.LEFT, "left at a rung"),
        (TrialState.EARLY_STOPPING, "stopped early"),
    ):
        told += [f"{states.count(state)} {words}"] if state in states else []
    return ", ".join(part for part in told if part) + "."


def _points_table(sweep: SweepState, found: Sequence[Point]) -> Table:
    graded = any(point.accuracy for point in found)
    table = [["", "trained parameters", "seeds", *(["exact answers"] if graded else []), "loss", ""]]
    base = base_scores(sweep)
    if base:
        exact = [wording.share(base.exact_match) if base.exact_match is not None else "–"] if graded else []
        table.append(["bare base", "–", "–", *exact, wording.loss(base.loss), ""])
    for point in found:
        exact = [_share(point.accuracy)] if graded else []
        trained = wording.whole(point.trained) if point.trained is not None else "–"
        table.append([point.name, trained, str(len(point.names)), *exact, _loss(point.loss), _remark(point)])
    return table


def _remark(point: Point) -> str:
    if point.diverged:
        return "diverged" if len(point.names) == 1 else f"{point.diverged} of {len(point.names)} diverged"
    return "left at a rung" if point.left else ""


def _point_notes(sweep: SweepState, found: Sequence[Point]) -> list[str]:
    """What ± means here, and what rows there were."""
    rows = {trial.scores.rows for trial in sweep.trials if trial.scores}
    told = [f"Answers to {wording.whole(rows.pop())} rows." if len(rows) == 1 else ""]
    if any(trial.on_validation for trial in sweep.trials):
        told.append("The loss is over all validation rows.")
    if any(point.accuracy and point.accuracy.count > 1 for point in found):
        told.append("± is the standard error of the mean over seeds.")
    elif any(point.accuracy and point.accuracy.error for point in found):
        told.append("± is the binomial standard error of the graded rows, as there is one seed.")
    return [" ".join(part for part in told if part)]


def _trials_table(sweep: SweepState) -> Table:
    table = [["", "steps", "training loss", "validation loss", "loss", "exact answers", "ended"]]
    for trial in sweep.trials:
        result, share = trial.result, trial.scores.exact_match if trial.scores else None
        losses = [result.last_loss if result else None, result.eval_loss_after if result else None, final_loss(trial)]
        table.append(
            [
                trial.name if trial.folder == trial.name else f"{trial.name} in {trial.folder}",
                wording.whole(result.steps) if result else "–",
                *(wording.loss(loss) if loss is not None else "–" for loss in losses),
                wording.share(share) if share is not None else "–",
                _ended(trial),
            ]
        )
    return table


def _ended(trial: TrialRecord) -> str:
    if trial.left_at is not None:
        return f"left at rung {trial.left_at + 1}"
    diverged = trial.state is TrialState.DIVERGED
    at = f" after step {wording.whole(trial.result.steps)}" if diverged and trial.result else ""
    return STATES[trial.state] + at


def _rungs(sweep: SweepState) -> list[str]:
    """Who left at which rung, and who went to the end."""
    stops = sweep.halving.stops if sweep.halving else []
    lines = []
    for rung, stop in enumerate(stops):
        gone = [trial for trial in sweep.trials if trial.left_at == rung]
        losses = {trial.name: trial.result.last_eval_loss if trial.result else None for trial in gone}
        told = [f"{name} ({wording.loss(loss)})" if loss is not None else name for name, loss in losses.items()]
        lines.append(f"rung {rung + 1}, step {stop}: {', '.join(told) or 'none'} left")
    if stops:
        last = [trial.name for trial in sweep.alive()]
        lines.append(f"rung {len(stops) + 1}, the whole plan: {', '.join(last) or 'none'}")
    return lines


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    error = f" ± {100 * estimate.error:.1f}" if estimate.error is not None else ""
    return f"{100 * estimate.mean:.1f}{error} %"


def _loss(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return wording.loss(estimate.mean) + (f" ± {estimate.error:.2g}" if estimate.error is not None else "")


def _table(rows: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    head, *body = rows
    return [line(head), "|" + "|".join([" --- ", *(" ---: " for _ in head[1:])]) + "|", *map(line, body)]
