"""Rows that repeat or contradict one another, and test rows that are trained on."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from topwork.plan.lint.examined import Examined, Side, answer_of, squeezed
from topwork.plan.lint.finding import Finding, Severity, graded, of_rows, share_of
from topwork.plan.lint.near import near_pairs, shingles_of

_REPEATED, _LEAKED = 0.2, 0.005
"""Shares from which it is a warning. What repeats is learned more often; what leaks makes a score too kind."""
_BY_DESIGN = 0.3
"""Where so many prompts have several answers, the data are made that way (references, samples of a model)."""
_LABEL_WORDS = 5
"""An answer of at most so many words is a label, of which one prompt has one."""


def duplicates(examined: Examined) -> Iterator[Finding]:
    """Rows that say the same, white space aside, as one before them."""
    side = examined.train
    first, again = _repeats(side.wholes)
    if again:
        severity = "notice" if examined.recipe.data.duplicates == "drop" else graded(len(again), side.rows, _REPEATED)
        then = "; data.duplicates: drop keeps the first" if examined.recipe.data.duplicates == "drop" else ""
        yield of_rows(
            "duplicates", severity, [side.conversations[row].source for row in again], side.rows,
            f"repeat another ({_pairs(side, side, zip(again, first))}){then}",
            "data.duplicates: drop keeps the first of them; keep them where a row is meant to weigh more",
        )  # fmt: skip


def contradictions(examined: Examined) -> Iterator[Finding]:
    """One prompt with several answers."""
    side = examined.train
    groups: dict[bytes, list[int]] = {}
    for number, (row, key) in enumerate(zip(side.conversations, side.prompts)):
        if row.kind == "chat":
            groups.setdefault(key, []).append(number)
    several = [rows for rows in groups.values() if len(rows) > 1 and len({side.wholes[row] for row in rows}) > 1]
    if not several:
        return
    rows = sorted(row for group in several for row in group)
    labels = all(len(answer_of(side.conversations[row]).split()) <= _LABEL_WORDS for row in rows[:1000])
    design = len(several) >= _BY_DESIGN * len(groups) or not labels
    severity: Severity = "notice" if design else graded(len(rows), side.rows)
    one = several[0]
    answers = " / ".join(repr(squeezed(answer_of(side.conversations[row]))[:40]) for row in one[:2])
    yield of_rows(
        "contradictions", severity, [side.conversations[row].source for row in rows], side.rows,
        f"share their prompt with a row that answers otherwise ({len(several):,} prompt{'s' * (len(several) != 1)}; "
        f"{side.conversations[one[0]].source} and {side.conversations[one[1]].source}: {answers})",
        "nothing where several answers are right; else correct or leave out the wrong ones: the model learns to waver "
        "between them",
    )  # fmt: skip


def near_duplicates(examined: Examined) -> Iterator[Finding]:
    """Rows of the training set that are nearly the same, in words."""
    side = examined.train
    known = set(_repeats(side.wholes)[1])
    texts = ("" if number in known else _text_of(side, number) for number in range(len(side.conversations)))
    pairs = near_pairs(shingles_of(texts))
    if pairs:
        first: dict[int, int] = {}
        for earlier, later in pairs:
            first.setdefault(later, earlier)
        again = sorted(first)
        told = _pairs(side, side, ((row, first[row]) for row in again))
        yield of_rows(
            "near-duplicates", graded(len(again), side.rows, 0.5), [side.conversations[row].source for row in again],
            side.rows, f"are nearly another row of training ({told})",
            "look at some of them: paraphrases made by a template teach little and can stand on both sides of a "
            "held-out split (data.hold_out_by keeps those with one value of a column together)",
        )  # fmt: skip


def leaks(examined: Examined) -> Iterator[Finding]:
    """Rows that validate or score and stand in training too: the same prompt, white space and case aside."""
    known: dict[bytes, int] = {}
    for number, key in enumerate(examined.train.asked):
        known.setdefault(key, number)
    for side in (examined.eval, examined.test):
        if side is None:
            continue
        found = [(number, known[key]) for number, key in enumerate(side.asked) if key in known]
        if found:
            rows = [side.conversations[number].source for number, _ in found]
            same = sum(side.wholes[number] == examined.train.wholes[other] for number, other in found)
            yield of_rows(
                "test-rows-in-training", graded(len(found), side.rows, _LEAKED, 0.1), rows, side.rows,
                f"of {side.named} ({_ROLE[side.name]}) have a prompt that training has too, {same:,} of them with the "
                f"same answer ({_pairs(side, examined.train, found)})",
                f"take them out of one of the two; until then {_SCORE[side.name]} is that much too kind",
            )  # fmt: skip
    if examined.eval is not None and examined.test is not None and examined.eval.named != examined.test.named:
        yield from _chosen_and_scored(examined.eval, examined.test)


_ROLE = {"eval": "which validates", "test": "evaluation.data"}
_SCORE = {"eval": "the validation loss", "test": "the score"}


def _chosen_and_scored(evaluation: Side, test: Side) -> Iterator[Finding]:
    shared = set(evaluation.asked) & set(test.asked)
    if shared:
        rows = [row.source for row, key in zip(test.conversations, test.asked) if key in shared]
        yield of_rows(
            "eval-rows-in-test", "notice", rows, test.rows,
            f"of {test.named} are in {evaluation.named} too, by which the best step is chosen",
            "keep the rows that choose a model and those that score it apart",
        )  # fmt: skip


def near_leaks(examined: Examined) -> Iterator[Finding]:
    """Rows that score and are nearly a row of training."""
    for side in (examined.eval, examined.test):
        if side is None:
            continue
        exact = set(side.asked) & set(examined.train.asked)
        count = len(examined.train.conversations)
        train = (_text_of(examined.train, number) for number in range(count))
        asked = ("" if key in exact else _text_of(side, number) for number, key in enumerate(side.asked))
        pairs = near_pairs(shingles_of(chain(train, asked)), split=count)
        near: dict[int, int] = {}
        for earlier, later in pairs:
            near.setdefault(later - count, earlier)
        if near:
            yield of_rows(
                "near-test-rows-in-training", graded(len(near), side.rows, 0.5),
                [side.conversations[row].source for row in sorted(near)], side.rows,
                f"of {side.named} ({_ROLE[side.name]}) are nearly a row of training "
                f"({_pairs(side, examined.train, sorted(near.items()))})",
                f"look at some of them; where they ask the same thing, {_SCORE[side.name]} measures what was seen",
            )  # fmt: skip


def dominating(examined: Examined) -> Iterator[Finding]:
    """One answer that most rows share."""
    side = examined.train
    answers = [squeezed(answer_of(row)) for row in side.conversations if row.kind == "chat"]
    if len(answers) < 10:
        return
    (answer, count), *_ = Counter(answers).most_common(1)
    if answer and count >= 0.5 * len(answers):
        rows = [row.source for row in side.conversations if row.kind == "chat" and squeezed(answer_of(row)) == answer]
        severity: Severity = "warning" if count >= 0.9 * len(answers) else "notice"
        yield Finding(
            "dominating-answer", severity,
            f"{share_of(count, len(answers), 'answer')} are the same: {answer[:60]!r}. A model that always says this "
            "has that share right",
            "add rows with other answers, or weigh the rare ones more; read the score beside that share",
            tuple(rows), count,
        )  # fmt: skip


def _repeats(keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """(number of the first with the same key, number) of every one that is not the first."""
    seen: dict[bytes, int] = {}
    first, again = [], []
    for number, key in enumerate(keys):
        earlier = seen.setdefault(key, number)
        if earlier != number:
            first.append(earlier)
            again.append(number)
    return first, again


def _text_of(side: Side, number: int) -> str:
    """What is compared of a row: all that is asked and answered, not the system message, which many rows share."""
    row = side.conversations[number]
    if row.kind == "text":
        return row.text or ""
    return " ".join(message.content for message in row.messages if message.role != "system")


def _pairs(side: Side, other: Side, pairs: object, limit: int = 3) -> str:
    """ "train.jsonl:4 is train.jsonl:1, …"."""
    listed = [(int(a), int(b)) for a, b in pairs]  # type: ignore[attr-defined]
    told = [f"{side.conversations[a].source} is {other.conversations[b].source}" for a, b in listed[:limit]]
    return ", ".join(told) + (", …" if len(listed) > limit else "")
