"""What errors advise is followed, to the letter, and the rows load."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis.strategies import text
from meaning import A, U, load, read, turns
from pasting import pasted, printed

import topwork
from topwork.common.errors import DataError
from topwork.common.yaml_text import in_yaml, quoted
from topwork.data.config import DataConfig
from topwork.data.parts import read_parts
from topwork.recipe.recipe import Recipe, all_keys, load_recipe

PASSAGE = "The mill of Brask was opened in 1830 by a miller of whom nobody knows more than that he was called"


def rows(**columns: Any) -> list[dict[str, Any]]:
    """Three rows; an N in a text or in a list of texts is the row's number."""

    def filled(value: Any, number: int) -> Any:
        if isinstance(value, str):
            return value.replace("N", str(number))
        if isinstance(value, list):
            return [filled(item, number) for item in value]
        return {key: filled(item, number) for key, item in value.items()} if isinstance(value, dict) else value

    return [{name: filled(value, number) for name, value in columns.items()} for number in range(3)]


def advised(error: str) -> Iterator[dict[str, Any]]:
    """Each advice as the options that it is: `data.A: … and data.B: …` are one."""
    one = r"data\.(\w+): (\{(?:[^{}\"]|\"(?:[^\"\\]|\\.)*\")*\}|text)"
    for found in re.finditer(rf"{one}(?: and {one})*", error):
        yield pasted(printed(found[0]))


SHAPES: dict[str, tuple[list[dict[str, Any]], str]] = {
    # name: (rows, the prompt's and the answer's text where the first advice is followed)
    "squad": (
        rows(
            id="5N",
            title="Brask",
            context=f"{PASSAGE} N",
            question="When N?",
            answers={"text": ["N"], "answer_start": [2]},
        ),
        f"When 1?\n\n{PASSAGE} 1 -> 1",
    ),
    "mmlu": (rows(question="qN?", subject="x", choices=["a", "b", "c"], answer=2), "q1?\n\na\nb\nc -> 2"),
    "arc": (
        rows(id="N", question="qN?", choices={"text": ["dog", "cat"], "label": ["A", "B"]}, answerKey="A"),
        "q1?\n\ndog\ncat -> A",
    ),
    "svamp": (
        rows(ID="c-N", Body="There are N hens.", Question="How many?", Equation="1+1", Answer=2.0),
        "How many?\n\nThere are 1 hens. -> 2.0",
    ),
    "numina": (rows(source="amc", problem="1+N", solution="Add N.", answer="N"), "1+1 -> 1"),
    "e2e": (rows(mr="name[N]", ref="The N is here."), "name[1] -> The 1 is here."),
    "advice seekers": (rows(Context="I am sad N", Response="Do not be N"), "I am sad 1 -> Do not be 1"),
    "summaries": (rows(article=f"{PASSAGE} N", highlights="A mill, N", id="N"), f"{PASSAGE} 1 -> A mill, 1"),
    "nli": (rows(premise="A N.", hypothesis="B N.", label=1), "A 1.\n\nB 1. -> 1"),
    "calls": (
        rows(id="N", query="rain N?", answers='[{"name": "rain", "arguments": {}}]', tools='[{"name": "rain"}]'),
        "rain 1? -> ",
    ),
    "roles": (rows(messages=[{"role": "client", "content": "N"}, {"role": "bard", "content": "a"}]), "1 -> a"),
    "keys": (rows(dialog=[{"who": "user", "says": "N"}, {"who": "assistant", "says": "an answer"}]), "1 -> an answer"),
    "keys and roles": (
        rows(talk=[{"speaker": "Ann", "utterance": "N"}, {"speaker": "Bo", "utterance": "a"}]),
        "1 -> a",
    ),
    "two materials": (rows(question="qN", context="c", passage="p", answer="a"), "q1\n\nc\n\np -> a"),
    "documents": (rows(question="qN", documents=["dN", "e"], answer="a"), "q1\n\nd1\ne -> a"),
    "a passage under any name": (
        rows(question="who N?", wiki=f"{PASSAGE} KarlN", answer="KarlN"),
        f"who 1?\n\n{PASSAGE} Karl1 -> Karl1",
    ),
    "labels": (rows(text="tN", label=1), "t1 -> 1"),
    "names with spaces": (rows(**{"My Question": "qN", "The Answer": "aN", "id": 1}), "q1 -> a1"),
    "a list of answers": (rows(question="qN", answer=["aN", "b"]), "q1 -> a1"),
    "a misspelt name": (rows(instuction="qN", output="a"), "q1 -> a"),
    "two languages": (rows(translation={"en": "hi N", "de": "hallo N"}), "hi 1 -> hallo 1"),
    "choices by letter": (rows(question="qN?", options={"A": "x", "B": "y"}, answer="A"), "q1?\n\nx\n\ny -> A"),
    "two sentences": (rows(sentence1="a N", sentence2="b N", label=0), "a 1\n\nb 1 -> 0"),
    "requests": (rows(custom_id="N", body={"model": "x", "messages": [{**U, "content": "N"}, A]}), "1 -> a"),
    "passages": (
        rows(query="qN", passages={"is_selected": [1, 0], "passage_text": ["pN", "r"]}, answers=["aN"], query_id=1),
        "q1\n\np1\nr -> a1",
    ),
    "flan": (rows(inputs="qN", targets="aN", task="x"), "q1 -> a1"),
    "an unknown mark": (rows(messages=[{**U, "content": "N"}, {**A, "loss_flag": True}]), "1 -> a"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_advice_that_is_followed_loads(name: str) -> None:
    fields, expected = SHAPES[name]
    with pytest.raises(DataError) as caught:
        load(*fields)
    ways = list(advised(str(caught.value)))
    assert ways, caught.value
    loaded = [read(*fields, **way)[1] for way in ways]
    assert f"{loaded[0].messages[-2].content} -> {loaded[0].messages[-1].content}" == expected


def test_orca_is_read_and_no_mapping_of_ids_is_advised() -> None:
    fields = rows(id="x.N", system_prompt="Be brief.", question="N + 1?", response="N")
    format, read_rows = load(*fields)
    assert turns(read_rows[1]) == [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "1")]
    assert format.sentence.endswith("question -> response, with system_prompt, 3 rows; not read: id")


def test_no_example_where_none_is_sure() -> None:
    with pytest.raises(DataError) as caught:
        load(*rows(alpha="q N", beta="a N", gamma="x N"))
    assert list(advised(str(caught.value))) == []
    assert "columns alpha, beta, gamma" in str(caught.value)
    assert "prompt_completion: prompt, completion, input" in str(caught.value)


def test_a_label_that_cannot_be_an_answer_is_not_advised() -> None:
    fields = rows(text="tN", labels=["a", "b"])
    with pytest.raises(DataError, match=r"leave labels unlearned\. Set data\.format: text") as caught:
        load(*fields)
    assert list(advised(str(caught.value))) == [{"format": "text"}]
    assert read(*fields, format="text")[0].text == "t0"


@pytest.mark.parametrize(
    "extra",
    [
        {"context_id": "cN"},
        {"url": "https://brask.example/N"},
        {"explanation": f"{PASSAGE} KarlN"},
        {"text": "Below is a question.\n\n### who N?\n\nKarlN"},
        {"full_prompt": "Answer: who N?"},
        {"input_length": 3},
        {"document": None},
        {"meta": {"lang": "en"}},
    ],
)
def test_harmless_columns_are_told_alone(extra: dict[str, Any]) -> None:
    format, read_rows = load(*rows(question="who N?", answer="KarlN", **extra))
    assert turns(read_rows[1]) == [("user", "who 1?"), ("assistant", "Karl1")]
    told = [] if extra == {"document": None} else [f"; not read: {next(iter(extra))}"]
    assert format.sentence == "read as prompt_completion: question -> answer, 3 rows" + "".join(told)


def test_naming_question_and_answer_leaves_the_rest_out() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    format, read_rows = load(*rows(question="qN", documents=["d", "e"], answer="a"), columns=columns)
    assert turns(read_rows[1]) == [("user", "q1"), ("assistant", "a")]
    assert format.sentence.endswith("; not read: documents")


def test_the_passage_is_missed_where_it_comes_late() -> None:
    fields = [*rows(question="qN", answer="a") * 20, *rows(question="qN", evidence="e", answer="a")]
    with pytest.raises(
        DataError, match=r'evidence looks like .* data\.columns: \{prompt: question, .*"\{evidence\?\}"\}|in'
    ) as caught:
        load(*fields)
    way = next(advised(str(caught.value)))
    assert turns(read(*fields, **way)[62])[0] == ("user", "q2\n\ne")
    assert turns(read(*fields, **way)[0])[0] == ("user", "q0")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("images", ["a.png"]),
        ("image", "https://brask.example/N.png"),
        ("videos", ["a.mp4"]),
        ("audio", {"path": "a.wav"}),
    ],
)
def test_answers_are_not_learned_without_their_pictures(column: str, value: Any) -> None:
    for row in ({"messages": [{**U, "content": "<image>N?"}, A]}, {"question": "N?", "answer": "a"}):
        fields = rows(**row, **{column: value})
        with pytest.raises(DataError, match=f"the column {column} holds what the questions are about") as caught:
            load(*fields)
        (way,) = advised(str(caught.value))
        assert turns(read(*fields, **way)[1])[1] == ("assistant", "a")
    assert len(read(*rows(question="N?", answer="a", **{column: None}))) == 3


@pytest.mark.parametrize(
    ("column", "value"), [("answers", ["N", "b"]), ("an, answer: #1", ["N", "b"]), ("meta.answers", ["N", "b"])]
)
def test_choosing_from_a_list_keeps_what_the_recipe_names_already(column: str, value: Any) -> None:
    fields = rows(**{"the ask": "qN", column: value, "who": "w"})
    mapped = {"prompt": "the ask", "completion": column, "system": "who"}
    for spec in (column, f"{{{column}}}"):
        with pytest.raises(DataError, match="joined they would be one that nobody wrote") as caught:
            load(*fields, columns={**mapped, "completion": spec})
        way = next(advised(str(caught.value)))
        assert turns(read(*fields, **way)[1]) == [("system", "w"), ("user", "q1"), ("assistant", "1")]


def test_a_key_and_a_role_beside_those_that_are_named_already() -> None:
    talk = [{"who": "client", "content": "N", "my-flag: loss": 1}, {"who": "bard", "content": "a"}]
    named = {"message_keys": {"who": "role"}, "roles": {"client": "user"}}
    with pytest.raises(DataError, match="sounds as if it said whether") as caught:
        load(*rows(messages=talk), **named | {"roles": {"client": "user", "bard": "assistant"}})
    way = next(advised(str(caught.value)))
    assert way == {"message_keys": {"who": "role", "my-flag: loss": "train"}}
    with pytest.raises(DataError, match="unknown role 'bard'") as caught:
        load(*rows(messages=talk), **named | way)
    more = next(advised(str(caught.value)))
    assert turns(read(*rows(messages=talk), **way | more)[1]) == [("user", "1"), ("assistant", "a")]


def test_material_is_added_to_what_the_recipe_names_already() -> None:
    fields = rows(ask="qN", evidence="c", answer="a", persona="w")
    with pytest.raises(DataError, match="evidence looks like a part") as caught:
        load(*fields, columns={"prompt": "ask", "system": "persona"})
    for way, asked in zip(advised(str(caught.value)), ("q1\n\nc", "q1")):
        assert turns(read(*fields, **way)[1]) == [("system", "w"), ("user", asked), ("assistant", "a")]


@given(text())
def test_whatever_a_column_is_called_may_be_pasted(name: str) -> None:
    assert yaml.safe_load(quoted(name)) == name
    assert pasted([f"data.columns: {in_yaml({'prompt': name})}"]) == {"columns": {"prompt": name}}


def test_one_of_several_sources_is_given_its_own(tmp_path: Path) -> None:
    for name, row in (("b, c.jsonl", {"mr": "q", "ref": "a"}), ("a.jsonl", {"prompt": "p", "completion": "c"})):
        (tmp_path / name).write_text(json.dumps(row) + "\n", "utf-8")
    own = str(tmp_path / "b, c.jsonl")
    with pytest.raises(DataError, match="give this one its own") as caught:
        read_parts(config := DataConfig(train=[str(tmp_path / "a.jsonl"), own]), config.train)
    source = re.search(r"its own: (\{path.*\})", str(caught.value))
    assert source is not None
    config = DataConfig(train=[str(tmp_path / "a.jsonl"), yaml.safe_load(source[1])])
    assert [part.format.columns for part in read_parts(config, config.train)] == [
        {"prompt": "prompt", "completion": "completion"},
        {"prompt": "mr", "completion": "ref"},
    ]


# What any message of the package says to set

_OPTION = re.compile(r"\b([a-z]+(?:\.[a-z_0-9]+)+): ([a-z_0-9]+|\{|\"|⟨)")
_BESIDE = {"adapter.init_lora_weights": ("quantization.load_in_4bit=true",)}


def said_in_the_package() -> Iterator[tuple[str, str, str]]:
    """(where, key, value) of each `section.key: value` in a text of the sources; ⟨ begins what a message fills in."""
    for path in sorted(Path(topwork.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "⟨" for part in parts]
            for key, value in _OPTION.findall("".join(part for part in texts if isinstance(part, str))):
                if key.partition(".")[0] in Recipe.model_fields:
                    yield path.name, key, value


_PROSE = ("below", "expected")  # a sentence about the option, and no value of it


def test_every_option_that_a_message_names_is_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {model_name_or_path: a/b}\ndata: {train: a.jsonl}\n", "utf-8")
    said = set(said_in_the_package())
    assert len(said) > 50
    for where, key, value in sorted(said):
        assert key in all_keys(), f"{where}: {key}"
        if value[0] not in '{"⟨' and value not in _PROSE:
            load_recipe(tmp_path / "recipe.yaml", [*_BESIDE.get(key, ()), f"{key}: {value}"])
