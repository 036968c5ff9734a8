"""What constraints let through: any walk through what they allow ends in what was asked for; what they cannot hold is
refused by name, at once."""

import json
import random
import re
import sys
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from data.family_tokenizers import build_tokenizer, sentencepiece_tokenizer
from topwork.common.errors import RequestError
from topwork.data.chat.calls import HERMES, CallFormat
from topwork.generation import grammar
from topwork.generation.grammar import Grammar, Grammars, check_json
from topwork.generation.requests import Constraint
from topwork.generation.sampling import Row, Sampling, choose
from topwork.generation.text import TextStream

MORE = 13
"""Columns of the logits that are no token."""


@cache
def tokenizer(kind: str = "bytes") -> Any:
    if kind == "sentencepiece":
        return sentencepiece_tokenizer()
    made = build_tokenizer("qwen3")
    made.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    return made


@cache
def grammars(kind: str = "bytes") -> Grammars:
    return Grammars(tokenizer(kind), len(tokenizer(kind)) + MORE)


def ends(kind: str = "bytes") -> set[int]:
    """The tokenizer's own and another."""
    return {tokenizer(kind).eos_token_id, 1}


def allowed(constraint: Constraint) -> list[int]:
    bits = constraint.allowed()
    assert bits is not None
    assert bits.dtype == np.int32
    flags = np.unpackbits(bits.view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(flags)]


def walk(constraint: Grammar, seed: int, kind: str = "bytes", most: int = 2000) -> str:
    """Any of the allowed tokens, again and again, rather closing what is open once it has become long."""
    stream, shown, rng = TextStream(tokenizer(kind), shown=tokenizer(kind).all_special_ids), "", random.Random(seed)
    for number in range(most):
        if constraint.complete:
            break
        tokens = allowed(constraint)
        assert tokens, constraint.error
        assert max(tokens) < len(tokenizer(kind))
        closing = [token for token in tokens if tokenizer(kind).convert_ids_to_tokens(token) in ('"', "}", "]")]
        token = rng.choice(closing if closing and number > 60 else tokens)
        if token in ends(kind):
            break
        constraint.accept(token)
        shown += stream.add(token)
    else:
        raise AssertionError(f"no end: {shown[:200]}")
    return shown + stream.finish()


SCHEMAS: list[Any] = [
    True,
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", None, 1.5]}}, "required": ["b"],
     "additionalProperties": False},
    {"type": "array", "items": {"type": "number", "minimum": 2, "maximum": 3}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^[a-c]+-[0-9]{2}$"},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "format": "date"},
    {"$defs": {"tree": {"type": "object", "properties": {"of": {"type": "array", "maxItems": 1, "items": {
        "$ref": "#/$defs/tree"}}}, "additionalProperties": False}}, "$ref": "#/$defs/tree"},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": kind}, kind: {"type": "boolean"}},
                "required": ["kind", kind], "additionalProperties": False} for kind in ("p", "q")]},
    {"const": {"<|im_end|>": ["[TOOL_CALLS]", "\x07é日"]}},
    {"anyOf": [{"type": "null"}, {"type": "object", "minProperties": 1, "maxProperties": 2,
               "additionalProperties": {"type": "integer", "multipleOf": 5}}]},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_any_walk_is_json_by_the_schema(number: int, kind: str) -> None:
    for seed in range(4):
        text = walk(grammars(kind).json_schema(SCHEMAS[number], ends(kind)), seed, kind)
        jsonschema.validate(json.loads(text), SCHEMAS[number])
        assert check_json(text, SCHEMAS[number]) is None


def test_any_walk_is_an_object_a_match_or_a_choice() -> None:
    for seed in range(5):
        assert isinstance(json.loads(walk(grammars().json_object(ends()), seed)), dict)
        assert re.fullmatch(r"[0-9]{3}-(ab|é/)+", walk(grammars().regex("[0-9]{3}-(ab|é/)+", ends()), seed))
        options = ["yes", "yes, but", 'no "never"\n', "<|im_end|>", "naïve 日本"]
        assert walk(grammars().choice(options, ends()), seed) in options
    found = {walk(grammars().choice(["yes", "yes, but", "no"], ends()), seed) for seed in range(40)}
    assert found == {"yes", "yes, but", "no"}


def test_stop_tokens_may_come_when_it_is_complete_and_not_before() -> None:
    constraint = grammars().regex("ab*", ends())
    assert not set(allowed(constraint)) & ends()
    constraint.accept(tokenizer().convert_tokens_to_ids("a"))
    assert set(allowed(constraint)) == ends() | {tokenizer().convert_tokens_to_ids("b")}
    assert not constraint.complete
    constraint.accept(1)  # a stop token changes nothing
    assert set(allowed(constraint)) > ends()
    constraint = grammars().regex("a", ends())
    constraint.accept(tokenizer().convert_tokens_to_ids("a"))
    assert constraint.complete
    assert set(allowed(constraint)) == ends()
    assert grammars().regex("", ends()).complete
    assert not grammars().json_object(()).complete
    # a text that is spelled like a stop token is a text
    spelled = grammars().choice(["<|im_end|>"], ends())
    assert not set(allowed(spelled)) & ends()


def test_a_token_that_is_not_allowed_is_refused() -> None:
    constraint = grammars().json_object(ends())
    with pytest.raises(ValueError, match="token 70 is not one of those that the constraint allows"):
        constraint.accept(70)
    assert constraint.error is not None
    assert allowed(constraint) == []


def test_choices_obey() -> None:
    """Under any logits, drawn hot."""
    schema = SCHEMAS[1]
    logits = torch.randn(400, len(tokenizer()) + MORE, generator=torch.Generator().manual_seed(0)) * 10
    constraint, said = grammars().json_schema(schema, ends()), []
    for step in range(400):
        row = Row(Sampling(temperature=2.0, seed=3), step, (), said, constraint.allowed())
        [token] = choose(logits[step : step + 1], [row]).tokens
        if token in ends():
            break
        said.append(token)
        constraint.accept(token)
        if constraint.complete:
            break
    jsonschema.validate(json.loads(tokenizer().decode(said)), schema)


REFUSED: list[tuple[Any, str]] = [
    ({"not": {"type": "string"}}, "the schema's not cannot be held"),
    (
        {"properties": {"a": {"type": "array", "contains": {}, "uniqueItems": True}}},
        "contains, uniqueItems cannot be held",
    ),
    ({"if": {}, "then": {}}, "if, then cannot be held"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "the schema's not cannot be held"),
    ({"type": "string", "format": "uri-template"}, "Unknown format: uri-template"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "(a)\\1"}, "backreferences are not supported"),
    ({"type": 12}, "type must be a string"),
    ({"$ref": "http://example.com/x"}, "does not fetch resources"),
    ({"$ref": "#/$defs/gone"}, "does not exist"),
    ({"$ref": "#"}, "nothing obeys it"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater than maximum (2)"),
    (False, "nothing obeys"),
    ([1], "the schema is of type list"),
    ({"enum": ["\ud800"]}, "half a surrogate pair"),
    ({"const": float("nan")}, "not JSON compliant"),
    ({"const": 10**5000}, "the schema is no JSON"),
    ({"const": object()}, "not JSON serializable"),
    ({"description": "x" * 70_000}, "larger than 65536 bytes"),
]


@pytest.mark.parametrize(("schema", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_a_schema_that_cannot_be_held_is_refused(schema: Any, told: str) -> None:
    with pytest.raises(RequestError) as refused:
        grammars().json_schema(schema, ends())
    assert told in str(refused.value)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


def nested(depth: int, keyword: str | None = None) -> Any:
    """Objects in objects, or a keyword of twice the same, and so on."""
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {keyword: [schema, schema]} if keyword else {"type": "object", "properties": {"a": schema}}
    return schema


def test_bombs_are_refused() -> None:
    """Deep, wide, exponential."""
    for schema in (nested(100), nested(sys.getrecursionlimit() * 3), nested(15, "anyOf"), nested(14, "allOf")):
        with pytest.raises(RequestError, match=r"recursion limit|too deep|too large|larger than"):
            grammars().json_schema(schema, ends())
    for pattern in ("(", "a" * 70_000, "\udc00"):
        with pytest.raises(RequestError):
            grammars().regex(pattern, ends())
    for options in ([], ["a", ""], ["a", "\ud800"], ["x" * 70_000]):
        with pytest.raises(RequestError):
            grammars().choice(options, ends())


def test_a_form_that_grows_beyond_its_limits_allows_nothing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "LEXER_STATES", 40)
    constraint = Grammars(tokenizer(), len(tokenizer())).regex("(a|b)*a(a|b){12}", ends())
    for letter in "abbabaab" * 9:
        if constraint.error is not None:
            break
        if tokens := set(allowed(constraint)) & {tokenizer().convert_tokens_to_ids(letter)}:
            constraint.accept(tokens.pop())
    assert constraint.error is not None
    assert allowed(constraint) == []
    assert not constraint.complete


def test_white_space_is_free_but_ends() -> None:
    constraint, spaces = grammars().json_object(ends()), 0
    for token in tokenizer()('{\n  "a" :')["input_ids"]:
        constraint.accept(token)
    space = tokenizer().convert_tokens_to_ids("Ġ")
    while space in allowed(constraint):
        constraint.accept(space)
        spaces += 1
    assert spaces == 64


def test_the_tokenizer_is_read_once_and_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Grammars(tokenizer(), len(tokenizer()))
    first = made.json_object(ends())
    from llguidance import hf

    monkeypatch.setattr(hf, "from_tokenizer", None)
    monkeypatch.setattr(Grammars, "_compile", None)
    second = made.json_object({2})
    first.accept(tokenizer().convert_tokens_to_ids("{"))
    assert allowed(second) != allowed(first)  # each is one answer's
    assert made.json_schema({"type": "object"}, ends()).allowed() is not None


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'topwork\[serve\]'"):
        Grammars(tokenizer(), len(tokenizer())).json_object(ends())


CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/name"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"name": {"enum": ["Bern", "Ulm"]}}}  # fmt: skip
NONE = {"type": "object", "properties": {}, "additionalProperties": False}
MISTRAL = CallFormat("[TOOL_CALLS] ", '{"name": "', '", "arguments": ', "}", "", ", ", listed=True)
LLAMA = CallFormat("", '{"name": "', '", "parameters": ', "}", "", None)


def names(text: str) -> list[str]:
    return re.findall(r'"name": "(\w+)"', text)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
def test_required_calls(form: CallFormat, several: bool) -> None:
    """The format's own text around a known name and arguments by its schema, whose references stay its own."""
    key = '"(arguments|parameters)": '
    city, now = rf'city_of", {key}\{{\s*"city"\s*:\s*"(Bern|Ulm)"\s*\}}', rf'now", {key}\{{\s*\}}'
    one = rf'\{{"name": "({city}|{now})\}}'
    marked = rf"<tool_call>\n{one}\n</tool_call>"
    whole = {"{": one, "[": rf"\[TOOL_CALLS\] \[{one}(, {one})*\]", "<": rf"{marked}(\n{marked})*"}[
        (form.opens + "{")[0]
    ]
    counts = set()
    for seed in range(8):
        constraint = grammars().calls(form, {"city_of": CITY, "now": NONE}, ends(), several, free=False)
        text = walk(constraint, seed).split("<|im_end|>")[0]
        assert re.fullmatch(whole, text), text
        counts.add(len(names(text)))
    assert (len(counts) > 1) == (several and form.between is not None)
    if form is MISTRAL:  # the mark is its token, and no other may spell it
        first = grammars().calls(form, {"now": NONE}, ends(), several, free=False)
        assert allowed(first) == [tokenizer().convert_tokens_to_ids("[TOOL_CALLS]")]


@pytest.mark.parametrize("form", [HERMES, MISTRAL], ids=["hermes", "mistral"])
def test_free_answers_whose_calls_are_held(form: CallFormat) -> None:
    constraint = grammars().calls(form, {"now": NONE}, ends(), False, free=True)
    assert ends() <= set(allowed(constraint))  # saying nothing is free as well
    mark = form.opens.rstrip()
    given = tokenizer()("Hello! See" + mark)["input_ids"]
    for token in given:
        assert token in allowed(constraint)
        constraint.accept(token)
    rest = ""
    for _ in range(200):
        if ends() & set(allowed(constraint)):
            break
        token = allowed(constraint)[0]
        constraint.accept(token)
        rest += tokenizer().decode([token])
    assert names(rest) == ["now"]
    for token in tokenizer()(" there")["input_ids"]:
        constraint.accept(token)
    assert ends() <= set(allowed(constraint))


CHECKED: list[tuple[str, Any, str | None]] = [
    ('{"a": 1}', {"properties": {"a": {"type": "integer"}}}, None),
    ('{"a": "x"}', {"properties": {"a": {"type": "integer"}}}, r"at \$.a: 'x' is not of type 'integer'"),
    ("{", True, "it is no JSON"),
    ('{"a": NaN}', True, "NaN is no number of JSON"),
    ("[" * 100_000, True, "nested too deep|no JSON"),
    ("9" * 5000, True, "it is no JSON"),
    ('"' + "a" * 40 + '!"', {"pattern": "^(a+)+$"}, None),  # the grammar's to hold: it would take Python for ever
    ("1", {"$ref": "http://example.com/x"}, "the schema cannot be read"),
    ("1", {"type": 12}, "the schema cannot be read"),
    ("1", {"oneOf": [{"type": "integer"}, {"minimum": 0}]}, "valid under each of"),
    ("[1, 2]", {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{}, {"type": "null"}]}, "type 'null'"),
    ('{"b": 1}', {"additionalProperties": False}, "Additional properties are not allowed"),
    ('{"' + "a" * 40 + '!": 1}', {"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}, None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "schema", "told"), CHECKED)
def test_finished_json_is_checked(text: str, schema: Any, told: str | None) -> None:
    found = check_json(text, schema)
    if told is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(told, found)
        assert len(found) <= grammar._LONGEST


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema's address is no reason to go there."""
    import urllib.request

    asked: list[Any] = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *given, **_: asked.append(given))
    told = check_json("1", {"allOf": [{"$ref": "http://example.com/schema.json"}]})
    assert told is not None
    assert "cannot be read" in told
    assert asked == []
