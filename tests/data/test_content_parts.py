"""Messages of parts that are more than text, and objects that are a question and its answer: read as their turns."""

import json
from typing import Any

import pytest
from meaning import A, U, load, read, turns

from topwork.common.errors import DataError

CALL = {"type": "tool_use", "id": "t1", "name": "rain", "input": {"city": "Orlen"}}
READ_CALL = {
    "id": "t1",
    "type": "function",
    "function": {"name": "rain", "arguments": {"city": "Orlen"}},
}


def said(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(parts)}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


@pytest.mark.parametrize(
    "thinking",
    [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "thinking", "thinking": [text("h"), text("m")]},
        {"type": "reasoning", "text": "hm"},
        {"type": "reasoning", "reasoning": "hm"},
    ],
)
def test_thinking_in_a_part_is_the_answers_thinking(thinking: dict[str, Any]) -> None:
    (row,) = read({"messages": [U, said(thinking, text("a"))]})
    assert turns(row) == [("user", "q"), ("assistant", "a")]
    assert row.messages[1].extra == {"thinking": "hm"}


def test_calls_and_results_in_parts_are_turns() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("wet")]}
    (row,) = read({"messages": [U, said(text("Let me see."), CALL), {"role": "user", "content": [result]}, A]})
    assert turns(row) == [("user", "q"), ("assistant", "Let me see."), ("tool", "wet"), ("assistant", "a")]
    assert row.messages[1].extra == {"tool_calls": [READ_CALL]}
    assert row.messages[2].extra == {"tool_call_id": "t1"}
    (row,) = read({"messages": [U, said(CALL), {"role": "user", "content": [result, text("and now?")]}, A]})
    assert turns(row)[2:] == [("tool", "wet"), ("user", "and now?"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((CALL, text("a")), "message 2 has a part of type 'text' after a tool call"),
        (({"type": "redacted_thinking", "data": "x"}, text("a")), "has a part of type 'redacted_thinking'"),
        (({"type": "thinking", "thinking": {"x": 1}, "z": 1}, {"type": "image"}), "has a part of type 'image'"),
    ],
)
def test_parts_that_cannot_be_read_are_refused(parts: tuple[dict[str, Any], ...], why: str) -> None:
    with pytest.raises(DataError, match=why):
        read({"messages": [U, said(*parts)]})


def test_the_system_message_may_be_a_message_of_its_own() -> None:
    contents = [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]
    told = {"role": "system", "parts": [{"text": "Be brief."}]}
    for name in ("systemInstruction", "system_instruction"):
        format, (row, other) = load({name: told, "contents": contents}, {"contents": contents})
        assert turns(row) == [("system", "Be brief."), ("user", "q"), ("assistant", "a")]
        assert turns(other) == [("user", "q"), ("assistant", "a")]
        assert f"with {name} (in 1 of 2 rows)" in format.sentence
    format, (row,) = load({"system": {"retries": 3}, "messages": [U, A]})
    assert turns(row) == [("user", "q"), ("assistant", "a")]
    assert format.sentence.endswith("not read: system")


def test_a_list_in_a_template_is_told_with_what_to_write() -> None:
    row = {"question": "q", "choices": ["x", "y"], "answer": "x"}
    with pytest.raises(DataError, match=r"choices is a list of 2 texts, .* as \{choices\[0\]\}, \{choices\[1\]\}"):
        read(row, columns={"prompt": "{question}\n{choices}", "completion": "answer"})
    columns = {"prompt": "{question}\n{choices[0]}, {choices[1]}", "completion": "answer"}
    assert turns(read(row, columns=columns)[0])[0] == ("user", "q\nx, y")


def test_a_column_of_thinking_under_its_public_name() -> None:
    (row,) = read({"Question": "q", "Complex_CoT": "let me see", "Response": "a"})
    assert row.messages[1].extra == {"reasoning_content": "let me see"}


@pytest.mark.parametrize(
    ("asked", "answered"), [("input", "output"), ("human", "assistant"), ("question", "answer"), ("human", "gpt")]
)
def test_a_question_and_its_answer_in_one_object_are_two_turns(asked: str, answered: str) -> None:
    talk = [{"system": "Be brief.", asked: "q", answered: "a"}, {asked: "r", answered: "b", "train": False}]
    format, (row,) = load({"conversation": talk})
    assert turns(row) == [("system", "Be brief."), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    assert [turn.weight for turn in row.messages] == [None, None, None, None, 0.0]
    assert f"conversation ({asked}, {answered}) -> every assistant turn" in format.sentence


def test_questions_and_answers_that_are_the_answer_stay_one() -> None:
    made = [{"question": "When?", "answer": "1830."}]
    for answer in (made, json.dumps(made)):
        (row,) = read({"prompt": "Make questions.", "completion": answer})
        assert turns(row) == [("user", "Make questions."), ("assistant", json.dumps(made))]
