"""Columns, keys and roles mean the same however they are spelled: CAPITALS, Title Case, white space, a BOM."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from meaning import A, U, load, read, rows_of, turns
from pasting import pasted, printed
from preference_rows import JUDGED, PAIRS, PROMPTS

from data.public_columns import COLUMNS
from data.public_shapes import CHATS
from topwork.common.errors import DataError
from topwork.data.config import DataConfig, SourceConfig
from topwork.data.files.rows import read_rows
from topwork.data.meaning.formats import recognise
from topwork.data.preferences.reading import read_preferences, recognise_preferences

SPELLINGS: dict[str, Callable[[str], str]] = {
    "capitals": str.upper,
    "title": lambda name: name.replace("_", " ").title(),
    "spaces": lambda name: f" {name}\u00a0",
    "bom": lambda name: f"\ufeff{name}",
    "dashes": lambda name: name.replace("_", "-").capitalize(),
}
PUBLIC = {name: shape for name, shape in (CHATS | COLUMNS).items() if shape.read and not shape.words}


def spelled(fields: dict[str, Any], how: str) -> dict[str, Any]:
    return {SPELLINGS[how](name): value for name, value in fields.items()}


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("name", PUBLIC)
def test_public_rows_say_the_same(name: str, how: str) -> None:
    row = PUBLIC[name].row
    before, after = load(row), load(spelled(row, how))
    assert [(each.messages, each.tools, each.text) for each in after[1]] == [
        (each.messages, each.tools, each.text) for each in before[1]
    ]
    assert after[0].name == before[0].name


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("name", [*PAIRS, *JUDGED, *PROMPTS])
def test_pairs_labels_and_prompts_say_the_same(name: str, how: str) -> None:
    kind, fields = ("prompts", PROMPTS[name][0]) if name in PROMPTS else (None, {**PAIRS, **JUDGED}[name])
    found = []
    for given in (fields, spelled(fields, how)):
        rows, config = rows_of(given), DataConfig(train="a.jsonl")
        good, bad = read_preferences(rows, recognise_preferences(rows, config, kind), config)  # type: ignore[arg-type]
        assert not bad
        found.append([_said(one) for one in good])
    assert found[0] == found[1]


def _said(unit: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(unit).items() if name != "columns"}


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "nectar"])
def test_under_sft_a_pair_is_refused_all_the_same(name: str) -> None:
    for how in SPELLINGS:
        with pytest.raises(DataError, match="preference data"):
            recognise(rows_of(spelled(PAIRS[name], how)), DataConfig(train="a"))


CSVS = {
    "Question,Answer\nWhy?,Because.\n": "Why?",
    "INSTRUCTION;OUTPUT\nWhy?;Because.\n": "Why?",
    '" prompt "," completion "\nWhy?,Because.\n': "Why?",
    "User Message\tAssistant Message\nWhy?\tBecause.\n": "Why?",
    "\ufeff\ufeffPrompt,Completion\nWhy?,Because.\n": "Why?",
    "Instruction,Input,Output\nWhy?,It is.,Because.\n": "Why?\n\nIt is.",
}


@pytest.mark.parametrize("text", CSVS)
def test_headers_of_spreadsheets(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text, "utf-8")
    rows = read_rows(SourceConfig(path=str(tmp_path / "a.csv"))).rows
    (row,) = read(*[each.fields for each in rows])
    assert turns(row) == [("user", CSVS[text]), ("assistant", "Because.")]


def test_parquet_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"Messages": [[U, A]], "Id": [1]}), tmp_path / "a.parquet")
    rows = read_rows(SourceConfig(path=str(tmp_path / "a.parquet"))).rows
    assert turns(read(*[each.fields for each in rows])[0]) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "talk",
    [
        [{"Role": "User", "Content": "q"}, {"Role": "Assistant", "Content": "a"}],
        [{"From": "HUMAN", "Value": "q"}, {"From": "GPT", "Value": "a"}],
        [{"role": " user ", "content": "q"}, {"role": "ASSISTANT", "Content": "a"}],
        [{"User": "q", "Assistant": "a"}],
    ],
)
def test_messages(talk: list[dict[str, str]]) -> None:
    for value in (talk, json.dumps(talk)):
        assert turns(read({"Conversations": value})[0]) == [("user", "q"), ("assistant", "a")]


def test_names_that_a_recipe_maps() -> None:
    talk = [{"Speaker": "BARD", "Utterance": "q"}, {"Speaker": "Bo Jo", "Utterance": "a"}]
    options = {
        "message_keys": {"speaker": "role", "UTTERANCE": "content"},
        "roles": {"Bard": "user", "bo_jo": A["role"]},
    }
    assert turns(read({"talk": talk}, columns={"messages": "TALK"}, **options)[0]) == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    row = {"Body Text": "b", "Question": "q", "Answer": {"Text": ["x", "y"]}, "who": "w"}
    for columns in (
        {"prompt": "{body_text} {QUESTION}", "completion": "answer.Text[1]"},
        {"prompt": "{Body Text} {question}", "completion": "{ANSWER.Text[1]}", "system": "WHO"},
    ):
        format, (said,) = load(row, columns=columns)
        assert turns(said)[-2:] == [("user", "b q"), ("assistant", "y")]
        assert ("who" in format.sentence.partition("; not read")[0]) == ("system" in columns)
    format, _ = load({"ASK": "q", "REPLY": "a"}, columns={"prompt": "ask", "completion": "Reply"})
    assert format.sentence == "read as prompt_completion: ASK -> REPLY, 1 row"


def test_a_list_in_a_column_whose_name_has_dots_can_be_chosen_from() -> None:
    row = {"meta.q": "q", "meta.answers": ["x", "y"]}
    columns = {"prompt": "meta.q", "completion": "meta.answers[1]"}
    assert turns(read(row, columns=columns)[0]) == [("user", "q"), ("assistant", "y")]


TWINS = {"Question": "q", "QUESTION": "r", "answer": "a"}


def test_two_that_differ_in_capital_letters_alone_are_refused() -> None:
    with pytest.raises(DataError, match=r"'Question' and 'QUESTION' have one name but for capital letters") as refused:
        load(TWINS)
    ways = printed(str(refused.value))
    assert [turns(load(TWINS, **pasted([way]))[1][0])[0] for way in ways] == [("user", "q"), ("user", "r")]
    with pytest.raises(DataError, match=r"maps prompt to the column 'question', which may be 'Question' or 'QUESTION'"):
        load(TWINS, columns={"prompt": "question"})
    rows = rows_of({"prompt": "p", "Chosen": "a", "CHOSEN": "b", "rejected": "c"})
    with pytest.raises(DataError, match="'Chosen' and 'CHOSEN'"):
        recognise_preferences(rows, DataConfig(train="a"))
    with pytest.raises(DataError, match="'Answer' and 'ANSWER'"):
        load({"question": "q", "Answer": "a", "ANSWER": "b"})


def test_the_one_that_is_written_as_the_field_is_wins() -> None:
    for row in (
        {"prompt": "s", "Prompt": None, "completion": "a"},
        {"prompt": "s", "completion": "a", "Completion": 1},
    ):
        assert turns(read(row)[0]) == [("user", "s"), ("assistant", "a")]
    assert load({"Question": "q", "QUESTION": None, "Answer": "a"})[0].columns["prompt"] == "Question"


def test_rows_of_one_file_may_spell_it_in_several_ways() -> None:
    said = read({"question": "q", "answer": "a"}, {"Question": "r", "answer": "b"}, {"QUESTION": "s", "Answer": "c"})
    assert [turns(row) for row in said] == [[("user", q), ("assistant", a)] for q, a in ("qa", "rb", "sc")]
