"""What a cell means."""

from datetime import date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from topwork.data.meaning.values import RowProblem, is_blank, parsed, text_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is ", "as it is "),
        (3, "3"),
        (0.1, "0.1"),
        (3.0, "3.0"),
        (1e-7, "1e-07"),
        (True, "true"),
        (False, "false"),
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        (np.array(["one"]), "one"),
        (Decimal("1.50"), "1.50"),
        (date(2024, 2, 29), "2024-02-29"),
        (datetime(2024, 2, 29, 7, 5), "2024-02-29T07:05:00"),
        (b"caf\xc3\xa9", "café"),
        ({"temp": 18, "sky": "klar ☀"}, '{"temp": 18, "sky": "klar ☀"}'),
        ({"at": date(2024, 2, 29), "n": np.int64(2)}, '{"at": "2024-02-29", "n": 2}'),
        ([{"name": "Bo", "kind": "dog"}], '[{"name": "Bo", "kind": "dog"}]'),
        ([[1, 2], [3]], "[[1, 2], [3]]"),
        (["alone"], "alone"),
        ([4], "4"),
        ([{"type": "text", "text": "one "}, {"type": "text", "value": "two"}], "one two"),
        ({"type": "text", "text": "one"}, "one"),
    ],
)
def test_a_value_is_its_text(value: Any, text: str) -> None:
    assert text_of(value, "answer") == text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "answer is missing"),
        (float("nan"), "answer is missing"),
        (float("inf"), "answer is inf"),
        ([], "answer is an empty list"),
        (b"\xff\xfe", "bytes that are no UTF-8"),
        (object(), "answer is of type object"),
        ([{"type": "image_url"}], "part of type 'image_url'"),
        ("\ud83d", "half a surrogate pair"),
        ({"x": "\ud83d"}, "half a surrogate pair"),
    ],
)
def test_what_is_no_text_is_said(value: Any, reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        text_of(value, "answer")


@pytest.mark.parametrize("value", [["a", "b"], [1, 2, 3], ["a", "b", "c"], np.array([1, 2])])
def test_several_texts_are_not_glued(value: Any) -> None:
    with pytest.raises(RowProblem, match=r'data\.columns: \{completion: "\{answer\[0\]\}"\}.*"\{answer\[0\]\}, \{ans'):
        text_of(value, "answer", "completion")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('[{"role": "user"}]', [{"role": "user"}]),
        (' {"x": null}', {"x": None}),
        ("[{'role': 'user', 'content': \"it's\"}]", [{"role": "user", "content": "it's"}]),
        ("{'x': None, 'y': True}", {"x": None, "y": True}),
        ("[{'a': 'x} {'}\n {'a': 'y'}]", [{"a": "x} {"}, {"a": "y"}]),  # as NumPy prints an array of objects
        ("{'a': array(['x', 'y'], dtype=object)}", {"a": ["x", "y"]}),
        ("[see below]", "[see below]"),
        ("{name}", "{name}"),
        ("[" * 3000, "[" * 3000),
        ("plain", "plain"),
        (3, 3),
    ],
)
def test_objects_that_were_written_as_text(text: Any, value: Any) -> None:
    assert parsed(text) == value


def test_blanks() -> None:
    assert all(is_blank(value) for value in (None, float("nan"), "", " \n", [], {}))
    assert not any(is_blank(value) for value in (0, False, "0", [None], 0.0))
