"""What of a conversation is learned, and what is cut, merged or only read."""

from typing import Any

import pytest
from family_tokenizers import build_tokenizer
from meaning import A, U, learned, read, turns

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate, Reading
from topwork.data.conversations import Conversation, read_messages

S = {"role": "system", "content": "s"}
HELLO = {"role": "assistant", "content": "hello"}
EMPTY: dict[str, Any] = {"role": "assistant", "content": None}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "r"}
OPENING = "the opening answer is context: nothing asks for it"


def one(*messages: dict[str, Any], **config: Any) -> Conversation:
    return read({"messages": list(messages)}, **config)[0]


@pytest.mark.parametrize(
    ("messages", "answers", "notes"),
    [
        ([HELLO, U, A], ["a"], (OPENING,)),
        ([HELLO, HELLO, U, A], ["a"], (OPENING,)),
        ([S, HELLO, U, A], ["a"], (OPENING,)),
        ([S, {**HELLO, "train": True}, U, A], ["hello", "a"], ()),
        ([{**HELLO, "weight": 0}, U, A], ["a"], ()),
        ([S, A], ["a"], ()),  # the system message asks for all that there is
        ([U, A], ["a"], ()),
    ],
)
def test_an_assistant_who_speaks_first(messages: list[Any], answers: list[str], notes: tuple[str, ...]) -> None:
    row = one(*messages)
    assert (learned(row), row.notes, len(row.messages)) == (answers, notes, len(messages))


def test_what_an_opening_is_does_not_hang_on_the_recipes_system_message() -> None:
    row = one(HELLO, U, A, system="You keep an inn.")
    assert (learned(row), row.notes) == (["a"], (OPENING,))
    assert learned(one(A, system="Write a poem.")) == ["a"]
    with pytest.raises(DataError, match="nothing asks for the answer"):
        one(A)
    assert learned(one(HELLO, U, A, train_on="all")) == ["hello", "a"]
    assert one(HELLO, U, A, train_on="last_answer").notes == ()


@pytest.mark.parametrize(
    ("tail", "notes"),
    [
        ([U], ("a user turn at the end is cut",)),
        ([U, U], ("a user turn at the end is cut",)),
        ([S], ("a system turn at the end is cut",)),
        ([EMPTY], ("an empty answer at the end is cut",)),
        ([U, EMPTY], ("an empty answer at the end is cut",)),
        ([U, {"role": "assistant", "content": " \n"}], ("an empty answer at the end is cut",)),
        ([EMPTY, U], ("an empty answer at the end is cut", "a user turn at the end is cut")),
    ],
)
def test_what_follows_the_last_answer_is_cut(tail: list[Any], notes: tuple[str, ...]) -> None:
    row = one(U, A, *tail)
    assert (turns(row), row.notes) == ([("user", "q"), ("assistant", "a")], notes)


def test_a_result_at_the_end_is_cut_and_the_call_is_learned() -> None:
    row = one(U, CALLS, RESULT)
    assert [message.role for message in row.messages] == ["user", "assistant"]
    assert row.messages[1].extra["tool_calls"] == [CALL]
    assert row.notes == ("a tool turn at the end is cut",)


def test_an_empty_answer_between_others_is_context() -> None:
    row = one(U, EMPTY, U, A)
    assert (learned(row), row.notes) == (["a"], ("an empty answer is not learned",))
    assert turns(row)[1] == ("assistant", "")
    row = one(U, {**EMPTY, "reasoning_content": "hm"}, U, A)
    assert (learned(row), row.notes) == (["a"], ("an empty answer is not learned",))


def test_the_answer_to_an_empty_user_turn_is_not_learned() -> None:
    row = one({"role": "user", "content": None}, {"role": "assistant", "content": "what?"}, U, A)
    assert (learned(row), row.notes) == (["a"], ("the answer to an empty user turn is not learned",))
    with pytest.raises(DataError, match=r"message 1 \(user\) is empty"):
        one({"role": "user", "content": ""}, A)


@pytest.mark.parametrize("content", [None, "", "  ", []])
def test_an_empty_system_message_is_left_out(content: Any) -> None:
    row = one({"role": "system", "content": content}, U, A)
    assert (turns(row), row.notes) == ([("user", "q"), ("assistant", "a")], ("an empty system message is left out",))
    assert turns(one({"role": "system", "content": content}, U, A, system="Be brief."))[0] == ("system", "Be brief.")


def test_turns_of_one_role_stay_as_they_are() -> None:
    row = one(U, {**U, "content": "r"}, A, {**A, "content": "b"}, S, U, A)
    assert learned(row) == ["a", "b", "a"]
    assert [message.role for message in row.messages] == [
        "user", "user", "assistant", "assistant", "system", "user", "assistant",
    ]  # fmt: skip
    assert row.notes == ()


def test_turns_of_one_role_are_merged_on_request() -> None:
    row = one(U, {**U, "content": "r"}, A, EMPTY, {**A, "content": "b"}, merge_turns=True)
    assert turns(row) == [("user", "q\n\nr"), ("assistant", "a\n\nb")]
    assert row.notes == ("turns of one role in a row are made one",)
    assert one(U, A, merge_turns=True).notes == ()


def test_merging_keeps_what_stands_beside_the_text() -> None:
    other = {**CALL, "function": {"name": "g", "arguments": {}}}
    row = one(U, A, CALLS, {**CALLS, "tool_calls": [other]}, RESULT, RESULT, A, merge_turns=True)
    assert turns(row) == [("user", "q"), ("assistant", "a"), ("tool", "r"), ("tool", "r"), ("assistant", "a")]
    assert row.messages[1].extra["tool_calls"] == [CALL, other]
    thought = {**A, "reasoning_content": "hm"}
    assert one(U, thought, {**thought, "reasoning_content": "so"}, merge_turns=True).messages[1].extra == {
        "reasoning_content": "hm\n\nso"
    }
    assert turns(one(U, CALLS, A, merge_turns=True)) == [("user", "q"), ("assistant", ""), ("assistant", "a")]


def test_turns_that_cannot_be_one_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"message 3 one with the turn before it, and their weights are not the same \(1 "
    ):
        one(U, A, {**A, "weight": 0}, merge_turns=True)
    with pytest.raises(DataError, match=r"message 2 one with the turn before it, and their name differ"):
        one({**U, "name": "Bo"}, {**U, "name": "Jo"}, A, merge_turns=True)


def test_a_column_of_system_messages_beside_own_ones_is_told() -> None:
    (row,) = read({"messages": [S, U, A], "system": "other"})
    assert turns(row)[0] == ("system", "s")
    assert row.notes == ("column 'system' is not read: the messages have a system message of their own",)
    assert read({"messages": [S, U, A], "system": "s"})[0].notes == ()
    assert turns(read({"messages": [{**S, "content": None}, U, A], "system": "col"})[0])[0] == ("system", "col")


def test_groups_are_prompts_a_column_or_nothing() -> None:
    rows = [{"messages": [S, U, {**A, "content": str(n)}], "who": n % 2} for n in range(4)]
    assert len({row.group for row in read(*rows)}) == 1
    assert len({row.group for row in read(*rows, hold_out_by="who")}) == 2
    assert {row.group for row in read(*rows, hold_out_by="row")} == {None}
    tools = {"tools": [{"name": "f"}]}
    kinds = [rows[0], {**rows[0], **tools}, {"messages": [U, A]}, {"messages": [S, {**U, "content": "other"}, A]}]
    assert len({row.group for row in read(*kinds)}) == 4
    longer = {"messages": [S, U, A, {**U, "content": "and?"}, A]}
    assert len({row.group for row in read(rows[0], longer)}) == 2
    texts = read({"text": "t"}, {"text": "t"}, {"text": "u"})
    assert texts[0].group == texts[1].group != texts[2].group


def test_a_column_to_hold_out_by_has_to_be_there() -> None:
    row = {"messages": [U, A], "author": "Bo"}
    with pytest.raises(DataError, match=r"data\.hold_out_by is the column 'autor', .* did you mean 'author'"):
        read(row, hold_out_by="autor")
    assert len(read(row, hold_out_by="autor", eval_fraction=0)) == 1
    assert read(row, {"messages": [U, A], "author": None}, hold_out_by="author")[1].group is None


@pytest.mark.parametrize(
    "messages",
    [
        [U, {**U, "content": "r"}, A],
        [{**U, "content": " "}, U, A],
        [S, {**S, "content": "t"}, U, A],
        [U, A, {**CALLS, "content": "b"}, RESULT, RESULT, A],
        [U, CALLS, {**A, "content": "b"}, U, A],
        [HELLO, HELLO, U, A],
    ],
)
def test_generation_merges_turns_as_training_does(messages: list[Any]) -> None:
    template = ChatTemplate(build_tokenizer("smollm2"), "chatml", options=Reading(merge_turns=True))
    (item,) = template.encode(one(*messages, merge_turns=True), "last_answer")
    prompt = item.tokens[: item.weights.index(1.0)]
    assert template.prompt_ids(read_messages(messages[:-1], "messages")) == prompt
