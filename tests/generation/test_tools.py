"""Tools through templates and back: what a model is told, what it is held to, and what it says, however it is cut."""

import json
import re
from typing import Any

import pytest

from data import tool_templates
from data.calls_cases import ASKED, CALLED, TOOLS
from data.family_tokenizers import build_tokenizer
from topwork.common.errors import RequestError
from topwork.data.chat.calls import call_format
from topwork.data.chat.template import ChatTemplate, stop_ids
from topwork.data.conversations import Message
from topwork.generation.calls import Said, together
from topwork.generation.grammar import Grammar, Grammars
from topwork.generation.text import TextStream
from topwork.generation.tools import ToolChoice, ToolUse, read_choice, read_specs

SPECS = read_specs(TOOLS)
# What a request may ask for


def test_tools_are_read() -> None:
    assert [spec.name for spec in SPECS] == ["get_weather", "now"]
    assert SPECS[0].as_openai() == TOOLS[0]
    assert read_specs(None) == read_specs([]) == ()
    [bare] = read_specs([{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}])
    assert bare.strict
    assert bare.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    [loose] = read_specs([{"function": {"name": "f", "parameters": {"properties": {}}}}])
    assert loose.parameters["type"] == "object"


def function(**values: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", **values}}]


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ("x", "tools is of type str; give a list"),
        ([1], "tool 1 is no {type: function"),
        ([{"type": "retrieval"}], "tool 1 is no {type: function"),
        (function() * 2, "two tools are called 'f'"),
        (function(name="a b"), "tool 1 is called 'a b'; a name is 1 to 64"),
        (function(name="x" * 65), "a name is 1 to 64"),
        (function(name="\ud800"), "tool 1 is called '\\ud800'; a name is 1 to 64"),
        (function(name=None), "tool 1 is called None"),
        (function(name='f", "x'), "a name is 1 to 64"),
        (function(description=1), "the description of the tool f is of type int"),
        (function(parameters=[]), "no schema of an object"),
        (function(parameters={"type": "string"}), "no schema of an object"),
        (function(description="\ud800"), "cannot be written as JSON"),
        (function(parameters={"a": float("nan")}), "cannot be written as JSON"),
        (function(parameters={"a": 10**5000}), "cannot be written as JSON"),
    ],
)
def test_tools_that_are_none_are_refused(tools: Any, told: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_specs(tools)
    assert told in str(refused.value)
    assert str(refused.value).encode()
    assert len(str(refused.value)) < 400


def test_the_choice_is_read() -> None:
    assert read_choice(None, SPECS) == read_choice("auto", SPECS) == ToolChoice("auto")
    assert read_choice(None, ()) == read_choice("auto", ()) == read_choice("none", SPECS) == ToolChoice("none")
    assert read_choice("required", SPECS) == ToolChoice("required")
    named = {"type": "function", "function": {"name": "now"}}
    assert read_choice(named, SPECS) == ToolChoice("named", "now")
    for choice, told in (
        ("any", "tool_choice is 'any'; give none, auto, required"),
        ({"type": "function"}, "give none, auto, required"),
        ([], "give none, auto, required"),
        ({"function": {"name": "get_wether"}}, "none of the tools; did you mean 'get_weather'"),
        ({"function": {"name": "\ud800" * 9000}}, "none of the tools"),
    ):
        with pytest.raises(RequestError) as refused:
            read_choice(choice, SPECS)
        assert told in str(refused.value)
        assert len(str(refused.value).encode()) < 300
    with pytest.raises(RequestError, match="'required', and there are no tools"):
        read_choice("required", ())


# What the model is told

KNOWING = [
    ("qwen3", None),
    ("smollm2", "chatml"),
    ("llama3", tool_templates.LLAMA),
    ("mistral_v3", tool_templates.MISTRAL),
]
IGNORANT = [("smollm2", None), ("gemma", None), ("mistral", None), ("phi3", None), ("qwen3", tool_templates.XML)]


def template(family: str, jinja: str | None) -> ChatTemplate:
    return ChatTemplate(build_tokenizer(family), jinja)


def prompted(known: ChatTemplate, messages: list[Message], choice: ToolChoice | None = None, **values: Any) -> str:
    return str(known.tokenizer.decode(ToolUse(known, SPECS, choice).prompt_ids(messages, **values)))


@pytest.mark.parametrize(("family", "jinja"), KNOWING + IGNORANT)
def test_every_model_is_told_of_tools_calls_and_results(family: str, jinja: str | None) -> None:
    known = template(family, jinja)
    told = prompted(known, [ASKED])
    assert '"city"' in told
    assert "The weather of a city." in told
    assert ("</tool_call>" in told) == ((family, jinja) in IGNORANT or family in ("qwen3", "smollm2"))
    told = prompted(known, CALLED)
    assert re.search(r'"name": "get_weather", "(arguments|parameters)": \{"city": "Bern"\}', told)
    assert "sun" in told.rsplit("Bern", 1)[1]
    # the history is told even where nothing may be called now, and a system message of one's own as well
    none = prompted(
        known, [Message("system", "Be brief."), *CALLED] if known.takes_system else CALLED, ToolChoice("none")
    )
    assert "Bern" in none
    assert "The weather of a city." not in none
    if known.takes_system:
        both = prompted(known, [Message("system", "Be brief."), ASKED])
        assert "Be brief." in both
        assert "The weather of a city." in both


def test_a_template_that_knows_tools_is_left_alone() -> None:
    known = template("qwen3", None)
    assert ToolUse(known, SPECS).prompt_ids(CALLED) == known.prompt_ids(CALLED, TOOLS)
    assert ToolUse(known).prompt_ids([ASKED]) == known.prompt_ids([ASKED])
    off = {"enable_thinking": False}
    assert ToolUse(known, SPECS).prompt_ids(CALLED, off) == known.prompt_ids(CALLED, TOOLS, off)
    started = [ASKED, Message("assistant", "Yes")]
    assert prompted(known, started, continue_final=True).endswith("Yes")
    ignorant = template("smollm2", None)
    assert ToolUse(ignorant, ()).prompt_ids([ASKED]) == ignorant.prompt_ids([ASKED])
    assert prompted(ignorant, started, continue_final=True).endswith("Yes")


# All of it together


def spoken(use: ToolUse, constraint: Grammar, ends: set[int], seed: int) -> Said:
    """What a model that takes any of the allowed tokens says."""
    import random

    import numpy as np

    tokenizer = use.template.tokenizer
    rng, stream, parser, deltas = random.Random(seed), TextStream(tokenizer, shown=use.shown), use.parser(), []
    for _ in range(3000):
        if constraint.complete:
            break
        token = int(rng.choice(np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little"))))
        if token in ends:
            break
        constraint.accept(token)
        deltas += parser.add(stream.add(token))
    return together(deltas + parser.add(stream.finish()) + parser.finish())


@pytest.mark.parametrize(("family", "jinja"), KNOWING + IGNORANT)
def test_any_model_calls_what_it_must(family: str, jinja: str | None) -> None:
    known = template(family, jinja)
    if family == "mistral_v3":
        known.tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
        known = ChatTemplate(known.tokenizer, jinja)
    grammars, ends = Grammars(known.tokenizer, len(known.tokenizer)), stop_ids(known)
    for seed in range(3):
        for choice, parallel in ((ToolChoice("named", "get_weather"), True), (ToolChoice("required"), False)):
            use = ToolUse(known, SPECS, choice, parallel)
            constraint = use.constraint(grammars, ends)
            assert constraint is not None
            said = spoken(use, constraint, ends, seed)
            [call] = said.calls
            assert said.text == ""
            assert choice.mode == "required" or call.name == "get_weather"
            if call.name == "get_weather":
                arguments = json.loads(call.arguments)
                assert isinstance(arguments["city"], str)
                assert set(arguments) <= {"city", "days"}
        use = ToolUse(known, SPECS, ToolChoice("required"))
        constraint = use.constraint(grammars, ends)
        assert constraint is not None
        many = spoken(use, constraint, ends, seed)
        assert many.calls
        assert many.text == ""


def test_free_answers_are_held_where_a_tool_is_strict() -> None:
    known = template("qwen3", None)
    grammars, ends = Grammars(known.tokenizer, len(known.tokenizer)), stop_ids(known)
    assert ToolUse(known, SPECS).constraint(grammars, ends) is None
    assert ToolUse(known, SPECS, ToolChoice("none")).constraint(grammars, ends) is None
    assert ToolUse(known).constraint(grammars, ends) is None
    strict = read_specs([{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]])
    constraint = ToolUse(known, strict).constraint(grammars, ends)
    assert constraint is not None
    for token in known.tokenizer('Hello!<tool_call>\n{"name": "get_weather", "arguments": {"')["input_ids"]:
        constraint.accept(token)
    wrong = known.tokenizer("town")["input_ids"][0]
    with pytest.raises(ValueError, match="not one of those"):
        constraint.accept(wrong)
    llama = ToolUse(template("llama3", tool_templates.LLAMA), strict)
    assert llama.constraint(grammars, ends) is None  # nothing marks its calls


def test_what_must_be_shown_is() -> None:
    known = template("mistral_v3", tool_templates.MISTRAL)
    assert ToolUse(known, SPECS).shown == frozenset()
    known.tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    known = ChatTemplate(known.tokenizer, tool_templates.MISTRAL)
    use = ToolUse(known, SPECS)
    assert use.shown == {known.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")}
    stream, parser, deltas = TextStream(known.tokenizer, shown=use.shown), use.parser(), []
    for token in known.tokenizer('[TOOL_CALLS] [{"name": "now", "arguments": {"a": 1}}]')["input_ids"]:
        deltas += parser.add(stream.add(token))
    [call] = together(deltas).calls
    assert (call.name, call.arguments) == ("now", '{"a": 1}')


def test_a_schema_that_cannot_be_held_is_refused_when_a_call_is_required() -> None:
    known = template("smollm2", None)
    specs = read_specs(function(parameters={"properties": {"a": {"not": {}}}}))
    grammars = Grammars(known.tokenizer, len(known.tokenizer))
    with pytest.raises(RequestError, match="the schema's not cannot be held"):
        ToolUse(known, specs, ToolChoice("required")).constraint(grammars, {0})
    assert ToolUse(known, specs).constraint(grammars, {0}) is None
    assert call_format(known.renderer) is None
