"""From a recipe's data to examples: lengths, held-out rows, duplicates, counts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig
from topwork.data.conversations import Message
from topwork.data.examples import Data, load_data
from topwork.data.meaning.formats import read_conversations

encode_all = ChatTemplate.encode_all
Write = Callable[[str, str | bytes], str]


def lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(map(json.dumps, rows))


@pytest.fixture
def load(make_tokenizer: Callable[..., Any]) -> Callable[..., tuple[Data, list[str]]]:
    def loaded(train: str, context: int = 4096, seed: int = 0, family: str = "smollm2", **config: Any) -> Any:
        said: list[str] = []
        made = DataConfig(train=train, **config)
        return load_data(made, make_tokenizer(family), context, seed, said.append), said

    return loaded


ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(50)]


def test_hold_out_by_seed_and_report(load: Any, write: Write) -> None:
    train = write("a.jsonl", lines(ROWS))
    data, said = load(train, eval_fraction=0.1)
    again, _ = load(train, eval_fraction=0.1)
    other, _ = load(train, eval_fraction=0.1, seed=1)
    sources = [example.source for example in data.eval]
    assert (len(data.train), len(data.eval)) == (45, 5)
    assert sources == [example.source for example in again.eval]
    assert sources != [example.source for example in other.eval]
    assert not {example.source for example in data.train} & set(sources)
    assert [conversation.source for conversation in data.eval_conversations] == sources
    assert said[0] == "read as prompt_completion: prompt -> completion, 50 rows"
    assert said[1].startswith("train: 45 rows -> 45 sequences; ")
    assert said[2].startswith("eval (held out by seed): 5 rows -> 5 sequences; ")
    learned = sum(int((example.weights > 0).sum()) for example in data.train)
    assert data.summary.train.learned_tokens == learned > 0
    assert data.summary.train.tokens == sum(len(example.tokens) for example in data.train)
    assert len(load(train, eval_fraction=0)[0].train) == 50
    assert len(load(train, eval_fraction=0, max_rows=7)[0].train) == 7


def test_example_arrays_and_training_prompt(load: Any, write: Write) -> None:
    data, _ = load(write("a.jsonl", lines(ROWS)), eval_fraction=0)
    example = data.train[3]
    assert (example.tokens.dtype, example.weights.dtype, example.source) == (np.int32, np.float32, "a.jsonl:4")
    prompt = data.template.prompt_ids([Message("user", "question 3")])
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert not example.weights[: len(prompt)].any()
    assert example.weights[len(prompt) :].all()
    assert data.template.tokenizer.decode(example.tokens[len(prompt) :]) == "answer 3<|im_end|>"


def test_rows_in_both_are_counted(load: Any, write: Write) -> None:
    data, said = load(
        write("a.jsonl", lines(ROWS)), eval=write("b.jsonl", lines([*ROWS[:3], {"prompt": "new", "completion": "x"}]))
    )
    assert data.summary.duplicates_across == 3
    assert said[-1].startswith("warning: 3 of 4 eval sequences are in train too")
    _, said = load(write("a.jsonl", lines(ROWS)), eval=write("c.jsonl", lines([{"prompt": "new", "completion": "x"}])))
    assert not any("warning" in line for line in said)


LONG = [*ROWS[:4], {"prompt": "short", "completion": "long " * 300}, {"prompt": "long " * 300, "completion": "short"}]


def test_longer_sequences_are_refused_with_the_ways_out(load: Any, write: Write) -> None:
    train = write("a.jsonl", lines(LONG))
    ways = (
        r"2 of 6 sequences are longer than 256 tokens.*longest has [\d,]+ \(a\.jsonl:\d\)\. Set data\.max_length: \d+ "
        r"or more, or data\.too_long: oldest_turns or middle \(which keep answers whole\), truncate .* or drop$"
    )
    with pytest.raises(DataError, match=ways):
        load(train, eval_fraction=0, max_length=256)
    with pytest.raises(DataError, match=r"the model's context, below data.max_length, is 200"):
        load(train, eval_fraction=0, max_length=256, context=200)
    with pytest.raises(DataError, match="split, which cuts plain text"):
        load(train, too_long="split")


def test_longer_sequences_truncated_or_dropped(load: Any, write: Write) -> None:
    train = write("a.jsonl", lines(LONG))
    data, said = load(train, eval_fraction=0, max_length=256, too_long="truncate")
    counts = data.summary.train
    assert (counts.long, counts.truncated, counts.long_dropped, counts.sequences) == (2, 1, 1, 5)
    assert "1 lost their answer and were dropped, 1 truncated (1 in the middle of an answer)" in said[1]
    cut = data.train[4]
    assert (cut.source, len(cut.tokens)) == ("a.jsonl:5", 256)
    assert data.template.tokenizer.eos_token_id != cut.tokens[-1], "the end of turn must not be faked"
    assert cut.weights[-1] == 1
    data, said = load(train, eval_fraction=0, max_length=256, too_long="drop")
    counts = data.summary.train
    assert (counts.long, counts.truncated, counts.long_dropped, counts.sequences) == (2, 0, 2, 4)
    assert "2 too long and dropped" in said[1]
    with pytest.raises(DataError, match=r"no row is left to train on .*2 rows: longer than 256 tokens, .*b\.jsonl:1"):
        load(write("b.jsonl", lines(LONG[4:])), eval_fraction=0, max_length=256, too_long="drop")


@pytest.mark.parametrize("letters", [99, 100, 198, 199, 457])
def test_split_text_learns_every_token_once(load: Any, write: Write, letters: int) -> None:
    text = "".join(chr(0x4E00 + number) for number in range(letters))
    train = write("a.txt", text)
    whole = load(train, eval_fraction=0, max_length=4096)[0].train[0].tokens
    data, _ = load(train, eval_fraction=0, max_length=100, too_long="split")
    assert max(len(example.tokens) for example in data.train) <= 100
    learned = [token for example in data.train for token in example.tokens[example.weights > 0]]
    assert learned == whole[1:].tolist()
    assert data.eval_conversations == ()


def test_bad_rows_refused_or_dropped_and_counted(load: Any, write: Write) -> None:
    train = write("a.jsonl", lines([*ROWS[:3], {"prompt": "q", "completion": ""}]))
    with pytest.raises(DataError, match=r"1 of 4 rows cannot be used:\n  a.jsonl:4: no answer"):
        load(train)
    data, said = load(train, eval_fraction=0, on_bad_row="drop")
    assert (data.summary.train.bad_rows, data.summary.train.sequences) == (1, 3)
    assert "1 bad rows dropped" in said[1]
    assert said[2:] == ["1 row dropped: no answer: completion is empty (a.jsonl:4)"]


def test_bad_rows_that_are_dropped_are_named_by_their_reasons(load: Any, write: Write) -> None:
    odd = [{"prompt": "q", "completion": answer} for answer in (None, "", " ", "")]
    reasons = [{"prompt": "", "completion": "a"}, {"prompt": "q", "completion": None}]
    train = write("a.jsonl", lines([*ROWS[:3], *odd, *reasons]))
    data, said = load(train, eval_fraction=0, on_bad_row="drop")
    assert data.summary.train.bad_rows == 6
    assert "5 rows dropped: no answer: completion is empty (a.jsonl:4, a.jsonl:5, a.jsonl:6, …)" in said
    assert "1 row dropped: no question: prompt is empty (a.jsonl:8)" in said
    assert [(note.text, note.rows, note.dropped) for note in data.summary.notes] == [
        ("no answer: completion is empty", 5, True),
        ("no question: prompt is empty", 1, True),
    ]


def test_notes_of_conversations_are_counted_and_named(load: Any, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row lost on the way to a conversation, and what a sequence lost in its template."""
    import topwork.data.parts as parts

    def noted(*given: Any) -> Any:
        good, bad = read_conversations(*given)
        cut = ("a user turn at the end is cut",)
        return [replace(row, notes=cut) if number % 2 else row for number, row in enumerate(good)], bad

    monkeypatch.setattr(parts, "read_conversations", noted)
    monkeypatch.setattr(
        ChatTemplate,
        "encode_all",
        lambda *given: (
            [[replace(item, notes=("thinking is left out",)) for item in row] for row in encode_all(*given)[0]],
            [],
        ),
    )
    data, said = load(write("a.jsonl", lines(ROWS)), eval_fraction=0.1)
    assert said[3:] == [
        "50 rows: thinking is left out (a.jsonl:1, a.jsonl:2, a.jsonl:3, …)",
        "25 rows: a user turn at the end is cut (a.jsonl:2, a.jsonl:4, a.jsonl:6, …)",
    ]
    assert [note.rows for note in data.summary.notes] == [50, 25]


def test_each_source_says_how_it_was_read(load: Any, write: Write) -> None:
    one, two = write("a.jsonl", lines(ROWS[:3])), write("b.jsonl", lines([{"text": "a story"}]))
    _, said = load([one, two], eval_fraction=0)
    assert said[:2] == [
        f"{one}: read as prompt_completion: prompt -> completion, 3 rows",
        f"{two}: read as text: every token of text, 1 row",
    ]
    _, said = load(one, eval=two)
    assert said[:2] == [
        "read as prompt_completion: prompt -> completion, 3 rows",
        f"{two}: read as text: every token of text, 1 row",
    ]


def test_only_what_has_something_to_learn_is_a_sequence(load: Any, write: Write) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))]
    rows = [{"messages": [turns[0], {**turns[1], "weight": 0}, *turns]}, {"messages": turns}]
    data, _ = load(write("a.jsonl", lines(rows)), family="qwen3", eval_fraction=0)
    assert len(data.train) == 2
    assert all(example.weights.any() for example in data.train)


def test_bad_rows_that_the_template_finds(load: Any, write: Write) -> None:
    twice = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    }
    good = {"messages": twice["messages"][1:]}
    train = write("a.jsonl", lines([good, twice, good]))
    with pytest.raises(DataError, match=r"1 of 3 rows[^$]*a.jsonl:2: .*roles must alternate"):
        load(train, family="gemma", eval_fraction=0)
    data, _ = load(train, family="gemma", eval_fraction=0, on_bad_row="drop")
    assert [example.source for example in data.train] == ["a.jsonl:1", "a.jsonl:3"]


def test_unrolled_conversations_keep_their_rows(load: Any, write: Write) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))]
    data, said = load(write("a.jsonl", lines([{"messages": turns * 2}] * 3)), family="qwen3", eval_fraction=0)
    assert "3 rows -> 6 sequences" in said[1]
    data, _ = load(write("a.jsonl", lines([{"messages": turns * 2}] * 3)), family="qwen3", eval_fraction=0.3)
    assert (len(data.eval), len(data.eval_conversations)) == (2, 1)


def test_a_tokenizer_of_another_kind(small_llama: Path, write: Write) -> None:
    """SentencePiece-like, adds a BOS, has no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_llama)
    rows = [
        {"prompt": "Once upon a time", "completion": "there was a cat.\n The end."},
        {"prompt": "a", "completion": "\n b"},
    ]
    config = DataConfig(train=write("a.jsonl", lines(rows)), eval_fraction=0)
    talk = [{"messages": [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]}]
    with pytest.raises(DataError, match="no chat template"):
        load_data(DataConfig(train=write("b.jsonl", lines(talk))), tokenizer, 512, 0, lambda _: None)
    said: list[str] = []
    load_data(config, tokenizer, 512, 0, said.append)
    assert said[2] == "prompt and completion one after the other as they are", "which reading was taken"
    for name in ("plain", "chatml"):
        data = load_data(config.model_copy(update={"chat_template": name}), tokenizer, 512, 0, lambda _: None)
        for example, row in zip(data.train, rows):
            prompt = data.template.prompt_ids([Message("user", row["prompt"])])
            assert prompt[0] == tokenizer.bos_token_id not in prompt[1:]
            assert example.tokens[: len(prompt)].tolist() == prompt
            assert example.tokens[-1] == tokenizer.eos_token_id
            answer = tokenizer.decode(example.tokens[len(prompt) : -1]).removesuffix("<|im_end|>")
            assert answer.lstrip(" ") == row["completion"].lstrip(" ")


def test_columns_that_one_of_several_sources_has_are_told_with_what_the_other_needs(
    write: Any, make_tokenizer: Any
) -> None:
    german = write("a.csv", "Frage,Antwort\nq,a\n")
    chats = write(
        "b.jsonl", '{"messages": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]}\n'
    )
    columns = {"prompt": "Frage", "completion": "Antwort"}
    tokenizer = make_tokenizer("smollm2")

    def loaded(**data: Any) -> Any:
        config = DataConfig(**{"columns": columns, "eval_fraction": 0, **data})
        return load_data(config, tokenizer, 512, 0, lambda _: None)

    for sides in ({"train": [german, chats]}, {"train": german, "eval": chats}):
        with pytest.raises(DataError, match=r"give this one its own: \{path: .*b\.jsonl, columns: \{\}\}"):
            loaded(**sides)
    assert len(loaded(train=[german, {"path": chats, "columns": {}}]).train) == 2
    assert len(loaded(train=german, eval={"path": chats, "columns": {}}).eval) == 1
    with pytest.raises(DataError, match="which the data does not have") as error:
        loaded(train=chats)
    assert "give this one" not in str(error.value)
