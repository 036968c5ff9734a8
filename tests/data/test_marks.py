"""Roles and keys of messages: other people's names for them, and those that say whether a message is learned."""

from typing import Any

import pytest
from meaning import A, U, learned, read, turns

from topwork.common.errors import DataError


@pytest.mark.parametrize(
    ("mark", "weight"),
    [
        ({}, None),
        ({"loss": False}, 0.0),
        ({"loss": True}, 1.0),
        ({"train": False}, 0.0),
        ({"training": 0}, 0.0),
        ({"trainable": 1}, 1.0),
        ({"learn": 0.25}, 0.25),
        ({"Loss": False}, 0.0),
        ({"masked": True}, 0.0),
        ({"mask": False}, 1.0),
        ({"mask": 1}, 0.0),
        ({"weight": 2}, 2.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"weight": 0.5, "train": True}, 0.5),
        ({"weight": 0, "loss": False}, 0.0),
        ({"loss": None, "weight": None}, None),
    ],
)
def test_marks_are_weights(mark: dict[str, Any], weight: float | None) -> None:
    (row,) = read({"messages": [U, {**A, **mark}, U, A]})
    assert row.messages[1].weight == weight
    assert learned(row) == (["a"] if weight == 0 else ["a", "a"])
    assert row.messages[1].extra == {}


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"loss": "no"}, "the key loss of message 2 is 'no', expected true or false"),
        ({"train": 2}, "the key train of message 2 is 2"),
        ({"mask": 0.5}, "the key mask of message 2 is 0.5"),
        ({"weight": True}, "the weight of message 2 is True, expected a number"),
        ({"weight": float("nan")}, "the weight of message 2 is nan"),
        ({"weight": 1, "train": False}, "both that it is learned and that it is not"),
        ({"train": True, "masked": True}, "both that it is learned and that it is not"),
        ({"weight": 0.5, "loss_weight": 1}, r"how much in two ways \(weight: 0.5, loss_weight: 1\)"),
        ({"do_train": False}, r"key 'do_train', .* did you mean 'train'.*data\.message_keys: \{do_train: train\}"),
        ({"loss_mask": 1}, r"key 'loss_mask'.*data\.message_keys: \{loss_mask: train\}"),
        ({"is_learned": False}, "key 'is_learned'"),
        ({"weights": [1, 2]}, r"did you mean 'weight'.*data\.message_keys: \{weights: unread\}"),
    ],
)
def test_marks_that_say_nothing_sure_are_refused(mark: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl:1: .*{reason}"):
        read({"messages": [U, {**A, **mark}]})


def test_a_mark_of_the_files_own_is_mapped() -> None:
    row = {"messages": [U, {**A, "do_train": False}, U, A]}
    assert learned(read(row, message_keys={"do_train": "train"})[0]) == ["a"]
    assert learned(read(row, message_keys={"do_train": "mask"})[0]) == ["a", "a"]
    assert learned(read(row, message_keys={"do_train": "unread"})[0]) == ["a", "a"]
    with pytest.raises(DataError, match=r"data\.message_keys maps to 'trian'; did you mean 'train'"):
        read(row, message_keys={"do_train": "trian"})


def test_a_weight_on_a_user_turn_is_told() -> None:
    row = {"messages": [{**U, "train": True}, A]}
    assert read(row)[0].notes == ("a user turn has a weight, and data.train_on learns answers alone",)
    assert read(row, train_on="all")[0].notes == ()
    assert read({"messages": [{**U, "loss_weight": 0.0}, A]})[0].notes == ()


def test_keys_that_nothing_reads_are_told() -> None:
    message = {**A, "sentiment": "glad", "name": "Bo", "thinking": "hm", "empty": None}
    (row,) = read({"messages": [{**U, "sentiment": "sad"}, message]})
    assert row.notes == ("message key 'sentiment' is not read, unless by the template",)
    assert row.messages[1].extra == {"sentiment": "glad", "name": "Bo", "thinking": "hm"}


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning", "thought"])
def test_thinking_is_carried_under_its_name(key: str) -> None:
    (row,) = read({"messages": [U, {**A, key: "hm"}]})
    assert (row.messages[1].extra, row.notes) == ({key: "hm"}, ())


@pytest.mark.parametrize(
    ("role", "content"),
    [("role", "content"), ("from", "value"), ("speaker", "text"), ("role", "text"), ("from", "content"),
     ("author", "content"), ("sender", "message")],
)  # fmt: skip
def test_other_spellings_of_role_and_content(role: str, content: str) -> None:
    talk = [{role: "user", content: "q"}, {role: "assistant", content: "a"}]
    (row,) = read({"messages": talk})
    assert (turns(row), row.notes) == ([("user", "q"), ("assistant", "a")], ())


def test_keys_and_roles_are_mapped() -> None:
    talk = [{"who": "client", "says": "q"}, {"who": "bard", "says": "a"}]
    keys, roles = {"who": "role", "says": "content"}, {"bard": "assistant", "client": "user"}
    assert turns(read({"dialog": talk}, message_keys=keys, roles=roles)[0]) == [("user", "q"), ("assistant", "a")]
    assert turns(read({"dialog": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]})[0]) == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    with pytest.raises(DataError, match=r"data\.roles maps to 'assistent'; did you mean 'assistant'"):
        read({"messages": [U, A]}, roles={"bard": "assistent"})


def test_the_message_says_how_roles_are_mapped() -> None:
    with pytest.raises(DataError, match=r"unknown role 'client'; data\.roles .*data\.roles: \{client: user, bard: ass"):
        read({"messages": [{"role": "client", "content": "q"}, {"role": "bard", "content": "a"}]})
    with pytest.raises(DataError, match=r"unknown role 'usr'; did you mean 'user'\?; .*data\.roles: \{usr: user\}"):
        read({"messages": [{"role": "usr", "content": "q"}, A]})
    with pytest.raises(
        DataError, match=r"has no content; its keys are role, msg.*data\.message_keys: \{msg: content\}"
    ):
        read({"messages": [U, A]}, {"messages": [{"role": "user", "msg": "q"}, A]})


@pytest.mark.parametrize(("call", "response"), [("tool_call", "tool_response"), ("function_call", "observation")])
def test_calls_that_are_messages_of_their_own(call: str, response: str) -> None:
    talk = [
        {"role": "user", "content": "sky?"},
        {"role": "assistant", "content": "Let me look."},
        {"role": call, "content": '{"name": "sky", "arguments": {"city": "Orlen"}}'},
        {"role": call, "content": {"name": "sky", "arguments": '{"city": "Brask"}'}},
        {"role": response, "content": {"temp": 18}},
        {"role": response, "content": ["clear", "dry"]},
        {"role": "assistant", "content": "Clear."},
    ]
    (row,) = read({"messages": talk})
    assert turns(row) == [
        ("user", "sky?"), ("assistant", "Let me look."), ("tool", '{"temp": 18}'), ("tool", '["clear", "dry"]'),
        ("assistant", "Clear."),
    ]  # fmt: skip
    calls = [each["function"] for each in row.messages[1].extra["tool_calls"]]
    assert calls == [{"name": "sky", "arguments": {"city": city}} for city in ("Orlen", "Brask")]


def test_openais_older_functions() -> None:
    call = {"name": "sky", "arguments": '{"city": "Orlen"}'}
    talk = [
        U,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "sky", "content": "x"},
        A,
    ]
    (row,) = read({"messages": talk, "functions": [{"name": "sky"}]})
    assert row.tools == [{"type": "function", "function": {"name": "sky"}}]
    assert row.messages[1].extra["tool_calls"][0]["function"] == {"name": "sky", "arguments": {"city": "Orlen"}}
    assert row.messages[2].extra == {"name": "sky"}
    padded = {"role": "assistant", "content": "b", "function_call": {"name": None, "arguments": None}, "tool_calls": []}
    assert read({"messages": [U, padded]})[0].messages[1].extra == {}


def test_only_the_assistant_calls_tools() -> None:
    with pytest.raises(DataError, match=r"message 1 has tool calls, and it is the user's"):
        read({"messages": [{**U, "tool_calls": [{"name": "f"}]}, A]})


def test_other_peoples_names_for_arguments() -> None:
    for key in ("arguments", "args", "parameters", "input"):
        call = {"name": "f", key: {"x": 1}, "id": "c1", "type": "tool_call"}
        (row,) = read({"messages": [U, {"role": "assistant", "content": "", "tool_calls": [call]}]})
        expected = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        assert row.messages[1].extra["tool_calls"] == [expected]
    call = {"name": "f", "kwargs": {"x": 1}}
    with pytest.raises(DataError, match=r"tool call f of message 2 has no arguments; its keys are name, kwargs"):
        read({"messages": [U, {"role": "assistant", "tool_calls": [call]}]})
    for nothing in ({}, {"arguments": ""}, {"arguments": None}, {"arguments": "{}"}):
        (row,) = read({"messages": [U, {"role": "assistant", "tool_calls": [{"name": "f", **nothing}]}]})
        assert row.messages[1].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_messages_and_tools_as_text() -> None:
    talk = "[{'role': 'user', 'content': \"it's\"}\n {'role': 'assistant', 'content': None, 'tool_calls': " + (
        "[{'function': {'name': 'f', 'arguments': \"{'x': 1}\"}}]}]"
    )
    (row,) = read({"messages": talk, "tools": "[{'name': 'f'}]"})
    assert turns(row) == [("user", "it's"), ("assistant", "")]
    assert row.messages[1].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]
    for nothing in ("[]", "", "None", None, "null"):
        assert (
            read({"messages": [U, A], "tools": nothing}, {"messages": [U, A], "tools": '["{\\"name\\": \\"g\\"}"]'})[
                0
            ].tools
            is None
        )


@pytest.mark.parametrize("key", ["ignore", "skip", "exclude_from_training", "masked_out", "no_supervise"])
def test_other_keys_that_mean_not_to_learn_stop_the_run(key: str) -> None:
    row = {"messages": [U, {**A, key: True}, U, {**A, "content": "b"}]}
    with pytest.raises(DataError, match=rf"message 2 has the key '{key}', which sounds as if it said whether"):
        read(row)
    assert learned(read(row, message_keys={key: "masked"})[0]) == ["b"]
    assert learned(read(row, message_keys={key: "unread"})[0]) == ["a", "b"]


def test_the_example_for_a_key_that_leaves_out_leaves_out() -> None:
    with pytest.raises(DataError, match=r"for example data\.message_keys: \{ignore: masked\}"):
        read({"messages": [U, {**A, "ignore": True}]})
    with pytest.raises(DataError, match=r"for example data\.message_keys: \{loss_flag: train\}"):
        read({"messages": [U, {**A, "loss_flag": True}]})


@pytest.mark.parametrize("key", ["chain_of_thought", "analysis", "reasoning_text", "thought_process", "cot"])
def test_thinking_under_a_key_that_nothing_reads_stops_the_run(key: str) -> None:
    row = {"messages": [U, {**A, key: "let me see"}]}
    with pytest.raises(DataError, match=rf"'{key}', which sounds as .* data\.message_keys: \{{{key}: thinking\}} to"):
        read(row)
    assert read(row, message_keys={key: "thinking"})[0].messages[1].extra == {"thinking": "let me see"}
    assert read(row, message_keys={key: "unread"})[0].messages[1].extra == {}


def test_thinking_in_parts_stops_the_run_and_what_is_about_it_does_not() -> None:
    parts = {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}
    with pytest.raises(DataError, match=r"write it as text under reasoning_content, or data\.message_keys: "):
        read({"messages": [U, {**A, **parts}]})
    assert learned(read({"messages": [U, {**A, "reasoning_effort": "high", "reasoning_tokens": 7}]})[0]) == ["a"]
