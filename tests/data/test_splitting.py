"""Which rows are held out, which are copies, and how often an epoch sees each."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.conversations import Conversation, Message
from topwork.data.examples import Data, Example, load_data
from topwork.data.splitting import hold_out, prompt_key, times, units

Write = Callable[[str, str | bytes], str]
Load = Callable[..., tuple[Data, list[str]]]


def pair(prompt: str, completion: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def lines(rows: Sequence[dict[str, Any]]) -> str:
    return "\n".join(map(json.dumps, rows))


@pytest.fixture
def load(make_tokenizer: Callable[..., Any]) -> Load:
    def loaded(train: Any, seed: int = 0, **config: Any) -> Any:
        said: list[str] = []
        return load_data(DataConfig(train=train, **config), make_tokenizer("smollm2"), 4096, seed, said.append), said

    return loaded


def sources(examples: Sequence[Example]) -> list[str]:
    return [example.source for example in examples]


DISTINCT = [pair(f"question {number}", f"answer {number}") for number in range(60)]


# Holding out


@pytest.mark.parametrize("by", ["prompt", "row"])
@pytest.mark.parametrize("seed", [0, 7])
def test_prompts_that_all_differ_are_drawn_as_ever(load: Load, write: Write, by: str, seed: int) -> None:
    data, _ = load(write("a.jsonl", lines(DISTINCT)), seed, eval_fraction=0.1, hold_out_by=by)
    drawn = sorted(np.random.default_rng(seed).permutation(60)[:6].tolist())
    assert sources(data.eval) == [f"a.jsonl:{number + 1}" for number in drawn]
    assert sources(data.train) == [f"a.jsonl:{number + 1}" for number in range(60) if number not in drawn]


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_is_never_on_both_sides(load: Load, write: Write, seed: int) -> None:
    rows = [pair(f"question {number}", f"answer {number} {again}") for number in range(10) for again in range(4)]
    data, said = load(write("a.jsonl", lines(rows)), seed, eval_fraction=0.2)
    asked = [{row.messages[0].content for row in side} for side in (data.train_conversations, data.eval_conversations)]
    assert not asked[0] & asked[1]
    assert (len(data.train), len(data.eval), len(asked[1])) == (32, 8, 2)
    assert not any("warning" in line for line in said)
    data, said = load(write("a.jsonl", lines(rows)), seed, eval_fraction=0.2, hold_out_by="row")
    asked = [{row.messages[0].content for row in side} for side in (data.train_conversations, data.eval_conversations)]
    assert len(data.eval) == 8
    assert (
        said[-1] == f"warning: {len(data.eval)} of 8 eval rows have a prompt that is in train too, with another answer"
    )
    assert asked[0] & asked[1]


@pytest.mark.parametrize("seed", range(3))
def test_a_columns_value_is_never_on_both_sides(load: Load, write: Write, seed: int) -> None:
    rows = [pair(f"question {number}", "answer", author=f"author {number % 6}", year=2000) for number in range(30)]
    train = write("a.jsonl", lines(rows))
    data, said = load(train, seed, eval_fraction=0.2, hold_out_by="author")
    sides = [{(int(source.split(":")[1]) - 1) % 6 for source in sources(side)} for side in (data.train, data.eval)]
    assert (len(data.eval), len(sides[1])) == (5, 1), "five of six are as near to a fifth of thirty as ten"
    assert not sides[0] & sides[1]
    assert said[-1] == "5 rows are held out instead of 6, because rows with one value of author stay together"
    with pytest.raises(DataError, match="hold_out_by is year, and all rows have one value there"):
        load(train, seed, eval_fraction=0.2, hold_out_by="year")
    with pytest.raises(DataError, match=r"autor.*did you mean 'author'"):
        load(train, seed, eval_fraction=0.2, hold_out_by="autor")


def test_copies_are_never_on_both_sides(load: Load, write: Write) -> None:
    rows = [row for row in DISTINCT[:20] for _ in range(2)]
    data, said = load(write("a.jsonl", lines(rows)), eval_fraction=0.2)
    assert data.summary.duplicates_across == 0
    assert (len(data.train), len(data.eval)) == (32, 8)
    assert said[3:] == [
        "warning: 20 rows: the same, token for token, as an earlier one; data.duplicates: drop keeps the first alone "
        "(a.jsonl:2, a.jsonl:4, a.jsonl:6, …)"
    ]


def test_groups_that_cannot_make_the_share() -> None:
    def held(sizes: Sequence[int], fraction: float, by: str = "prompt") -> tuple[int, tuple[Any, ...]]:
        keys = [unit for unit, size in enumerate(sizes) for _ in range(size)]
        found = hold_out(keys, [True] * len(keys), fraction, 0, by)
        assert 0 < len(found.rows) < len(keys)
        return len(found.rows), found.notes

    assert held([1] * 100, 0.02) == (2, ())
    assert held([2] * 50, 0.02) == (2, ())
    count, (note,) = held([500, 500], 0.02)
    assert (count, note.warning) == (500, True)
    assert note.text.startswith("500 rows are held out instead of 20, because rows with one prompt stay together")
    count, (note,) = held([990, 10], 0.02)
    assert (count, note.warning) == (10, False)
    count, (note,) = held([30, 40, 50], 0.5)
    assert count in (50, 70)
    assert note.text.startswith(f"{count} rows are held out instead of 60")
    count, (note,) = held([100], 0.02)
    assert (count, note.warning) == (2, True)
    assert note.text.startswith("all rows have the same prompt, so they are held out each by itself")
    with pytest.raises(DataError, match="hold_out_by is author, and all rows have one value there"):
        held([100], 0.02, "author")


def test_rows_that_are_left_out_do_not_change_which_are_held_out(load: Load, write: Write) -> None:
    long = [
        pair(row["prompt"], row["completion"] + " and more" * (40 if n % 3 == 0 else 0))
        for n, row in enumerate(DISTINCT)
    ]
    train = write("a.jsonl", lines(long))
    whole, _ = load(train, eval_fraction=0.1)
    data, _ = load(train, eval_fraction=0.1, max_length=100, too_long="drop")
    left = [source for source in sources(whole.eval) if (int(source.split(":")[1]) - 1) % 3]
    assert set(left) <= set(sources(data.eval))
    assert (len(data.train), len(data.eval)) == (36, 4)
    assert (data.summary.train.rows, data.summary.eval.rows) == (56, 4)
    assert data.summary.train.long_dropped == 20


def test_what_makes_a_prompt() -> None:
    def key(*messages: tuple[str, str], tools: Any = None) -> str:
        return prompt_key(Conversation(tuple(Message(*message) for message in messages), tools, "a:1"))

    one = key(("user", "a"), ("assistant", "b"))
    assert one == key(("user", "a"), ("assistant", "other"))
    assert one != key(("system", "s"), ("user", "a"), ("assistant", "b"))
    assert one != key(("user", "a"), ("assistant", "b"), tools=[{"type": "function"}])
    assert one != key(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    documents = [Conversation((), None, "a:1", "text", text) for text in ("one", "two", "one")]
    keys = units(documents, "prompt")
    assert (keys[0] == keys[2], keys[0] == keys[1]) == (True, False)
    assert len(set(units(documents, "row"))) == 3
    grouped = [Conversation((), None, "a:1", group=group) for group in ("x", "x", None, None)]
    assert len(set(units(grouped, "author"))) == 3


# Copies


def test_copies_are_dropped_before_any_row_is_held_out(load: Load, write: Write) -> None:
    rows = [row for row in DISTINCT[:20] for _ in range(2)]
    data, said = load(write("a.jsonl", lines(rows)), eval_fraction=0.2, duplicates="drop")
    assert (len(data.train), len(data.eval)) == (16, 4)
    assert all(int(source.split(":")[1]) % 2 for source in sources([*data.train, *data.eval])), "the first is kept"
    assert data.summary.train.duplicates == 20
    assert said[1].startswith("train: 36 rows -> 16 sequences, 20 duplicates dropped; ")
    assert said[3:] == [
        "20 rows dropped: the same, token for token, as an earlier one (a.jsonl:2, a.jsonl:4, a.jsonl:6, …)"
    ]


def test_only_the_very_same_is_a_copy(load: Load, write: Write) -> None:
    def chat(weight: float) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": weight}]}

    train = write("a.jsonl", lines([chat(1.0), chat(0.5), chat(1.0)]))
    data, _ = load(train, eval_fraction=0, duplicates="drop")
    assert sources(data.train) == ["a.jsonl:1", "a.jsonl:2"], "the same tokens with another weight are no copy"
    rows = [pair("q", "a"), pair("q", "a "), pair("Q", "a")]
    assert len(load(write("b.jsonl", lines(rows)), eval_fraction=0, duplicates="drop")[0].train) == 3


def test_prompts_with_other_answers_in_both_files(load: Load, write: Write) -> None:
    other = write("b.jsonl", lines([DISTINCT[0], pair("question 1", "another"), pair("new", "x")]))
    data, said = load(write("a.jsonl", lines(DISTINCT)), eval=other)
    assert (data.summary.duplicates_across, data.summary.prompts_across) == (1, 1)
    assert said[-2:] == [
        "warning: 1 of 3 eval sequences are in train too, so validation is that much too kind",
        "warning: 1 of 3 eval rows have a prompt that is in train too, with another answer",
    ]


# Weights of sources


def test_sources_by_their_weights(load: Load, write: Write) -> None:
    three = {"a": 2.0, "b": 0.5, "c": 1.5, "d": 1.0}
    named = [
        {"path": write(f"{name}.jsonl", lines([pair(f"{name} {n}", "x") for n in range(10)])), "weight": weight}
        for name, weight in three.items()
    ]
    data, said = load(named, eval_fraction=0)
    seen = Counter(sources(data.train))
    each = {name: sorted(count for source, count in seen.items() if source.startswith(name)) for name in three}
    assert each == {"a": [2] * 10, "b": [1] * 5, "c": [1] * 5 + [2] * 5, "d": [1] * 10}
    again, _ = load(named, eval_fraction=0)
    assert sources(again.train) == sources(data.train)
    other, _ = load(named, seed=1, eval_fraction=0)
    assert sources(other.train) != sources(data.train)
    objects = {id(example) for example in data.train}
    assert len(objects) == 35, "a row that is seen twice is the same object"
    assert len(data.train_conversations) == 35
    assert (data.summary.train.rows, data.summary.train.sequences) == (40, 50)
    assert f"{named[0]['path']} has the weight 2: an epoch sees 20 rows, from 10" in said
    assert f"{named[1]['path']} has the weight 0.5: an epoch sees 5 rows, from 10" in said
    assert [line for line in said[:4] if ": read as prompt_completion: prompt -> completion, 10 rows" in line] == said[
        :4
    ]


def test_held_out_rows_count_once_and_are_not_repeated(load: Load, write: Write) -> None:
    named = [{"path": write("a.jsonl", lines(DISTINCT)), "weight": 3}]
    data, _ = load(named, eval_fraction=0.1)
    alone, _ = load(named[0]["path"], eval_fraction=0.1)
    assert sources(data.eval) == sources(alone.eval)
    assert Counter(sources(data.train)) == dict.fromkeys(sources(alone.train), 3)
    config = DataConfig(train=named)
    evaluated = config.reading(config.train)
    assert [source.weight for source in evaluated.sources(evaluated.train)] == [1.0], "scored once each"


def test_a_share_of_few_rows_is_one_at_least() -> None:
    assert times(1, 0.01, 0, 0).tolist() == [1]
    assert times(0, 0.5, 0, 0).tolist() == []
    assert sorted(times(4, 2.25, 0, 0).tolist()) == [2, 2, 2, 3]
    assert not np.array_equal(times(100, 0.5, 0, 0), times(100, 0.5, 0, 1)), "each source has a draw of its own"


def test_rows_of_sources_and_of_all(load: Load, write: Write) -> None:
    named = [
        {"path": write(f"{name}.jsonl", lines(DISTINCT)), "max_rows": most} for name, most in (("a", 3), ("b", None))
    ]
    data, _ = load(named, eval_fraction=0, max_rows=8, duplicates="keep")
    assert sources(data.train) == [f"a.jsonl:{n}" for n in (1, 2, 3)] + [f"b.jsonl:{n}" for n in range(1, 6)]
