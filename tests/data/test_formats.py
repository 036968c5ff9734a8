"""What rows mean: recognition, the column map, bad rows, and files of each format."""

import json
from pathlib import Path
from typing import Any

import pytest

from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.conversations import Conversation
from topwork.data.files.rows import Row, read_rows
from topwork.data.meaning.formats import read_conversations, recognise
from topwork.data.summary import refuse_bad


def rows_of(*fields: dict[str, Any]) -> list[Row]:
    return [Row(item, f"a.jsonl:{number}") for number, item in enumerate(fields, 1)]


def read(*fields: dict[str, Any], **config: Any) -> list[Conversation]:
    made = DataConfig(train="a.jsonl", **config)
    rows = rows_of(*fields)
    good, bad = read_conversations(rows, recognise(rows, made), made)
    refuse_bad(bad, len(rows), made)
    return good


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def refused(*fields: dict[str, Any], match: str, **config: Any) -> None:
    with pytest.raises(DataError, match=match):
        read(*fields, **config)


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_sentences_say_what_was_recognised() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"messages": [U, A]}, "read as messages: messages -> every assistant turn, 1 row"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": "1"},
            "read as sharegpt: conversations (from, value) -> every assistant turn, 1 row; not read: id",
        ),
        (
            {"instruction": "q", "input": "", "output": "a"},
            "read as alpaca: instruction (+ input) -> output, 1 row",
        ),
        ({"question": "q", "answer": "a"}, "read as prompt_completion: question -> answer, 1 row"),
        ({"text": "t"}, "read as text: every token of text, 1 row"),
    ]
    for fields, sentence in cases:
        assert recognise(rows_of(fields), DataConfig(train="a")).sentence == sentence


def test_alpaca_with_input_system_and_history() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count.", "history": [["hi", "ho"]]}
    expected = [("system", "Count."), ("user", "hi"), ("assistant", "ho"), ("user", "Add.\n\n1 2"), ("assistant", "3")]
    assert turns(read(row)[0]) == expected


def test_column_map_decides_the_format() -> None:
    assert turns(read({"mr": "m", "ref": "r"}, columns={"prompt": "mr", "completion": "ref"})[0]) == [
        ("user", "m"),
        ("assistant", "r"),
    ]
    assert turns(read({"chat_log": [U, A]}, columns={"messages": "chat_log"})[0]) == [("user", "q"), ("assistant", "a")]
    assert read({"body": "t"}, columns={"text": "body"})[0].text == "t"
    refused({"mr": "m", "ref": "r"}, match=r"columns mr, ref, .*data\.columns: \{prompt: mr, completion: ref\}")
    refused({"mr": "m", "ref": "r"}, columns={"prompt": "mrs"}, match=r"'mrs', which .* did you mean 'mr'")
    refused({"mr": "m"}, columns={"promt": "mr"}, match=r"the field 'promt'; did you mean 'prompt'")
    refused(
        {"mr": "m", "ref": "r"}, format="alpaca", match=r"data\.format is alpaca, which needs instruction and output"
    )


def test_text_beside_a_label_is_no_plain_text() -> None:
    row = {"text": "t", "category": "c"}
    refused(row, match=r"leave category unlearned.*\{prompt: text, completion: category\}.*data\.format: text")
    assert read(row, format="text")[0].kind == "text"
    assert read({"text": "t", "url": "u"})[0].kind == "text"


def test_conversational_prompt_and_completion() -> None:
    assert turns(read({"prompt": [U], "completion": [A]})[0]) == [("user", "q"), ("assistant", "a")]
    assert turns(read({"prompt": [U, A, U], "completion": "b"})[0])[-1] == ("assistant", "b")


def test_parts_weights_and_extras() -> None:
    parts = [{"type": "text", "value": "one "}, {"type": "text", "text": "two"}]
    message = {"role": "assistant", "content": parts, "loss_weight": 0.5, "reasoning_content": "hm", "name": None}
    (conversation,) = read({"messages": [U, message]})
    assert conversation.messages[1].content == "one two"
    assert conversation.messages[1].weight == 0.5
    assert conversation.messages[1].extra == {"reasoning_content": "hm"}


def test_tool_calls_of_openai_and_sharegpt_read_alike() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    openai = {"messages": [U, {"role": "assistant", "tool_calls": [call]}], "tools": [{"name": "f"}]}
    value = '{"name": "f", "arguments": {"x": 1}}'
    sharegpt = {
        "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}],
        "tools": '[{"name": "f"}]',
    }
    expected = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    (first,), (second,) = read(openai), read(sharegpt)
    assert first.messages[1].extra["tool_calls"] == [{"id": "c1", **expected}]
    assert second.messages[1].extra["tool_calls"] == [expected]
    assert (second.messages[1].role, second.messages[1].content) == ("assistant", "")
    assert first.tools == second.tools == [{"type": "function", "function": {"name": "f"}}]


def test_system_is_put_where_there_is_none() -> None:
    own = {"messages": [{"role": "system", "content": "own"}, U, A]}
    first, second = read({"messages": [U, A]}, own, system="Be brief.")
    assert turns(first)[0] == ("system", "Be brief.")
    assert turns(second)[0] == ("system", "own")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": [U]}, "no answer: the last message is the user's"),
        ({"messages": [U, {"role": "assistant", "content": " "}]}, "no answer: message 2"),
        ({"messages": [{"role": "user", "content": ""}, A]}, r"message 1 \(user\) is empty"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages is of type str"),
        ({"messages": [U, {"role": "assistant", "content": ["a", "b"]}]}, "content of message 2 is a list of 2 texts"),
        ({"messages": [{"role": "usr", "content": "q"}, A]}, "unknown role 'usr'; did you mean 'user'"),
        ({"messages": [U, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        ({"messages": [U, {**A, "weight": -1}]}, "weight of message 2 is -1"),
        ({"messages": [U, {"role": "assistant", "content": "\ud83d"}]}, "half a surrogate pair"),
        ({"messages": [U, {"role": "assistant", "tool_calls": [{"x": 1}]}]}, "a tool call of message 2"),
    ],
)
def test_bad_rows_are_named_counted_and_dropped_on_demand(fields: dict[str, Any], reason: str) -> None:
    good = {"messages": [U, A]}
    refused(good, fields, good, match=rf"1 of 3 rows cannot be used:\n  a.jsonl:2: .*{reason}[^$]*on_bad_row: drop")
    config = DataConfig(train="a.jsonl", on_bad_row="drop")
    rows = rows_of(good, fields, good)
    kept, bad = read_conversations(rows, recognise(rows, config), config)
    assert [conversation.source for conversation in kept] == ["a.jsonl:1", "a.jsonl:3"]
    assert [row.source for row in bad] == ["a.jsonl:2"]


def test_rows_without_an_answer() -> None:
    refused({"prompt": "q", "completion": ""}, match=r"a.jsonl:1: no answer: completion is empty")
    refused({"instruction": "q", "output": "a"}, {"instruction": "q"}, match=r"a.jsonl:2: no answer: output is missing")
    many = [{"question": "q", "answer": None}] * 8
    refused(*many, {"question": "q", "answer": "a"}, match=r"8 of 9 rows[^$]*a.jsonl:5[^$]*and 3 more")


COLUMNS = {"banking77": {"prompt": "text", "completion": "category"}, "e2e_nlg": {"prompt": "mr", "completion": "ref"}}


@pytest.mark.parametrize(
    ("name", "format", "count", "first"),
    [
        ("banking77/test.csv", "prompt_completion", 3080, "How do I locate my card?"),
        ("e2e_nlg/devset.csv", "prompt_completion", 4672, "name[Alimentum], area[city centre], familyFriendly[no]"),
        ("gsm8k/test.jsonl", "prompt_completion", 1319, "Janet’s ducks lay 16 eggs per day."),
        ("mlx_wikisql/train.jsonl", "text", 1000, "table: 1-1000181-1"),
        ("wikitext2/valid.txt", "text", 1160, " = Homarus gammarus ="),
        ("rasbt_instruct/instruction-data.json", "alpaca", 1100, "Evaluate the following phrase"),
        ("llamafactory_demo/identity.json", "alpaca", 91, "hi"),
        ("llamafactory_demo/v1_sft_demo.jsonl", "messages", 500, "hi"),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", "sharegpt", 300, "Hi, I have some ingredients"),
        ("foundry_formats/gsm8k_chat_train.jsonl", "messages", 449, "Reply user's question"),
        ("foundry_formats/stock_toolcall_training.jsonl", "messages", 86, "Don't make assumptions"),
        ("fastchat/dummy_conversation.json", "sharegpt", 500, "Who are you?"),
        ("torchtune_tiny/alpaca_tiny.json", "alpaca", 100, "Give three tips"),
        ("torchtune_tiny/chat_tiny.json", "sharegpt", 1, "You are an AI assistant."),
        ("torchtune_tiny/instruct_tiny.json", "alpaca", 2, "What time is it in London?"),
    ],
)
def test_files_of_data_sets(name: str, format: str, count: int, first: str, data_sets: Path, made_data: Path) -> None:
    if data_sets == made_data:
        count, first = 2, "First" if format != "text" or name.endswith("jsonl") else " = First"
    config = DataConfig(train=str(data_sets / name), columns=COLUMNS.get(name.split("/")[0], {}))
    rows = read_rows(config.sources(config.train)[0], documents="paragraph").rows
    recognised = recognise(rows, config)
    conversations, bad = read_conversations(rows, recognised, config)
    assert (recognised.name, len(conversations), bad) == (format, count, [])
    text = conversations[0].text if format == "text" else conversations[0].messages[0].content
    assert text is not None
    assert text.startswith(first)


def test_tool_calls_of_data_sets(data_sets: Path, made_data: Path) -> None:
    for name, calls in (
        ("llamafactory_demo/glaive_toolcall_en_demo.json", 211),
        ("foundry_formats/stock_toolcall_training.jsonl", 36),
    ):
        config = DataConfig(train=str(data_sets / name))
        rows = read_rows(config.sources(config.train)[0]).rows
        conversations, _ = read_conversations(rows, recognise(rows, config), config)
        found = [call for row in conversations for m in row.messages for call in m.extra.get("tool_calls", ())]
        assert len(found) >= (2 if data_sets == made_data else calls)
        assert all(isinstance(call["function"]["arguments"], dict) for call in found)


@pytest.mark.parametrize(
    "name",
    [
        "rasbt_instruct/instruction-data-with-preference.json",
        "hh_rlhf/helpful-base.test.jsonl",
        "llamafactory_demo/dpo_en_demo.json",
        "llamafactory_demo/v1_dpo_demo.jsonl",
        "llamafactory_demo/kto_en_demo.json",
        "foundry_formats/orca_dpo_pairs.validation.jsonl",
        "torchtune_tiny/hh_rlhf_tiny.json",
        "torchtune_tiny/stack_exchange_paired_tiny.json",
    ],
)
def test_preference_files_need_another_objective(name: str, data_sets: Path) -> None:
    config = DataConfig(train=str(data_sets / name))
    with pytest.raises(DataError, match=r"preference data .* need a preference objective"):
        recognise(read_rows(config.sources(config.train)[0], max_rows=100).rows, config)


def test_a_file_without_answers(data_sets: Path) -> None:
    config = DataConfig(train=str(data_sets / "foundry_formats/countdown_train_100.jsonl"))
    rows = read_rows(config.sources(config.train)[0]).rows
    count = len(rows)
    with pytest.raises(DataError, match=rf"{count} of {count} rows cannot be used:\n  countdown_.*.jsonl:1: no answer"):
        refuse_bad(read_conversations(rows, recognise(rows, config), config)[1], count, config)


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}],
        [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        [{"type": "custom", "name": "f", "description": "d", "input_schema": {"type": "object"}}],
        [{"name": "f", "description": "d", "inputSchema": {"type": "object"}}],
        [{"functionDeclarations": [{"name": "f", "description": "d", "parameters": {"type": "object"}}]}],
    ],
)
def test_tools_of_other_interfaces_read_alike(tools: list[Any]) -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    (row,) = read({"messages": [U, A], "tools": tools})
    assert row.tools == [{"type": "function", "function": function}]
    assert list(row.tools[0]["function"]) == ["name", "description", "parameters"]


@pytest.mark.parametrize("arguments", ['{"x": 1', '{"x": 1}}', '{"x": tru}', '[{"x": 1}'])
def test_arguments_that_are_broken_json_are_not_learned(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(DataError, match="the arguments of the tool call f of message 2 are no JSON: "):
        read({"messages": [U, {"role": "assistant", "tool_calls": [call]}]})
    call = {"function": {"name": "f", "arguments": "SELECT 1"}}
    (row,) = read({"messages": [U, {"role": "assistant", "tool_calls": [call]}]})
    assert row.messages[1].extra["tool_calls"][0]["function"]["arguments"] == "SELECT 1"


def test_an_answer_of_objects_is_told_to_be_json() -> None:
    for answer in ({"x": 1}, [{"x": 1}, {"x": 2}]):
        (row,) = read({"prompt": "q", "response": answer})
        format = recognise(rows_of({"prompt": "q", "response": answer}), DataConfig(train="a.jsonl"))
        assert row.messages[1].content == json.dumps(answer)
        assert "prompt -> response (objects as JSON)" in format.sentence
