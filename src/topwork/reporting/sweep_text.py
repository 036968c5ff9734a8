"""A sweep in words and tables: its points, what came of each member, what it cost, and where ranks stop paying."""

from collections.abc import Mapping, Sequence
from typing import Any

from topwork.reporting import wording
from topwork.reporting.readers import entries, number, section
from topwork.reporting.sweep_points import (
    DIVERGED,
    Estimate,
    Point,
    diminishing_returns,
    final_loss,
    members,
    points,
)

RULE = (
    "The rule: the smallest rank whose mean accuracy (loss, where nothing is graded) is within one standard error of "
    "the best rank's. The error is that of the mean over seeds; with one seed it is the binomial one of the graded "
    "rows. Ranks of which a member diverged are not candidates."
)
HELD_OUT = "held out of training"
"""What evaluation.json calls rows that the seed chose."""
STATES = {
    "finished": "finished",
    "early stopping": "stopped early",
    "diverged": "diverged",
    "waiting": "not begun",
    "training": "not finished",
}
Table = list[list[str]]


def markdown(sweep: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The whole report; `pictures` are paths by title."""
    values = page_values(sweep)
    lines = [f"# Sweep {sweep['name']}", "", values["headline"], ""]
    lines += [values["text"], ""] if values["text"] else []
    lines += [f"- left out: {told}" for told in values["left_out"]] + ([""] if values["left_out"] else [])
    lines += ["## Results", "", *_table(values["points"]), "", *values["point_notes"], ""]
    for told in values["returns"]:
        lines += [told, ""]
    if values["returns"]:
        lines += [f"*{RULE}*", ""]
    for title, path in pictures.items():
        lines += [f"![{title}]({path})", ""]
    lines += ["## Members", "", *_table(values["members"]), ""]
    if values["rungs"]:
        lines += ["## Halving", "", *(f"- {told}" for told in values["rungs"]), ""]
    lines += ["## Cost", "", *(f"- {told}" for told in values["cost"]), ""]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def page_values(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows, in words. A table's first row is its head."""
    found = points(sweep)
    return {
        "name": str(sweep["name"]),
        "headline": _headline(sweep, found),
        "text": str(sweep.get("text") or ""),
        "left_out": [str(told) for told in entries(sweep, "left_out")],
        "points": _points_table(sweep, found),
        "point_notes": _point_notes(sweep, found),
        "returns": [verdict.sentence() for verdict in diminishing_returns(sweep)],
        "rule": RULE,
        "members": _members_table(sweep),
        "rungs": _rungs(sweep),
        "cost": cost_lines(sweep),
    }


def base_scores(sweep: Mapping[str, Any]) -> Mapping[str, Any]:
    """The bare base's scores and loss, where all members were asked the same rows."""
    scored = [member for member in members(sweep) if section(member, "before")]
    held_out = any(section(member, "before").get("data") == HELD_OUT for member in scored)
    asked = {
        (section(member, "before").get("data"), section(member, "before").get("rows"), held_out and member.get("seed"))
        for member in scored
    }
    if len(asked) != 1:
        return {}
    before = dict(section(scored[0], "before"))
    validated = number(scored[0], "result", "eval_loss_before")
    if scored[0].get("on_validation") and validated is not None:
        before["loss"] = validated
    return before


def cost_lines(sweep: Mapping[str, Any]) -> list[str]:
    """Time and memory together, and one by one; an estimate is called one."""
    cost, lines = section(sweep, "cost"), []
    if not cost:
        return ["not known before the sweep ends"]
    seconds, tokens, speed = (number(cost, key) for key in ("pass_seconds", "tokens", "tokens_per_second"))
    if seconds is not None and tokens is not None and speed is not None:
        waves = f"in {wording.whole(number(cost, 'waves') or 1)} wave(s)"
        lines.append(
            f"together, {waves}: {wording.duration(seconds)} for {wording.whole(tokens)} tokens of all members, "
            f"{wording.whole(speed)} tokens/s"
        )
    alone, ratio = number(cost, "alone_seconds"), number(cost, "time_ratio")
    estimate = number(cost, "one_by_one_seconds_estimate")
    if alone is not None and ratio is not None:
        lines.append(
            f"one by one: {wording.duration(alone)}, from each one's own speed measured alone for "
            f"{wording.whole(number(cost, 'alone_steps') or 0)} steps; together takes {ratio:.2f} of that time"
        )
    elif estimate is not None:
        lines.append(
            "one by one (an estimate, from the members' tokens at the pass's own speed): "
            f"{wording.duration(estimate)}, and the base loaded for each; passes of one member's small batches are "
            "slower than that. --measure-alone measures it"
        )
    return lines + _memory_lines(cost)


def _memory_lines(cost: Mapping[str, Any]) -> list[str]:
    peak, weights = number(cost, "peak_memory_bytes"), number(cost, "base_weights_bytes")
    if peak is None:
        return []
    measured, guessed = number(cost, "largest_alone_bytes"), number(cost, "largest_alone_bytes_estimate")
    largest = measured or guessed
    lines = []
    if largest:
        kind = "measured" if measured else "an estimate: without the other members' weights, gradients and optimizer"
        lines.append(
            f"peak memory together {wording.size(peak)}, {peak / largest:.2f} times the largest alone "
            f"({wording.size(largest)}, {kind})"
        )
    if weights:
        count = wording.whole(number(cost, "members") or 1)
        lines.append(f"the base ({wording.size(weights)}) is in memory once, not once for each of {count} members")
    return lines


def _headline(sweep: Mapping[str, Any], found: Sequence[Point]) -> str:
    all_members = members(sweep)
    states = [str(member.get("state")) for member in all_members]
    told = [f"{len(all_members)} members", f"{len(found)} points" if len(found) < len(all_members) else ""]
    told.append(f"over {sweep.get('model')}")
    for state, words in (("diverged", "diverged"), ("left", "left at a rung"), ("early stopping", "stopped early")):
        told += [f"{states.count(state)} {words}"] if state in states else []
    return ", ".join(part for part in told if part) + "."


def _points_table(sweep: Mapping[str, Any], found: Sequence[Point]) -> Table:
    graded = any(point.accuracy for point in found)
    table = [["", "trained parameters", "seeds", *(["exact answers"] if graded else []), "loss", ""]]
    base = base_scores(sweep)
    if base:
        share, loss = number(base, "exact_match"), number(base, "loss")
        exact = [wording.share(share) if share is not None else "–"] if graded else []
        table.append(["bare base", "–", "–", *exact, wording.loss(loss) if loss is not None else "–", ""])
    for point in found:
        exact = [_share(point.accuracy)] if graded else []
        trained = wording.whole(point.trained) if point.trained is not None else "–"
        table.append([point.name, trained, str(len(point.members)), *exact, _loss(point.loss), _remark(point)])
    return table


def _remark(point: Point) -> str:
    if point.diverged:
        return "diverged" if len(point.members) == 1 else f"{point.diverged} of {len(point.members)} diverged"
    return "left at a rung" if point.left else ""


def _point_notes(sweep: Mapping[str, Any], found: Sequence[Point]) -> list[str]:
    """What ± means here, and what rows there were."""
    rows = {number(member, "scores", "rows") for member in members(sweep)} - {None}
    told = [f"Answers to {wording.whole(rows.pop())} rows." if len(rows) == 1 else ""]  # type: ignore[arg-type]
    if any(member.get("on_validation") for member in members(sweep)):
        told.append("The loss is over all validation rows.")
    if any(point.accuracy and point.accuracy.count > 1 for point in found):
        told.append("± is the standard error of the mean over seeds.")
    elif any(point.accuracy and point.accuracy.error for point in found):
        told.append("± is the binomial standard error of the graded rows, as there is one seed.")
    return [" ".join(part for part in told if part)]


def _members_table(sweep: Mapping[str, Any]) -> Table:
    table = [["", "steps", "training loss", "validation loss", "loss", "exact answers", "ended"]]
    for member in members(sweep):
        steps = number(member, "result", "steps")
        losses = [number(member, "result", "last_loss"), number(member, "result", "eval_loss_after")]
        losses.append(final_loss(member))
        share = number(member, "scores", "exact_match")
        table.append(
            [
                _name(member),
                wording.whole(steps) if steps is not None else "–",
                *(wording.loss(loss) if loss is not None else "–" for loss in losses),
                wording.share(share) if share is not None else "–",
                _state(member),
            ]
        )
    return table


def _name(member: Mapping[str, Any]) -> str:
    """With its folder, where that is not of its name."""
    name, folder = str(member["name"]), str(member.get("folder"))
    return name if folder == name else f"{name} in {folder}"


def _state(member: Mapping[str, Any]) -> str:
    left = member.get("left_at")
    if left is not None:
        return f"left at rung {int(left) + 1}"
    state = str(member.get("state"))
    steps = number(member, "result", "steps")
    at = f" after step {wording.whole(steps)}" if state == DIVERGED and steps is not None else ""
    return STATES.get(state, state) + at


def _rungs(sweep: Mapping[str, Any]) -> list[str]:
    """Who left at which rung, and who went to the end."""
    stops = entries(section(sweep, "halving"), "stops")
    lines = []
    for rung, stop in enumerate(stops):
        gone = [member for member in members(sweep) if member.get("left_at") == rung]
        losses = {str(m["name"]): number(m, "result", "last_eval_loss") for m in gone}
        told = [f"{name} ({wording.loss(loss)})" if loss is not None else name for name, loss in losses.items()]
        lines.append(f"rung {rung + 1}, step {stop}: {', '.join(told) or 'none'} left")
    if stops:
        last = [str(m["name"]) for m in members(sweep) if m.get("left_at") is None and m.get("state") != DIVERGED]
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
