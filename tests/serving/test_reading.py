"""Bodies: what a JSON reader would die of, and what is said of a field that is wrong."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topwork.serving.errors import LONGEST, ApiError
from topwork.serving.openai import UNSUPPORTED, ChatRequest, CompletionRequest
from topwork.serving.reading import checked, parsed

TRAPS = {
    "deep": b'{"a":' * 100_000,
    "deep lists": b'{"a":' + b"[" * 100_000,
    "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": Infinity}',
    "-infinity": b'{"temperature": -Infinity}',
    "a float that overflows": b'{"temperature": 1e999}',
    "one of many digits": b'{"temperature": ' + b"9" * 400 + b".0}",
    "one deep inside": b'{"metadata": {"a": [1, {"b": -1e400}]}}',
    "5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "the other half": b'{"prompt": "a\\udc00b"}',
    "raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "nothing": b"",
    "a list": b"[1]",
    "a number": b"1",
    "null": b"null",
    "more behind it": b'{"a": 1} x',
    "cut off": b'{"a": "',
    "a zero byte": b'{"a": "\x00"}',
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_is_no_sane_json_object_is_a_400(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(TRAPS[name])
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"
    assert len(json.dumps(caught.value.body())) < 2 * LONGEST


def test_large_numbers_that_are_floats_pass() -> None:
    assert parsed(b'{"a": 1e300, "b": 123456789012345678901234567890, "c": "1e999"}')["a"] == 1e300


PLAIN = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_what_json_writes_is_read_again(value: Any) -> None:
    assert parsed(json.dumps({"a": value}).encode()) == {"a": value}


def wrong(kind: type[Any], **fields: Any) -> ApiError:
    body = {
        "model": "m",
        **({"messages": [{"role": "user", "content": "a"}]} if kind is ChatRequest else {"prompt": "a"}),
    }
    with pytest.raises(ApiError) as caught:
        checked(kind, {**body, **fields}, UNSUPPORTED)
    assert caught.value.status == 400
    return caught.value


def test_an_image_is_said_not_to_be_taken() -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    told = wrong(ChatRequest, messages=[{"role": "user", "content": [part]}]).message
    assert told == "messages[0].content[0] is of type 'image_url'; this server takes text, refusal"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}, {"role": "robot", "content": "a"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 200}}, "logit_bias.5"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"stream": 1}, "stream"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ],
)
def test_the_field_that_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    assert wrong(ChatRequest, **fields).param == param


@pytest.mark.parametrize(
    ("prompt", "param"),
    [([1, 2, "a"], "prompt[2]"), ([[1], []], "prompt[1]"), ({}, "prompt"), ([], "prompt"), (None, "prompt")],
)
def test_the_kind_of_prompt_that_fits_furthest_is_explained(prompt: Any, param: str) -> None:
    assert wrong(CompletionRequest, prompt=prompt).param == param


def test_an_unknown_field_is_told_with_the_nearest_and_null_is_nothing() -> None:
    error = wrong(ChatRequest, temprature=1)
    assert (error.param, error.code) == ("temprature", "unknown_parameter")
    assert "'temperature'" in error.message
    assert checked(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "a"}], "temprature": None})


@pytest.mark.parametrize("field", [name for name in UNSUPPORTED if name in ChatRequest.model_fields])
def test_what_would_change_the_answer_and_is_not_supported_says_what_to_do(field: str) -> None:
    error = wrong(ChatRequest, **{field: ["wanted"]})
    assert error.param is not None
    assert error.param.startswith(field)
    assert UNSUPPORTED[field] in error.message


def test_clients_may_say_what_changes_nothing() -> None:
    """OpenAI's, LangChain's, LiteLLM's, Continue's, Open WebUI's, vLLM's; null is as good as nothing."""
    body = {
        "model": "m", "messages": [{"role": "user", "content": "a", "name": "b", "weight": 1}], "store": False,
        "metadata": {"a": "b"}, "service_tier": "auto", "user": "u", "prediction": {"type": "content", "content": "x"},
        "prompt_cache_key": "k", "verbosity": "low", "reasoning_effort": "low", "parallel_tool_calls": True,
        "length_penalty": 1.0, "use_beam_search": False, "skip_special_tokens": True, "guided_json": None,
        "logprobs": None, "top_logprobs": None, "stop": None, "functions": None, "audio": None,
    }  # fmt: skip
    assert checked(ChatRequest, body, UNSUPPORTED).messages[0].content == "a"


def test_assistants_messages_may_come_back_as_openais_client_dumps_them() -> None:
    said = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }  # fmt: skip
    body = {"model": "m", "messages": [said, {"role": "tool", "tool_call_id": "c", "content": "1"}]}
    assert checked(ChatRequest, body).messages[0].content is None


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a", 1] * 200_000},
        {"prompt": [[1], "a"] * 100_000},
        {"logit_bias": {str(i): "a" for i in range(100_000)}},
        {f"unknown{i}": i for i in range(100_000)},
        {"x" * 1_000_000: 1},
        {"model": "y" * 1_000_000},
        {"user": "y" * 1_000_000},
        {"stop": ["z" * 1000] * 100_000},
    ],
)
def test_an_error_is_short_whatever_was_sent(body: dict[str, Any]) -> None:
    error = wrong(CompletionRequest, **body)
    assert len(json.dumps(error.body())) < 2 * LONGEST
