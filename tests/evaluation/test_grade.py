"""Grades: exact text, and JSON compared as JSON."""

import json

import pytest

from topwork.evaluation.grade import Grade, grade, pick_grader, summarise

REFERENCE = '{"intent": "refund", "order": 4711, "urgent": true, "note": null}'


@pytest.mark.parametrize(
    ("answer", "reference", "exact"),
    [
        ("refund", "refund", True),
        (" refund\n", "refund", True),
        ("refund", "\trefund ", True),
        ("Refund", "refund", False),
        ("a  b", "a b", False),
        ("", "refund", False),
    ],
)
def test_exact_match(answer: str, reference: str, exact: bool) -> None:
    assert grade(answer, reference, "exact_match") == Grade(exact)


@pytest.mark.parametrize(
    "answer",
    [
        REFERENCE,
        f"\n  {REFERENCE}  ",
        '{"urgent": true, "note": null, "order": 4711, "intent": "refund"}',
        '{"intent":"refund","order":4711,"urgent":true,"note":null}',
        json.dumps(json.loads(REFERENCE), indent=2),
        REFERENCE.replace("refund", "\\u0072efund"),
    ],
)
def test_json_that_says_the_same(answer: str) -> None:
    assert grade(answer, REFERENCE, "json") == Grade(True, True, dict.fromkeys(json.loads(REFERENCE), True))


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (REFERENCE.replace("4711", "4712"), {"order"}),
        (REFERENCE.replace("4711", '"4711"'), {"order"}),
        (REFERENCE.replace("true", "1"), {"urgent"}),
        (REFERENCE.replace("true", '"true"'), {"urgent"}),
        (REFERENCE.replace("null", "false"), {"note"}),
        (REFERENCE.replace(', "note": null', ""), {"note"}),
        (REFERENCE.replace("refund", "Refund"), {"intent"}),
        ("{}", {"intent", "order", "urgent", "note"}),
    ],
)
def test_json_that_is_partly_right(answer: str, wrong: set[str]) -> None:
    graded = grade(answer, REFERENCE, "json")
    assert (graded.exact, graded.valid) == (False, True)
    assert {name for name, right in graded.fields.items() if not right} == wrong


def test_a_key_too_many_is_not_exact() -> None:
    graded = grade(REFERENCE.replace("}", ', "extra": 1}'), REFERENCE, "json")
    assert not graded.exact
    assert all(graded.fields.values())


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "refund",
        REFERENCE[:-1],
        REFERENCE + " Anything else?",
        f"```json\n{REFERENCE}\n```",
        "[1, 2]",
        '"text"',
        "null",
        REFERENCE.replace("4711", "NaN"),
        REFERENCE.replace("4711", "-Infinity"),
        REFERENCE.replace('"order": 4711', '"intent": "refund", "order": 4711'),
        '{"a": {"b": 1, "b": 1}}',
        "[" * 100_000,
    ],
)
def test_what_is_no_json_object(answer: str) -> None:
    graded = grade(answer, REFERENCE, "json")
    assert graded == Grade(False, False, dict.fromkeys(json.loads(REFERENCE), False))


def test_nested_values_are_compared_as_json() -> None:
    reference = '{"a": {"x": 1, "y": [1, 2]}, "b": [true]}'
    assert grade('{"b": [true], "a": {"y": [1, 2], "x": 1}}', reference, "json").exact
    assert grade('{"b": [1], "a": {"y": [2, 1], "x": 1}}', reference, "json").fields == {"a": False, "b": False}


def test_json_is_graded_where_every_reference_is_an_object() -> None:
    assert pick_grader([REFERENCE, "{}"]) == "json"
    assert pick_grader([REFERENCE, "refund"]) == "exact_match"
    assert pick_grader(["[1]", "2"]) == "exact_match"
    assert pick_grader([]) == "exact_match"


def test_a_summary_counts_each_field_among_the_rows_that_have_it() -> None:
    grades = [
        grade('{"a": 1, "b": 2}', '{"a": 1, "b": 2}', "json"),
        grade('{"a": 1, "b": 9}', '{"a": 1, "b": 2}', "json"),
        grade("no", '{"a": 1}', "json"),
        grade('{"a": 1, "c": 3}', '{"c": 3}', "json"),
    ]
    assert summarise(grades, "json") == {
        "exact_match": 0.25, "json_valid": 0.75, "fields": {"a": 2 / 3, "b": 0.5, "c": 1.0},
    }  # fmt: skip
    assert summarise([Grade(True), Grade(False)], "exact_match") == {"exact_match": 0.5}
