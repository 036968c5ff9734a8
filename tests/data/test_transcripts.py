"""Talks that stand otherwise than as a list of messages: refused with what to do, and the advice reads them."""

import re
from typing import Any

import pytest
import yaml
from meaning import load, read
from pasting import pasted, printed

from topwork.common.errors import DataError

TEXTS = ("q", "a")


@pytest.mark.parametrize(
    ("columns", "more", "said"),
    [
        (("role", "content"), {}, "put the messages of one into a list"),
        (("from", "value"), {"conversation_id": 3}, "those with the same conversation_id"),
        (("role", "text"), {"message_id": "x", "parent_id": "y"}, "those with the same parent_id"),
    ],
)
def test_a_row_for_each_message_is_refused(columns: tuple[str, str], more: dict[str, Any], said: str) -> None:
    names = ("prompter", "assistant") if "parent_id" in more else ("human", "gpt")
    rows = [{columns[0]: who, columns[1]: text, **more} for who, text in zip(names * 2, TEXTS * 2)]
    with pytest.raises(DataError, match=f"each row is one message .*{said}"):
        load(*rows)


def test_who_wrote_a_document_is_no_role() -> None:
    rows = [{"text": "Once.", "author": name} for name in ("user", "Ann")]
    assert [row.text for row in read(*rows)] == ["Once.", "Once."]
    rows = [{"text": "q", "role": "user"}, {"text": "a", "role": "assistant"}]
    assert [row.text for row in read(*rows, format="text")] == ["q", "a"]


@pytest.mark.parametrize(
    ("asks", "answers"), [("USER:", "ASSISTANT:"), ("### Human:", "### Assistant:"), ("<human>:", "<bot>:")]
)
def test_a_text_of_all_turns_is_never_advised_as_an_answer(asks: str, answers: str) -> None:
    rows = [{"system": f"Be brief {n}.", "chat": f"{asks} Hi {n}\n\n{answers} Ho."} for n in range(3)]
    with pytest.raises(DataError) as caught:
        load(*rows)
    way = pasted(printed(str(caught.value)))
    assert way == {
        "columns": {"text": "{system?}\n\n{chat}"},
        "response_part": answers,
        "instruction_part": asks,
    }
    assert read(*rows, **way)[1].text == f"Be brief 1.\n\n{asks} Hi 1\n\n{answers} Ho."


@pytest.mark.parametrize(
    ("row", "way"),
    [
        ({"content": "def f(): N", "path": "a/N.py", "license": "mit"}, {"text": "content"}),
        ({"meta_instruction": "Be N.", "chat": {"turn_1": {"Human": "q", "Bot": "a"}}}, None),
        ({"system": "Be N.", "words": "Hello N."}, None),
    ],
)
def test_no_pair_is_advised_of_what_is_none(row: dict[str, Any], way: dict[str, str] | None) -> None:
    rows = [
        {name: value.replace("N", str(n)) if isinstance(value, str) else value for name, value in row.items()}
        for n in range(3)
    ]
    with pytest.raises(DataError) as caught:
        load(*rows)
    told = re.search(r"data\.columns: (\{.*\})", str(caught.value))
    assert (yaml.safe_load(told[1]) if told else None) == way
