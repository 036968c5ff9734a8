"""How long sequences are: what does not fit, how much of it is lost, and rows unlike all others."""

from collections.abc import Iterator

import numpy as np

from topwork.plan.lint.examined import Examined, Side
from topwork.plan.lint.finding import Finding, Severity, graded, of_rows

OUTLIER = 8
"""Times the median from which a length is told."""
OUTLIER_TOKENS = 256
"""Below this no sequence is long."""


def too_long(examined: Examined) -> Iterator[Finding]:
    """Sequences that do not fit, and what becomes of them by `data.too_long`."""
    for side in (examined.train, examined.eval):
        if side is None or not len(side.sequences):
            continue
        over = side.sequences.lengths > examined.limit
        if over.any():
            yield _too_long(examined, side, np.flatnonzero(over))


def _too_long(examined: Examined, side: Side, over: np.ndarray) -> Finding:
    found, limit, way = side.sequences, examined.limit, examined.recipe.data.too_long
    lengths = found.lengths[over]
    beyond = lengths - limit
    longest = side.conversations[int(found.rows[over[int(lengths.argmax())]])].source
    size = (
        f"are longer than {limit:,} tokens, by {int(np.median(beyond)):,} in the median and by {int(beyond.max()):,} "
        f"at most ({longest} has {int(lengths.max()):,})"
    )
    rows = side.sources(found.rows[over])
    severity, then, remedy = _way(examined, side, over, way)
    return of_rows("truncation", severity, rows, side.rows, f"{size}; {then}", remedy)


def _way(examined: Examined, side: Side, over: np.ndarray, way: str) -> tuple[Severity, str, str]:
    """(severity, what happens to them, what to do) by `data.too_long`."""
    found, limit = side.sequences, examined.limit
    longest = int(found.lengths.max())
    raised = (
        f"set data.max_length: {longest} or more" if longest <= examined.context_length
        else f"the model's context is {examined.context_length:,}: shorten the rows"
    )  # fmt: skip
    if way == "refuse":
        return "error", "data.too_long: refuse ends the run", f"{raised}, or say by data.too_long what becomes of them"
    if way in ("oldest_turns", "middle") and side.conversations[int(found.rows[over[0]])].kind == "text":
        told = f"data.too_long: {way} shortens talks, so training refuses these, which are plain text"
        return "error", told, f"{raised}, or data.too_long: split"
    if way == "drop" and len(over) == len(found):
        return "error", "data.too_long: drop leaves them out, and nothing is left", raised
    if way == "drop":
        return graded(len(over), len(found)), "data.too_long: drop leaves them out", raised
    if way == "truncate":
        lost, whole, ends = _cut(side, over, limit)
        told = f"cutting them loses {lost:,} of {whole:,} learned tokens and the ends of {len(over):,} sequences"
        told += f"; {ends:,} of them lose every answer and are dropped" if ends else ""
        told += ", so nothing is left" if ends == len(found) else ""
        severity: Severity = "error" if ends == len(found) else "warning"
        return severity, told, f"{raised}, or data.too_long: middle or oldest_turns, which keep answers whole"
    if way == "split":
        return "notice", "they are cut in pieces, and every token is learned once", f"nothing, or {raised}"
    return "notice", f"data.too_long: {way} shortens what stands before their answers", f"nothing, or {raised}"


def _cut(side: Side, over: np.ndarray, limit: int) -> tuple[int, int, int]:
    """(learned tokens that are cut off, learned tokens of all, sequences of which none is left)."""
    found = side.sequences
    lost = unlearned = 0
    for start, stop in zip(found.bounds[over], found.bounds[over + 1]):
        lost += int(found.learned[start + limit : stop].sum())
        unlearned += not found.learned[start : start + limit].any()
    return lost, int(found.learned.sum()), unlearned


def outliers(examined: Examined) -> Iterator[Finding]:
    """A few rows much longer than the rest: a pasted log, two rows in one, a file without its line ends."""
    side = examined.train
    if len(side.sequences) < 20:
        return
    lengths = side.sequences.lengths
    median = float(np.median(lengths))
    far = np.flatnonzero((lengths > OUTLIER * median) & (lengths >= OUTLIER_TOKENS))
    if len(far) and len(far) < 0.05 * len(lengths):
        yield of_rows(
            "length-outliers", "notice", side.sources(side.sequences.rows[far]), side.rows,
            f"are more than {OUTLIER} times as long as the median row ({int(median):,} tokens); the longest has "
            f"{int(lengths.max()):,}",
            "look at them: several rows run together, a pasted log or a broken line end look like this; they also set "
            "the memory that a pass needs",
        )  # fmt: skip


def short_of_rows(examined: Examined) -> Iterator[Finding]:
    """Rows that were read only in part."""
    if examined.only_first:
        yield Finding(
            "not-all-rows", "notice",
            f"data.streaming is on, so only the first {examined.only_first:,} rows were looked at",
            "lint a file of it with --set data.streaming=false to look at all of its rows",
        )  # fmt: skip
