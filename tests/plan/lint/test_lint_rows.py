"""Every planted fault is found in its rows and in no other; the rows without it give nothing grave."""

from collections.abc import Callable
from typing import Any

import pytest

from plan.lint.linted import Linted, clean_rows, pair

Lint = Callable[..., Linted]
ROWS = clean_rows()
LONG = "The lamp over the table in our kitchen has been dark since the storm of last week, what can be done about it?"


def test_clean_rows_give_nothing_but_what_the_tokenizer_is(lint: Lint) -> None:
    found = lint(test=clean_rows(80)[60:], eval=clean_rows(90)[80:])
    assert [(finding.severity, finding.rule) for finding in found.findings] == [("notice", "pad-is-end-of-turn")]


def asked(number: int, said: str) -> dict[str, Any]:
    """The prompt of a clean row with another answer."""
    return pair(ROWS[number]["messages"][1]["content"], said)


def turns(*said: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


PLANTED: dict[str, tuple[str, str, dict[int, Any], tuple[int, ...]]] = {
    # what: (rule, severity, rows put in, numbers of the rows that are found)
    "the same row": ("duplicates", "notice", {7: ROWS[2]}, (7,)),
    "the same but for white space": (
        "duplicates", "notice",
        {7: pair("Where  do I send back radio 12?\n", "To our shop in Linden,  hall 17.")}, (7,),
    ),
    "a third of the rows again": (
        "duplicates", "warning", {n: ROWS[n - 20] for n in range(20, 40)}, tuple(range(20, 40)),
    ),
    "one prompt, two labels": (
        "contradictions", "warning", {3: pair("Lost!", "card_lost"), 9: pair("Lost!", "card_arrival")}, (3, 9),
    ),
    "one prompt, two texts": (
        "contradictions", "notice", {30: asked(4, "There are some left of it, but in other colours.")}, (4, 30),
    ),
    "a word more": (
        "near-duplicates", "notice", {5: pair(LONG, "A bulb."), 6: pair("Hello, " + LONG, "A bulb.")}, (6,),
    ),
    "nearly all the same": (
        "dominating-answer", "warning", {n: pair(f"Ask {n}", "no") for n in range(56)}, tuple(range(56)),
    ),
    "more than half the same": (
        "dominating-answer", "notice", {n: pair(f"Ask {n}", "no") for n in range(31)}, tuple(range(31)),
    ),
    "pandas' empty cell": ("placeholder-answers", "warning", {4: asked(4, "nan"), 8: asked(8, "N/A")}, (4, 8)),
    "a note to oneself": ("placeholder-answers", "warning", {4: asked(4, "TODO")}, (4,)),
    "the question again": (
        "answer-repeats-prompt", "notice", {5: pair("How loud is it at step 15?", "how loud is it at step 15?")}, (5,),
    ),
    "another model's words": (
        "boilerplate-answers", "notice", {5: asked(5, "As an AI language model, I have no ears.")}, (5,),
    ),
    "a refusal": (
        "boilerplate-answers", "notice", {5: asked(5, "I’m sorry, but I can’t help with that.")}, (5,),
    ),
    "two users": (
        "role-order", "warning",
        {5: turns(("user", "Hi"), ("user", "Are you there, number 5?"), ("assistant", "I am."))}, (5,),
    ),
    "two answers": (
        "role-order", "warning",
        {5: turns(("user", "Are you there 5?"), ("assistant", "I am."), ("assistant", "Yes."))}, (5,),
    ),
    "a late system message": (
        "role-order", "warning",
        {5: turns(("user", "Are you there 5?"), ("system", "Be kind."), ("assistant", "I am."))}, (5,),
    ),
    "the end of a turn in a text": (
        "special-tokens-in-text", "warning", {5: asked(5, "It is <|im_end|> now.")}, (5,),
    ),
    "the start of a turn in a question": (
        "special-tokens-in-text", "warning", {5: pair("Say <|im_start|>user", "No, never.")}, (5,),
    ),
    "Llama's marks": ("markup-in-text", "warning", {5: pair("[INST] Is it loud? [/INST]", "It is not.")}, (5,)),
    "Alpaca's marks": (
        "markup-in-text", "warning", {5: pair("### Instruction:\nSay it.\n\n### Response:", "It.")}, (5,),
    ),
    "UTF-8 read as cp1252": ("encoding-mojibake", "warning", {5: asked(5, "SchÃ¶ne GrÃ¼ÃŸe")}, (5,)),
    "a lost letter": ("encoding-replaced", "warning", {5: asked(5, "Sch\ufffdne Gr\ufffdße")}, (5,)),
    "NUL": ("control-characters", "warning", {5: asked(5, "It is\0 done.")}, (5,)),
    "a terminal's colours": ("control-characters", "warning", {5: asked(5, "It is \x1b[31mred\x1b[0m.")}, (5,)),
    "C1": ("control-characters", "warning", {5: asked(5, "It\x92s done, all of it.")}, (5,)),
    "a space of no width": ("invisible-characters", "warning", {5: asked(5, "It is\u200bdone.")}, (5,)),
    "text that turns": ("invisible-characters", "warning", {5: asked(5, "It is \u202edone\u202c.")}, (5,)),
    "letters as tags": ("invisible-characters", "warning", {5: asked(5, "Done.\U000e0041\U000e0042")}, (5,)),
    "HTML": ("html-leftovers", "notice", {5: asked(5, "It&#39;s here &amp; there.")}, (5,)),
    "escaped twice": ("escaped-newlines", "notice", {5: asked(5, "First:\\n- this\\n- that")}, (5,)),
    "a key": ("secrets", "warning", {5: asked(5, "Use AKIAIOSFODNN7EXAMPLE for it.")}, (5,)),
    "a card": ("payment-numbers", "warning", {5: pair("My card is 4111 1111 1111 1111.", "Thank you.")}, (5,)),
    "an account": ("payment-numbers", "warning", {5: pair("It is DE89 3704 0044 0532 0130 00.", "Thanks.")}, (5,)),
    "a mail address": ("personal-data", "notice", {5: asked(5, "Ask sonja.weiss@example.org about it.")}, (5,)),
    "no text in a question": (
        "empty-rows", "warning",
        {5: turns(("user", "Is it 5?"), ("assistant", "Yes."), ("user", " "), ("assistant", "It is."))}, (5,),
    ),
    "no answer": ("empty-rows", "error", {5: asked(5, ""), 9: asked(9, " \n")}, (5, 9)),
    "half a surrogate pair": ("encoding-damage", "error", {5: asked(5, "Done \ud83d.")}, (5,)),
    "an unknown role": ("role-order", "error", {5: turns(("user", "Hi."), ("wizard", "Ho."))}, (5,)),
    "no weight": (
        "nothing-learned", "error",
        {5: {"messages": [*ROWS[5]["messages"][:2], {"role": "assistant", "content": "Hm.", "weight": 0}]}}, (5,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_found_in_its_rows_alone(lint: Lint, what: str) -> None:
    rule, severity, changes, numbers = PLANTED[what]
    found = lint(changes)
    finding = found.of(rule)
    assert finding.rows == tuple(f"train.jsonl:{number + 1}" for number in numbers)
    assert (finding.severity, finding.count) == (severity, len(numbers))
    assert finding.message
    assert finding.remedy
    assert found.grave == ([(severity, rule)] if severity != "notice" else [])


def test_a_bad_row_ends_nothing(lint: Lint) -> None:
    found = lint({5: asked(5, ""), 9: ROWS[2], 11: turns(("wizard", "Ho."))})
    assert found.of("empty-rows").rows == ("train.jsonl:6",)
    assert found.of("role-order").rows == ("train.jsonl:12",)
    assert found.of("duplicates").rows == ("train.jsonl:10",)


def test_rows_that_are_dropped_are_told_by_their_share(lint: Lint) -> None:
    many = {number: asked(number, "") for number in range(5)}
    assert lint(many, on_bad_row="drop").of("empty-rows").severity == "warning"
    assert lint({5: asked(5, "")}, count=500, on_bad_row="drop").of("empty-rows").severity == "notice"


def test_spelled_markup_that_is_read_as_markup_is_an_error(lint: Lint) -> None:
    found = lint({5: asked(5, "It is <|im_end|> now.")}, split_special_tokens=False)
    assert found.of("special-tokens-in-text").severity == "error"
    assert found.of("end-inside-answer").rows == ("train.jsonl:6",)


# Between sets


def test_test_rows_in_training(lint: Lint) -> None:
    others = clean_rows(100)[60:]
    again = pair(ROWS[2]["messages"][1]["content"].upper() + " ", "Nowhere.")
    found = lint(test=[others[0], ROWS[4], again, *others[1:]])
    finding = found.of("test-rows-in-training")
    assert finding.rows == ("test.jsonl:2", "test.jsonl:3")
    assert finding.severity == "warning"
    assert (
        "1 of them with the same answer (test.jsonl:2 is train.jsonl:5, test.jsonl:3 is train.jsonl:3)"
        in finding.message
    )


def test_a_tenth_of_the_test_set_in_training_is_an_error(lint: Lint) -> None:
    found = lint(eval=[*clean_rows(65)[60:], ROWS[0]])
    assert found.of("test-rows-in-training").severity == "error"


def test_one_in_many_test_rows_is_a_notice(lint: Lint) -> None:
    found = lint(test=[*clean_rows(400)[60:], ROWS[0]])
    assert found.of("test-rows-in-training").severity == "notice"


def test_nearly_a_test_row(lint: Lint) -> None:
    found = lint({5: pair(LONG, "A bulb.")}, test=[*clean_rows(80)[60:], pair(LONG + " Thanks", "A bulb.")])
    assert found.of("near-test-rows-in-training").rows == ("test.jsonl:21",)


def test_rows_that_choose_and_score(lint: Lint) -> None:
    others = clean_rows(80)[60:]
    found = lint(eval=others[:10], test=others[9:])
    assert found.of("eval-rows-in-test").rows == ("test.jsonl:1",)


def test_faults_in_the_test_set_are_told_by_its_names(lint: Lint) -> None:
    found = lint(test=[*clean_rows(80)[60:], pair("Mine is 4111111111111111.", "Thanks.")])
    assert found.of("payment-numbers").rows == ("test.jsonl:21",)
