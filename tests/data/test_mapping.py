"""Templates over columns, and paths into them."""

from typing import Any

import pytest
from meaning import load, read, turns

from topwork.common.errors import DataError
from topwork.common.yaml_text import in_yaml
from topwork.data.meaning.mapping import value_of
from topwork.data.meaning.values import RowProblem

ROW = {
    "Body": "Bo has 3 hens.", "Question": "How many?", "Answer": 3.0, "n": 7, "a b": "spaced", "none": None,
    "blank": " ",
    "answers": {"text": ["x", "y"], "at": [1]}, "dotted.name": "d", "listed": [{"deep": ["z"]}],
    "written": '{"inner": {"k": "v"}}',
}  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ("{Body} {Question}", "Bo has 3 hens. How many?"),
        ("{Answer}", 3.0),  # one place alone is the value itself
        ("= {Answer}", "= 3.0"),
        ("{n}/{n}", "7/7"),
        ("{a b}!", "spaced!"),
        ("{answers.text[0]} {answers.text[1]}", "x y"),
        ("answers.text[1]", "y"),
        ("answers.text", ["x", "y"]),
        ("listed[0].deep[0]", "z"),
        ("written.inner.k", "v"),
        ("dotted.name", "d"),
        ("{dotted.name}.", "d."),
        ('{{"q": "{Question}"}}', '{"q": "How many?"}'),
        ("{Question}\n\n{none?}", "How many?"),
        ("{blank?}\n\n{Question}", "How many?"),
        ("{Body} ({none?}) {n}", "Bo has 3 hens. () 7"),
        ("{answers.text[5]?}", None),
        ("nowhere", None),
    ],
)
def test_values(spec: str, value: Any) -> None:
    assert value_of(ROW, spec) == value


@pytest.mark.parametrize("spec", ["{Body} {none}", "{Body} {blank}", "{Body} {answers.text[2]}", "{Body} {n.x}"])
def test_a_place_without_a_value_is_named(spec: str) -> None:
    named = spec.split("{")[-1][:-1]
    with pytest.raises(RowProblem, match=rf"{named.replace('[', chr(92) + '[')} has no value; write .*\?"):
        value_of(ROW, spec)


@pytest.mark.parametrize("spec", ["{Body", "Body}", "{}", "{ }", "{a{b}"])
def test_braces_that_do_not_pair_are_refused(spec: str) -> None:
    with pytest.raises(DataError, match=r"data\.columns has the template .* \{\{ and \}\} are braces"):
        value_of(ROW, spec)


def test_templates_make_the_fields_of_every_format() -> None:
    svamp = {"Body": "Bo has 3 hens.", "Question": "How many?", "Answer": 3.0, "ID": "c-1"}
    format, (row,) = load(svamp, columns={"prompt": "{Body} {Question}", "completion": "{Answer}"})
    assert turns(row) == [("user", "Bo has 3 hens. How many?"), ("assistant", "3.0")]
    assert format.sentence == "read as prompt_completion: {Body} {Question} -> {Answer}, 1 row; not read: ID"
    page = {"title": "T", "body": "B", "url": "u"}
    assert read(page, columns={"text": "{title}\n{body}"})[0].text == "T\nB"
    own = {"instruction": "{task}: {n}", "output": "{out}", "system": "You are {who}."}
    (row,) = read({"task": "Add", "n": 2, "out": "ok", "who": "Bo"}, columns=own)
    assert turns(row) == [("system", "You are Bo."), ("user", "Add: 2"), ("assistant", "ok")]


def test_messages_inside_of_an_object_are_a_path() -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for value in (
        {"turns": talk},
        '{"turns": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
    ):
        (row,) = read({"conversation": value}, columns={"messages": "conversation.turns"})
        assert turns(row) == [("user", "q"), ("assistant", "a")]


def test_a_misspelt_column_in_a_template_is_named() -> None:
    with pytest.raises(DataError, match=r"maps prompt to the column 'Bdy', which .* did you mean 'Body'"):
        read({"Body": "b", "Answer": "a"}, columns={"prompt": "{Bdy}!", "completion": "Answer"})


def test_rows_without_a_value_are_bad_rows() -> None:
    rows = [{"b": "1", "q": "x", "a": "y"}, {"q": "x", "a": "y"}]
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used:\n  a.jsonl:2: b has no value; write \{b\?\}"):
        read(*rows, columns={"prompt": "{b} {q}", "completion": "a"})
    second = read(*rows, columns={"prompt": "{b?} {q}", "completion": "a"})[1]
    assert turns(second)[0] == ("user", "x")


def test_white_space_around_a_column_does_not_matter() -> None:
    row = {"prompt": "hi", " completion": "hello"}
    for columns in (
        {},
        {"prompt": "prompt", "completion": "completion"},
        {"prompt": "{prompt}", "completion": "{completion}"},
    ):
        assert turns(read(row, columns=columns)[0]) == [("user", "hi"), ("assistant", "hello")]


def test_what_is_told_may_be_pasted() -> None:
    import yaml

    given = {"prompt": "{a}\n{b?}", "completion": " no", "text": "yes", "x": 'say "hi": {y}', "plain": "plain-name_1"}
    assert yaml.safe_load(in_yaml(given)) == given


def test_the_first_of_a_list_is_the_one_value_of_rows_that_have_one() -> None:
    rows = (
        {"prompt": "q", "completion": "a"},
        {"prompt": "r", "completion": ["b", "c"]},
        {"prompt": "s", "completion": 3},
    )
    with pytest.raises(DataError, match=r"choose one with data\.columns: \{completion: \"\{completion\[0\]\}\"\}"):
        read(*rows)
    read_rows = read(*rows, columns={"completion": "{completion[0]}"})
    assert [row.messages[-1].content for row in read_rows] == ["a", "b", "3"]
    with pytest.raises(DataError, match=r"no answer: .* is missing"):
        read(*rows[:1], columns={"completion": "completion[1]"})
