"""Sequences longer than allowed: what of them is learned, by each way that a recipe has with them."""

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import pytest

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig
from topwork.data.conversations import Conversation, Message
from topwork.data.examples import Data, Example, load_data
from topwork.data.shortening import MARK, Made, alone, without_middle

Write = Callable[[str, str | bytes], str]
FAMILIES = ("smollm2", "llama3", "qwen2_5", "qwen3", "gemma3", "mistral_v3", "phi3")
STORY = "The mill stands on the hill and turns, and whoever passes looks up. " * 20


def turns(*texts: str, system: str = "") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": role, "content": text} for role, text in zip(roles, texts)]


@pytest.fixture
def load(make_tokenizer: Callable[..., Any], write: Write) -> Callable[..., tuple[Data, list[str]]]:
    def loaded(rows: Sequence[Any], family: str = "smollm2", context: int = 100_000, **config: Any) -> Any:
        said: list[str] = []
        made = [row if isinstance(row, dict) else {"messages": row} for row in rows]
        train = write("a.jsonl", "\n".join(map(json.dumps, made)))
        options = {"eval_fraction": 0.0, "max_length": 100_000, **config}
        return load_data(DataConfig(train=train, **options), make_tokenizer(family), context, 0, said.append), said

    return loaded


def learned(examples: Sequence[Example]) -> list[list[int]]:
    """The stretches of tokens that are learned, in their order."""
    return [
        [token for token, _ in stretch]
        for example in examples
        for on, stretch in groupby(zip(example.tokens.tolist(), example.weights.tolist()), lambda pair: pair[1] > 0)
        if on
    ]


def text_of(data: Data, example: Example) -> str:
    return str(data.template.tokenizer.decode(example.tokens))


# The middle of a message


@pytest.mark.parametrize("family", FAMILIES)
def test_middle_keeps_the_answer_and_what_generation_is_prompted_with(load: Any, family: str) -> None:
    rows = [turns(f"Read: {STORY}What turns?", "The mill."), turns("hi", "hello")]
    whole, _ = load(rows, family)
    data, said = load(rows, family, max_length=200, too_long="middle")
    assert learned(data.train) == learned(whole.train)
    long, short = data.train
    assert 190 < len(long.tokens) <= 200
    assert short.tokens.tolist() == whole.train[1].tokens.tolist()
    asked = data.train_conversations[0].messages[:-1]
    assert asked[-1].content.startswith("Read: The mill stands")
    assert asked[-1].content.endswith("What turns?")
    assert asked[-1].content.count(MARK) == 1
    prompt = data.template.prompt_ids(asked)
    assert long.tokens[: len(prompt)].tolist() == prompt
    assert not long.weights[: len(prompt)].any()
    assert (data.summary.train.long, data.summary.train.shortened, data.summary.train.long_dropped) == (1, 1, 0)
    assert "1 row: the middle of a long message is left out (a.jsonl:1)" in said
    assert "2 rows -> 2 sequences, 1 shortened;" in said[1]


def test_middle_is_cut_at_words_of_the_longest_message_first(load: Any) -> None:
    rows = [turns(STORY, "Yes.", "And then? " * 12, "It turned.", system="Be brief. " * 12)]
    data, _ = load(rows, max_length=500, too_long="middle")
    system, story, yes, then, turned = data.train_conversations[0].messages
    assert (system.content, then.content) == ("Be brief. " * 12, "And then? " * 12)
    assert (yes.content, turned.content) == ("Yes.", "It turned.")
    front, back = story.content.split(MARK)
    assert STORY.startswith(f"{front} ")
    assert STORY.endswith(f" {back}")
    data, _ = load(rows, max_length=90, too_long="middle")
    messages = data.train_conversations[0].messages
    assert [MARK in message.content for message in messages] == [True, True, False, True, False], "the system's last"
    assert [len(message.content) < 20 for message in messages] == [False, True, True, True, True]


def test_middle_drops_a_row_whose_answer_alone_is_too_long(load: Any) -> None:
    rows = [turns("Tell a story.", STORY), turns(STORY, "Long."), turns("hi", "hello")]
    data, said = load(rows, max_length=150, too_long="middle")
    assert [example.source for example in data.train] == ["a.jsonl:2", "a.jsonl:3"]
    assert [row.source for row in data.train_conversations] == ["a.jsonl:2", "a.jsonl:3"]
    assert any(line.startswith("1 row: too long even with its messages shortened, ") for line in said)
    counts = data.summary.train
    assert (counts.long, counts.shortened, counts.long_dropped) == (2, 1, 1)


def test_middle_of_prompts_without_a_chat(load: Any) -> None:
    """Prompt and completion in the plain template, and a tool's answer that is too long."""
    data, _ = load(
        [{"prompt": STORY, "completion": "the mill"}], chat_template="plain", max_length=80, too_long="middle"
    )
    assert text_of(data, data.train[0]).endswith("\nthe mill<|im_end|>")
    assert MARK in text_of(data, data.train[0])
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": 1}}}]}
    asked, answer = turns("What turns?", "The mill.")
    rows = [[asked, call, {"role": "tool", "content": STORY}, answer]]
    whole, _ = load(rows, "qwen2_5")
    data, _ = load(rows, "qwen2_5", max_length=300, too_long="middle")
    assert learned(data.train) == learned(whole.train)
    assert MARK in data.train_conversations[0].messages[2].content


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("one two three four five six", 14, "one two … six"),
        ("one two three four five six", 27, "one two three four five six"),
        ("abcdefghijklmnopqrstuvwxyz", 6, "abc … xyz"),
        ("山高水長流不息日月星", 4, "山高 … 月星"),
        ("ab👩‍👩‍👧cdefghijk👩‍👩‍👧l", 7, "ab … l"),
        ("e\u0301e\u0301e\u0301e\u0301e\u0301e\u0301", 6, "e\u0301 … e\u0301"),
        ("end.\n\nWhat is it, then, that turns?\n\nSay it now", 22, "end.\n\nWhat … Say it now"),
    ],
)  # fmt: skip
def test_the_middle_of_a_text(text: str, size: int, expected: str) -> None:
    found = without_middle(text, size)
    assert found.split() == expected.split()
    front, mark, back = found.partition(MARK)
    assert text.startswith(front)
    assert not mark or text.endswith(back)


# The oldest turns


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_learned_whole_once_without_the_oldest_turns(load: Any, family: str) -> None:
    texts = [text for number in range(12) for text in (f"question {number} " * 6, f"answer {number} is long " * 4)]
    system = "" if family in ("gemma3", "mistral_v3") else "Be brief."
    rows = [turns(*texts, system=system), turns("hi", "hello")]
    whole, _ = load(rows, family)
    data, said = load(rows, family, max_length=600, too_long="oldest_turns")
    assert learned(data.train) == learned(whole.train)
    assert all(len(example.tokens) <= 600 for example in data.train)
    assert max(len(example.tokens) for example in data.train) > 450
    if family != "qwen3":  # where history is rewritten, sequences that fit are kept as they were
        assert len(data.train) < len(learned(data.train))
    newest = data.train_conversations[0].messages
    assert newest[-1].content == texts[-1]
    assert [message.role for message in newest[-2:]] == ["user", "assistant"]
    assert [message.role for message in newest][: 2 if system else 1] == (["system", "user"] if system else ["user"])
    last = next(example for example in reversed(data.train) if example.source == "a.jsonl:1")
    prompt = data.template.prompt_ids(newest[:-1])
    assert last.tokens[: len(prompt)].tolist() == prompt
    assert "1 row: the oldest turns are left out (a.jsonl:1)" in said


def test_oldest_turns_keep_an_exchange_with_tools_together(load: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": 1}}}]}
    exchange = [
        turns("What turns there?")[0],
        call,
        {"role": "tool", "content": "a mill " * 9},
        turns("", "A mill.")[1],
    ]
    whole, _ = load([exchange * 4], "qwen2_5")
    data, _ = load([exchange * 4], "qwen2_5", max_length=500, too_long="oldest_turns")
    assert learned(data.train) == learned(whole.train)
    assert len(data.train) == 2
    for example in data.train:
        first_turn = text_of(data, example).split("<|im_start|>")[2]
        assert first_turn.startswith("user\nWhat turns")
        assert text_of(data, example).count("What turns there?") == text_of(data, example).count("A mill.")


def test_oldest_turns_with_weights_and_the_last_answer(load: Any) -> None:
    texts = [text for number in range(8) for text in (f"question {number} " * 6, f"answer {number} " * 6)]
    whole, _ = load([turns(*texts)], train_on="last_answer")
    data, _ = load([turns(*texts)], train_on="last_answer", max_length=300, too_long="oldest_turns")
    assert learned(data.train) == learned(whole.train)
    assert (len(data.train), len(data.train_conversations)) == (1, 1)
    weighted = [{**turn, **({"weight": 0} if "answer 1" in turn["content"] else {})} for turn in turns(*texts)]
    whole, _ = load([weighted])
    data, _ = load([weighted], max_length=300, too_long="oldest_turns")
    assert learned(data.train) == learned(whole.train)
    assert len(learned(data.train)) == 7


def test_oldest_turns_drop_an_exchange_that_is_too_long_alone(load: Any) -> None:
    rows = [turns("a", "b", STORY, "Long.", "c", "d"), turns(STORY, "Long.")]
    data, said = load(rows, max_length=100, too_long="oldest_turns")
    texts = [data.template.tokenizer.decode(stretch) for stretch in learned(data.train)]
    assert texts == ["b<|im_end|>", "d<|im_end|>"]
    assert "Long." not in "".join(text_of(data, example) for example in data.train)
    counts = data.summary.train
    assert (counts.long, counts.shortened, counts.long_dropped, counts.sequences) == (2, 2, 2, 2)
    assert any(line.startswith("2 rows: one exchange alone is too long, so") for line in said)
    assert [row.source for row in data.train_conversations] == ["a.jsonl:1"]


def test_all_is_learned_in_windows_where_everything_is(load: Any) -> None:
    texts = [text for number in range(8) for text in (f"question {number} " * 6, f"answer {number} " * 6)]
    data, _ = load([turns(*texts)], train_on="all", max_length=300, too_long="oldest_turns")
    text = "".join(text_of(data, example) for example in data.train)
    assert all(text.count(f"question {number} " * 6) == 1 for number in range(8))
    assert len(data.train) > 1


# Cut off, dropped, refused


def test_truncation_never_keeps_a_sequence_without_an_answer(load: Any) -> None:
    rows = [
        turns(STORY, "Long."),
        turns("hi", "hello", STORY, "Long."),
        turns("hi", "hello " * 200),
        turns("hi", "hello"),
    ]
    data, said = load(rows, max_length=100, too_long="truncate")
    assert [example.source for example in data.train] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    assert all(example.weights.any() for example in data.train)
    counts = data.summary.train
    assert (counts.long, counts.truncated, counts.cut_answers, counts.lost_answers) == (3, 2, 1, 1)
    assert "1 lost their answer and were dropped, 2 truncated (1 in the middle of an answer);" in said[1]
    assert said[2:] == [
        "1 row: the answer begins after 100 tokens and is lost, so the sequence is dropped (a.jsonl:1)",
        "1 row: cut off after 100 tokens, with later answers (a.jsonl:2)",
        "1 row: cut off after 100 tokens, in the middle of an answer (a.jsonl:3)",
    ]


def test_dropped_sequences_are_named(load: Any) -> None:
    data, said = load([turns(STORY, "Long."), turns("hi", "hello")], max_length=100, too_long="drop")
    assert [example.source for example in data.train] == ["a.jsonl:2"]
    assert said[2:] == ["1 row: longer than 100 tokens, and dropped (a.jsonl:1)"]


@pytest.mark.parametrize("way", ["oldest_turns", "middle"])
def test_plain_text_is_not_shortened_as_a_conversation(load: Any, way: str) -> None:
    with pytest.raises(DataError, match=rf"plain text, and data\.too_long is {way}.*split .*, truncate .* or drop$"):
        load([{"text": STORY}], max_length=100, too_long=way)
    data, _ = load([{"text": "short"}], max_length=100, too_long=way)
    assert len(data.train) == 1


def test_a_document_that_is_cut_up_ends_once(load: Any) -> None:
    data, said = load([{"text": STORY}], max_length=100, too_long="split")
    end = data.template.tokenizer.eos_token_id
    assert [end in example.tokens for example in data.train] == [False] * (len(data.train) - 1) + [True]
    assert len(data.train) > 2
    assert "1 row: cut up into pieces of at most 100 tokens (a.jsonl:1)" in said


def test_refused_with_the_ways_that_keep_answers(load: Any) -> None:
    told = r"1 of 2 sequences are longer than 100 tokens.*oldest_turns or middle \(which keep answers whole\), truncate"
    with pytest.raises(DataError, match=told):
        load([turns(STORY, "Long."), turns("hi", "hello")], max_length=100)
    with pytest.raises(
        DataError, match=r"\(a\.jsonl:1\)\. Set data.* data\.too_long: split \(which cuts them up\), trunc"
    ):
        load([{"text": STORY}], max_length=100)


@pytest.mark.parametrize("way", ["oldest_turns", "middle", "truncate", "drop", "split"])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_every_way_that_is_advised_is_taken(load: Any, way: str, kind: str) -> None:
    long = turns("a", "b", STORY, "Long.") if kind == "chat" else {"text": STORY}
    rows = [long, turns("hi", "hello") if kind == "chat" else {"text": "short"}]
    with pytest.raises(DataError) as refused:
        load(rows, max_length=100)
    if way in str(refused.value).partition("data.too_long: ")[2]:
        data, _ = load(rows, max_length=100, too_long=way)
        assert max(len(example.tokens) for example in data.train) <= 100
    else:
        with pytest.raises(DataError, match=way):
            load(rows, max_length=100, too_long=way)


def test_a_row_of_several_sequences_is_parted_by_the_answers_they_learn(make_tokenizer: Any) -> None:
    messages = tuple(Message(turn["role"], turn["content"]) for turn in turns("a", "b", "c", "d", "e", "f"))
    row = Conversation(messages, None, "a:1")
    template = ChatTemplate(make_tokenizer("qwen3"))
    items = template.encode(row)
    parts = alone(row, items, "answers")
    assert [[message.weight for message in part.conversation.messages] for part in parts] == [
        [None, None],
        [None, 0.0, None, None],
        [None, 0.0, None, 0.0, None, None],
    ]
    for part, item in zip(parts, items):
        assert template.encode(part.conversation) == part.sequences == [item]
    assert alone(row, template.encode(row, "all"), "all") == [Made(row, template.encode(row, "all"))]
