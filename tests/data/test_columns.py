"""Which column is what: from all rows, under the names that files use, in files of several kinds of rows."""

import json
from typing import Any

import pytest
from meaning import A, U, load, read, rows_of, turns

from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.meaning.columns import Columns
from topwork.data.meaning.formats import recognise_from

HI = [{"from": "human", "value": "hi"}, {"from": "bot", "value": "ho"}]


def plain(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"Say {n}.", "output": str(n)} for n in range(count)]


def talks(count: int) -> list[dict[str, Any]]:
    return [{"messages": [U, A]} for _ in range(count)]


# Columns of all rows


def test_a_field_that_comes_late_is_read() -> None:
    format, rows = load(*plain(70), {"instruction": "Shout.", "input": "hi", "output": "HI"})
    assert turns(rows[70]) == [("user", "Shout.\n\nhi"), ("assistant", "HI")]
    assert format.sentence == "read as alpaca: instruction (+ input, in 1 of 71 rows) -> output, 71 rows"
    tools = [{"type": "function", "function": {"name": "f"}}]
    format, rows = load(*talks(60), {"messages": [U, A], "system": "s"}, {"messages": [U, A], "tools": tools})
    assert turns(rows[60])[0] == ("system", "s")
    assert rows[61].tools == tools
    told = "with system (in 1 of 62 rows), tools (in 1 of 62 rows), 62 rows"
    assert format.sentence == f"read as messages: messages -> every assistant turn, {told}"


def test_a_field_that_comes_late_may_be_mapped() -> None:
    late = {"instruction": "Shout.", "extra_text": "hi", "output": "HI"}
    columns = {"instruction": "instruction", "output": "output", "input": "extra_text"}
    assert turns(read(*plain(70), late, columns=columns)[70])[0] == ("user", "Shout.\n\nhi")


def test_what_is_not_read_is_told_with_its_rows() -> None:
    rows = [*({**row, "source": "x"} for row in plain(52)), *({**row, "note": "y"} for row in plain(8))]
    sentence = load(*rows)[0].sentence
    assert sentence.endswith("60 rows; not read: source (in 52 of 60 rows), note (in 8 of 60 rows)")
    assert load(*({**row, "nothing": None} for row in plain(3)))[0].sentence.endswith("3 rows")


def test_the_survey_can_be_fed_and_used_without_the_rows() -> None:
    rows = rows_of(*plain(60), {"instruction": "Shout.", "input": "hi", "output": 7})
    survey = Columns()
    for row in rows:
        survey.add(row)
    column = survey.by_name["input"]
    assert (survey.count, column.rows, column.filled, column.first) == (61, 1, 1, "a.jsonl:61")
    assert survey.by_name["output"].kinds == {"text": 60, "number": 1}
    assert survey.sample[-1] == rows[60]
    config = DataConfig(train="a.jsonl")
    assert recognise_from(survey, config).columns == {
        "instruction": "instruction",
        "output": "output",
        "input": "input",
    }


# Names


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "When?", "context": "In 1830.", "response": "1830", "category": "qa"},
         [("user", "When?\n\nIn 1830."), ("assistant", "1830")]),
        ({"question": "When?", "context": "In 1830.", "answer": "1830"},
         [("user", "When?\n\nIn 1830."), ("assistant", "1830")]),
        ({"question": "When?", "passage": "In 1830.", "answer": 1830},
         [("user", "When?\n\nIn 1830."), ("assistant", "1830")]),
        ({"id": "x.0", "system_prompt": "Be brief.", "question": "1 + 1?", "response": "2"},
         [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2")]),
        ({"Question": "q", "Answer": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"prompt ": "q", " Completion": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "context": float("nan"), "response": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "completion": "a", "history": [["hi", "ho"]]},
         [("user", "hi"), ("assistant", "ho"), ("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "completion": "a", "history": json.dumps(HI)},
         [("user", "hi"), ("assistant", "ho"), ("user", "q"), ("assistant", "a")]),
        ({"prompt": '[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]', "completion": "a"},
         [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"problem": "q", "solution": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"input": "q", "output": {"x": [1, "é"]}}, [("user", "q"), ("assistant", '{"x": [1, "é"]}')]),
        ({"source": "q", "target": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"dialogue": [U, A], "id": 1}, [("user", "q"), ("assistant", "a")]),
        ({"data": [U, A], "id": 1}, [("user", "q"), ("assistant", "a")]),
        ({"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
         [("user", "q"), ("assistant", "a")]),
        ({"messages": [json.dumps(U), json.dumps(A)]}, [("user", "q"), ("assistant", "a")]),
        ({"data": json.dumps([U, A]), "n": 2}, [("user", "q"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_known_names(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(read(row)[0]) == expected


def test_thinking_and_calls_have_columns() -> None:
    (row,) = read({"question": "q", "cot": "hm", "answer": "a"})
    assert row.messages[1].extra == {"reasoning_content": "hm"}
    (row,) = read({"q": "q", "why": "hm", "a": "a"}, columns={"prompt": "q", "completion": "a", "reasoning": "why"})
    assert row.messages[1].extra == {"reasoning_content": "hm"}
    assert read({"question": "q", "thinking": "hm", "answer": "<think>hm</think>a"})[0].messages[1].extra == {}
    assert load({"question": "q", "rationale": "hm", "answer": "a"})[0].sentence.endswith("not read: rationale")
    calls = {"prompt": "q", "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]', "functions": '[{"name": "f"}]'}
    (row,) = read(calls)
    assert row.messages[1].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]


def test_a_column_that_is_asked_for_as_text_is_text() -> None:
    format, (row,) = load({"messages": '[{"role": "user", "content": "q"}]'}, columns={"text": "messages"})
    assert row.text == '[{"role": "user", "content": "q"}]'
    assert "every token of messages (which are messages, as JSON text)" in format.sentence


# Rows of several kinds


def test_roles_in_two_spellings_are_read_each_as_it_is() -> None:
    other = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    padded = [{"role": None, "content": None, **turn} for turn in other]
    for rows in ([{"messages": [U, A]}, {"messages": other}], [{"messages": other}, {"messages": [U, A]}],
                 [{"messages": [U, A]}, {"messages": padded}]):  # fmt: skip
        assert [turns(row) for row in read(*rows)] == [[("user", "q"), ("assistant", "a")]] * 2


def test_rows_of_two_formats_are_read_each_as_it_is() -> None:
    rows = [*talks(55), *({"prompt": f"p{n}", "completion": "c", "messages": None} for n in range(5)), {"text": "t"}]
    format, read_rows = load(*rows)
    assert turns(read_rows[55]) == [("user", "p0"), ("assistant", "c")]
    assert (read_rows[60].kind, read_rows[60].text) == ("text", "t")
    assert format.sentence == (
        "read as messages: messages -> every assistant turn, 55 rows from a.jsonl:1 on; others as prompt_completion: "
        "prompt -> completion, 5 rows from a.jsonl:56 on; others as text: every token of text, 1 row from a.jsonl:61 on"
    )
    two = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, *talks(1)]
    assert [turns(row) for row in read(*two)] == [[("user", "q"), ("assistant", "a")]] * 2


def test_a_row_of_no_format_among_others_is_a_bad_row() -> None:
    with pytest.raises(
        DataError, match=r"2 of 4 rows cannot be used:\n  a.jsonl:3: messages is missing.*\n  a.jsonl:4: "
    ):
        read(*talks(2), {"other": "x"}, {"messages": None})
    with pytest.raises(DataError, match=r"a.jsonl:2: no answer: completion is missing"):
        read({"prompt": "q", "completion": "a"}, {"prompt": "q"})
    with pytest.raises(DataError, match=r"a.jsonl:2: no answer: output is empty"):
        read({"instruction": "q", "output": "a"}, {"instruction": "q", "output": float("nan")})
