"""Which tokens are learned: the end of the turn, one BOS, something at all."""

from collections.abc import Iterator

import numpy as np

from topwork.plan.lint.examined import Examined, Sequences, Side
from topwork.plan.lint.finding import Finding, of_rows


def end_of_turn(examined: Examined) -> Iterator[Finding]:
    """Every learned answer has to end in a token by which generation stops, and that token has to be learned."""
    rows: list[str] = []
    for side in _learned_sides(examined):
        last = span_ends(side.sequences)
        unended = last[~np.isin(side.sequences.tokens[last], list(examined.facts.ends))]
        rows += side.sources(_rows_at(side.sequences, unended))
    if rows:
        yield of_rows(
            "end-of-turn", "error", rows, examined.total,
            "hold an answer whose end is not learned, so the model would not learn to stop there",
            "take a template that closes the assistant's turn with a special token (data.chat_template: chatml), and "
            "give the message that ends the turn no weight of 0",
        )  # fmt: skip


def end_inside(examined: Examined) -> Iterator[Finding]:
    """A token that ends a turn in the midst of one answer: a text that spells it, read as markup."""
    if examined.recipe.data.train_on == "all":
        return
    rows: list[str] = []
    for side in _learned_sides(examined):
        found = side.sequences
        ends = found.among(examined.facts.ends) & found.learned
        ends[span_ends(found)] = False
        inside = [row for row in _rows_at(found, np.flatnonzero(ends)) if side.conversations[row].kind == "chat"]
        rows += side.sources(inside)
    if rows:
        yield of_rows(
            "end-inside-answer", "error", rows, examined.total,
            "have a token that ends the turn in the midst of a learned answer: what follows it would never be "
            "generated",
            "data.split_special_tokens: true reads special tokens that a row's text spells as its letters; else take "
            "them out of the text",
        )  # fmt: skip


def double_bos(examined: Examined) -> Iterator[Finding]:
    """Two BOS at the head: the template writes one, and the text or the tokenizer another."""
    bos = examined.facts.bos
    rows: list[str] = []
    for side in _learned_sides(examined):
        heads = side.sequences.bounds[:-1][side.sequences.lengths > 1]
        tokens = side.sequences.tokens
        rows += side.sources(_rows_at(side.sequences, heads[(tokens[heads] == bos) & (tokens[heads + 1] == bos)]))
    if bos is not None and rows:
        yield of_rows(
            "double-bos", "error", rows, examined.total,
            f"begin with two BOS tokens ({_spelled(examined, bos)}); the model has only ever seen one",
            "take the BOS out of the rows' text or out of data.chat_template",
        )  # fmt: skip


def missing_bos(examined: Examined) -> Iterator[Finding]:
    """No BOS although the tokenizer puts one before every text: some models (Gemma) read badly without it."""
    facts, found = examined.facts, examined.train.sequences
    if facts.bos is None or not facts.adds_bos or not len(found):
        return
    without = found.tokens[found.bounds[:-1]] != facts.bos
    if without.any():
        yield of_rows(
            "missing-bos", "warning", examined.train.sources(found.rows[without]), examined.train.rows,
            f"do not begin with the BOS token {_spelled(examined, facts.bos)}, which this tokenizer puts before every "
            "text",
            "let data.chat_template begin with {{ bos_token }}",
        )  # fmt: skip


def pad_is_end(examined: Examined) -> Iterator[Finding]:
    """Harmless here, and the reason why models trained elsewhere do not stop."""
    facts = examined.facts
    if facts.pad is None or facts.pad not in facts.ends:
        return
    yield Finding(
        "pad-is-end-of-turn", "notice",
        f"the pad token is {_spelled(examined, facts.pad)}, which ends the turn too. Batches have no padding here and "
        "nothing is masked by its id, so the end of the turn is learned all the same",
        "nothing to do here; in a program that masks the pad token in the labels, give the tokenizer another pad token",
    )  # fmt: skip


def end_is_not_eos(examined: Examined) -> Iterator[Finding]:
    """Programs that know only the tokenizer's EOS would go on after the answer."""
    facts, found = examined.facts, examined.train.sequences
    last = span_ends(found)
    ends = {int(token) for token in np.unique(found.tokens[last])} & set(facts.ends)
    others = sorted(ends - {facts.eos})
    if facts.eos is not None and others and facts.eos not in ends:
        names = ", ".join(_spelled(examined, token) for token in others)
        yield Finding(
            "end-of-turn-is-not-eos", "notice",
            f"answers end in {names}, and the tokenizer's EOS is {_spelled(examined, facts.eos)}; here generation "
            "stops at both",
            f"where another program runs the model, let it stop at {names} (eos_token_id in generation_config.json)",
        )  # fmt: skip


def nothing_learned(examined: Examined) -> Iterator[Finding]:
    """Answers of which only the end of the turn is learned."""
    rows: list[str] = []
    for side in _learned_sides(examined):
        found = side.sequences
        says = found.learned & ~found.among(examined.facts.ends)
        rows += side.sources(found.rows[found.per_sequence(says) == 0])
    if rows:
        yield of_rows(
            "nothing-learned", "warning", rows, examined.total,
            "teach nothing but the end of the turn: their answers render to no text",
            "leave these rows out, or give them an answer",
        )  # fmt: skip


def span_ends(found: Sequences) -> np.ndarray:
    """Indices of the last token of every run of learned tokens."""
    learned = found.learned
    if not len(learned):
        return np.zeros(0, np.int64)
    following = np.append(learned[1:], False)
    following[found.bounds[1:] - 1] = False
    return np.flatnonzero(learned & ~following)


def _rows_at(found: Sequences, tokens: np.ndarray) -> np.ndarray:
    """The rows in which tokens stand."""
    return found.rows[np.searchsorted(found.bounds, tokens, side="right") - 1]


def _learned_sides(examined: Examined) -> list[Side]:
    return [side for side in (examined.train, examined.eval) if side is not None and len(side.sequences)]


def _spelled(examined: Examined, token: int) -> str:
    return str(examined.tokenizer.convert_ids_to_tokens(int(token)))
