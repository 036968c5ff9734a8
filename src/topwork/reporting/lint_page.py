"""The page of `topwork lint --html`: rows token by token, lengths, findings. One file that needs nothing beside itself.

It is made of the object that `--json` prints. All of it is strangers' text: every value is escaped, and the page's own
policy forbids scripts and requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from topwork.reporting.lint_text import counts, last_line, visible
from topwork.reporting.page import environment

Found = Mapping[str, Any]
NAMED = 1000
"""Rows that are named of a finding; `--json` has all."""
WIDTH, HEIGHT, FOOT = 720, 180, 28


@dataclass(frozen=True)
class Bar:
    """One of the histogram's, in the drawing's units."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """Bars, what stands below the axis as (x, text), and where the longest sequence that fits would end."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    limit: float | None
    width: int = WIDTH
    height: int = HEIGHT
    foot: int = FOOT


def lint_page(found: Found, name: str) -> str:
    """The page as text; `name` is what the recipe is called."""
    return (
        environment()
        .get_template("lint.html.jinja")
        .render(
            name=visible(name),
            model=visible(str(found["model"])),
            last_line=last_line(found),
            counts=counts(found),
            findings=[_finding(each) for each in found["findings"]],
            rows=[_row(each) for each in found["shown"]],
            histogram=histogram(found["lengths"]),
            limit=found["limit"],
        )
    )


def _finding(finding: Found) -> dict[str, Any]:
    rows = finding["rows"]
    return {
        "rule": finding["rule"],
        "severity": finding["severity"],
        "message": visible(finding["message"]),
        "remedy": visible(finding["remedy"]),
        "rows": [visible(row) for row in rows[:NAMED]],
        "count": len(rows),
        "more": max(0, len(rows) - NAMED),
    }


def _row(row: Found) -> dict[str, Any]:
    pieces = [_piece(piece) for piece in row["pieces"]]
    halves = [pieces[: row["head"]], pieces[row["head"] :]] if row["left_out"] else [pieces]
    return {
        "source": visible(row["source"]),
        "side": row["side"],
        "length": row["length"],
        "learned": row["learned"],
        "left_out": row["left_out"],
        "halves": halves,
    }


def _piece(piece: Found) -> dict[str, str]:
    weight = piece["weight"]
    kinds = {"learned": weight > 0 and not piece["cut"], "special": piece["special"], "cut": piece["cut"]}
    told = f"learned with weight {weight:g}" if weight not in (0, 1) else "learned" if weight else "not learned"
    return {
        "text": visible(piece["text"]),
        "kinds": " ".join(name for name, true in kinds.items() if true),
        "title": f"token {piece['id']}, {'cut off' if piece['cut'] else told}{', special' * piece['special']}",
    }


def histogram(lengths: Found) -> Histogram | None:
    """The bars of the lengths; None where there is nothing to draw."""
    counted, edges = lengths["counts"], lengths["edges"]
    if not counted:
        return None
    step, most = WIDTH / len(counted), max(counted)
    bars = [
        Bar(
            number * step + 1, HEIGHT - HEIGHT * count / most, step - 2, HEIGHT * count / most,
            f"{count:,} sequence{'s' * (count != 1)} of {edges[number]:,} to {edges[number + 1] - 1:,} tokens",
        )
        for number, count in enumerate(counted)
    ]  # fmt: skip
    every = max(1, len(counted) // 8)
    ticks = [(number * step, f"{edges[number]:,}") for number in range(0, len(counted), every)]
    return Histogram(bars, ticks, _place(lengths["limit"] + 1, edges, step))


def _place(beyond: int, edges: list[int], step: float) -> float | None:
    for number, (low, high) in enumerate(zip(edges, edges[1:])):
        if low <= beyond < high:
            return step * (number + (beyond - low) / (high - low))
    return None
