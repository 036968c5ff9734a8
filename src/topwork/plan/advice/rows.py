"""What becomes of the rows: how long they may be, what is held out, how answers are graded."""

from topwork.plan.advice.rule import Case, Rule, Table, given
from topwork.plan.advice.sources import ARITHMETIC, BANKING, FITTING, INTENTS, PEFT_ANSWERS, SUPPORT, TEMPLATES

STEP = 64
"""Limits of length are multiples of it."""
SHORTEST, PIECE = 128, 1024
ESTIMATED_SLACK = 1.5
"""Letters tell tokens no better than that."""
HELD_OUT = 100
"""Rows that are wanted for validation."""
LEAST_SHARE, MOST_SHARE = 0.02, 0.2


def _limit(case: Case) -> int:
    """The longest row's length with room, rounded up, within the base's context."""
    longest = (case.facts.longest or 0) * (1.0 if case.facts.measured else ESTIMATED_SLACK)
    return _within(case, max(SHORTEST, -(-round(longest) // STEP) * STEP))


def _within(case: Case, tokens: int) -> int:
    return tokens if case.facts.context is None else min(tokens, case.facts.context)


def _share(case: Case) -> float:
    rows = case.facts.rows or 1
    return float(f"{min(MOST_SHARE, max(LEAST_SHARE, HELD_OUT / rows)):.2g}")


def _pieces(case: Case) -> bool:
    return case.facts.task == "continued-pretraining" and case.facts.kind == "text"


def _decides_answers(case: Case) -> bool:
    return case.facts.task in ("classification", "extraction", "tool-calls")


ROWS: Table = (
    Rule(
        "template-for-calls", "data.chat_template", "tool calls, and the base's own template does not write them",
        lambda case: case.facts.task == "tool-calls" and case.facts.writes_calls is False, "chatml", given("chatml"),
        "A template that leaves calls and tools out would teach empty answers, so such rows are refused; ours writes "
        "them. Serve with the template that was learned.",
        (TEMPLATES,),
    ),
    Rule(
        "documents-are-paragraphs", "data.documents", "continued pretraining on a .txt",
        lambda case: _pieces(case) and case.facts.documents, "paragraph", given("paragraph"),
        "A whole file as one document leaves nothing to hold out; what stands between blank lines is a document.",
        (FITTING,),
    ),
    Rule(
        "text-in-pieces", "data.too_long", "continued pretraining on plain text", _pieces, "split", given("split"),
        "Every token of a text is learned in pieces; cut off, the rest of it would be lost.",
        (FITTING,),
    ),
    Rule(
        "oldest-turns-go", "data.too_long", "conversations of several answers",
        lambda case: case.facts.kind == "messages" and case.facts.turns, "oldest_turns", given("oldest_turns"),
        "The last answers are what the model will be asked for; older turns become rows of their own, so that none is "
        "lost.",
        (FITTING,),
    ),
    Rule(
        "answers-stay-whole", "data.too_long", "other conversations", lambda case: case.facts.kind == "messages",
        "middle", given("middle"),
        "Cutting off the end would cut the answer, and with it the token that ends the turn; the middle of a long "
        "prompt is what is missed least.",
        (FITTING,),
    ),
    Rule(
        "long-texts-go", "data.too_long", "plain text that is not continued pretraining",
        lambda case: case.facts.kind == "text", "drop", given("drop"),
        "Half an example teaches to stop anywhere; those that are too long are left out, counted and named.",
        (FITTING,),
    ),
    Rule(
        "pieces-of-a-thousand", "data.max_length", "continued pretraining on plain text", _pieces,
        f"{PIECE}, or the base's context", lambda case: _within(case, PIECE),
        "Long enough to learn from what stands before, short enough that a pass fits anywhere; time goes with tokens, "
        "not with pieces, as nothing is padded.",
        (FITTING,),
    ),
    Rule(
        "as-long-as-the-longest", "data.max_length", "the longest row is known",
        lambda case: case.facts.longest is not None,
        f"the longest row (with {ESTIMATED_SLACK} times the room where tokens are estimated), rounded up to {STEP}, at "
        f"least {SHORTEST}, within the base's context", _limit,
        "Nothing is padded, so a high limit costs nothing until a long row comes; then it costs its memory. So no "
        "higher than the rows need.",
        (FITTING,),
    ),
    Rule(
        "a-hundred-held-out", "data.eval_fraction", "no validation rows are given, and the rows are counted",
        lambda case: not case.facts.held_out and bool(case.facts.rows),
        f"{HELD_OUT} rows, at least {LEAST_SHARE:.0%} and at most {MOST_SHARE:.0%}", _share,
        "A hundred rows tell a share to ± 5 points, which is enough to see a run go wrong; fewer do not, and more are "
        "missing in training.",
        (ARITHMETIC,),
    ),
    Rule(
        "exact-answers", "evaluation.grader", "classification", lambda case: case.facts.task == "classification",
        "exact_match", given("exact_match"),
        "One of a few answers is right or it is not; banking77 was graded so.", (BANKING,),
    ),
    Rule(
        "fields-one-by-one", "evaluation.grader", "extraction", lambda case: case.facts.task == "extraction",
        "auto", given("auto"),
        "Where every reference is JSON, answers are compared field by field, which tells what is missed.", (SUPPORT,),
    ),
    Rule(
        "answers-are-short", "evaluation.max_new_tokens", "classification",
        lambda case: case.facts.task == "classification", "32", given(32),
        "Names of classes are a few tokens; an answer that goes on is wrong already.", (INTENTS,),
    ),
    Rule(
        "answers-are-worked-out", "evaluation.max_new_tokens", "reasoning", lambda case: case.facts.task == "reasoning",
        "512", given(512),
        "An answer that is cut before its end is counted wrong; PEFT's benchmark gives GSM8K 300 tokens, harder tasks "
        "need more.",
        (PEFT_ANSWERS,),
    ),
)  # fmt: skip
