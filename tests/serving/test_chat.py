"""`/v1/chat/completions` over a script: text, tool calls, formats; what streams is what comes whole."""

import asyncio
import json
from typing import Any

import pytest

from serving.scripted import BASE, Scripted, scripted, words
from serving.test_completions import events
from serving.test_refusals import check
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Message
from topwork.generation.requests import Request
from topwork.models.base import Base

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi there"}]
SAID = "Hello! See you soon."
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def asked(
    base: Base, body: dict[str, Any], said: str = SAID
) -> tuple[Any, list[dict[str, Any]], list[Request], Scripted]:
    """The answer whole, and in chunks; what the engine was asked the first time."""

    async def run() -> tuple[Any, list[dict[str, Any]], list[Request], Scripted]:
        async with scripted(base, lambda _: words(base, said)) as made:
            given = {"model": BASE, "messages": HI, **body}
            whole = await made.client.post(PATH, json=given)
            assert whole.status_code == 200, whole.text
            requests = list(made.engine.requests)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            return whole.json(), events(await made.client.post(PATH, json=given | options)), requests, made

    return asyncio.run(run())


def put_together(chunks: list[dict[str, Any]], count: int = 1) -> list[dict[str, Any]]:
    """The choices that chunks make, which come in OpenAI's order."""
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    choices: list[dict[str, Any]] = [{"content": None, "calls": {}, "finish_reason": None} for _ in range(count)]
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        (part,) = chunk["choices"]
        choice, delta = choices[part["index"]], part["delta"]
        assert choice["finish_reason"] is None
        if choice["content"] is None:
            assert delta == {"role": "assistant", "content": ""}
            choice["content"] = ""
            continue
        choice["content"] += delta.get("content", "")
        for call in delta.get("tool_calls", []):
            known = choice["calls"].setdefault(call["index"], {"arguments": ""})
            known |= {key: call[key] for key in ("id", "type") if key in call}
            known |= {"name": call["function"]["name"]} if "name" in call["function"] else {}
            known["arguments"] += call["function"].get("arguments", "")
        choice["finish_reason"] = part["finish_reason"]
    assert chunks[-1]["choices"] == []
    return choices


@pytest.mark.parametrize(
    ("body", "text", "reason"),
    [
        ({}, SAID, "stop"),
        ({"n": 3}, SAID, "stop"),
        ({"stop": ["soon"]}, "Hello! See you ", "stop"),
        ({"max_tokens": 2}, None, "length"),
        ({"max_tokens": 50, "max_completion_tokens": 2}, None, "length"),
    ],
)
def test_what_streams_is_what_comes_whole(base: Base, body: dict[str, Any], text: str | None, reason: str) -> None:
    whole, chunks, requests, _ = asked(base, body)
    choices = put_together(chunks, body.get("n", 1))
    assert chunks[-1]["usage"] == whole["usage"]
    for one, other in zip(whole["choices"], choices, strict=True):
        assert one["message"]["role"] == "assistant"
        assert one["message"]["content"] == other["content"]
        assert one["finish_reason"] == other["finish_reason"] == reason
        assert text is None or other["content"] == text
        assert "tool_calls" not in one["message"]
    prompt = ChatTemplate(base.tokenizer).prompt_ids([Message("user", "Hi there")])
    assert all(list(request.prompt) == prompt for request in requests)
    assert whole["usage"]["prompt_tokens"] == len(prompt)
    if reason == "length":
        assert whole["usage"]["completion_tokens"] == 2


def test_a_chats_answer_may_be_as_long_as_the_context(base: Base) -> None:
    _, _, (request,), _ = asked(base, {})
    assert request.sampling.max_new_tokens == base.context_length - len(request.prompt)


def test_messages_of_all_kinds_reach_the_template(base: Base) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    _, _, (one,), _ = asked(base, {"messages": [{"role": "user", "content": parts}]})
    _, _, (other,), _ = asked(base, {})
    assert list(one.prompt) == list(other.prompt)
    whole = [{"role": "developer", "content": "Be brief."}, *HI, {"role": "assistant", "content": "Yes."}, *HI]
    _, _, (request,), _ = asked(base, {"messages": whole})
    said = ["Be brief.", "Hi there", "Yes.", "Hi there"]
    roles = ["system", "user", "assistant", "user"]
    wanted = ChatTemplate(base.tokenizer).prompt_ids([Message(*pair) for pair in zip(roles, said)])
    assert list(request.prompt) == wanted


def test_the_last_message_may_be_gone_on_with(base: Base) -> None:
    begun = [*HI, {"role": "assistant", "content": "Hello"}]
    _, _, (request,), _ = asked(base, {"messages": begun, "continue_final_message": True})
    _, _, (fresh,), _ = asked(base, {})
    assert base.tokenizer.decode(request.prompt) == base.tokenizer.decode(fresh.prompt) + "Hello"


@pytest.mark.parametrize("choice", [None, "auto", "required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called(base: Base, choice: Any) -> None:
    body = {"tools": [WEATHER], "tool_choice": choice}
    whole, chunks, (request,), _ = asked(base, body, CALL)
    ((message, reason),) = [(one["message"], one["finish_reason"]) for one in whole["choices"]]
    (call,) = message["tool_calls"]
    assert message["content"] is None
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Ulm"}
    assert reason == "tool_calls"
    (choice_streamed,) = put_together(chunks)
    streamed = choice_streamed["calls"][0]
    assert (streamed["name"], streamed["arguments"]) == ("weather", call["function"]["arguments"])
    assert streamed["id"] != call["id"]
    assert choice_streamed["finish_reason"] == "tool_calls"
    assert choice_streamed["content"] == ""
    assert "weather" in base.tokenizer.decode(request.prompt)
    free = choice in (None, "auto")
    assert (request.constraint is None) is free


def test_one_call_is_enough_where_no_more_are_wanted_and_the_engine_is_told(base: Base) -> None:
    two = {"tools": [WEATHER], "parallel_tool_calls": True}
    whole, _, _, _ = asked(base, two, f"{CALL}\n{CALL}")
    assert len(whole["choices"][0]["message"]["tool_calls"]) == 2

    whole, chunks, _, _ = asked(base, {**two, "parallel_tool_calls": False}, CALL + "\n" + CALL * 20)
    assert len(whole["choices"][0]["message"]["tool_calls"]) == 1
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert len(put_together(chunks)[0]["calls"]) == 1


def test_tools_are_not_told_of_where_none_may_be_called(base: Base) -> None:
    whole, _, (request,), _ = asked(base, {"tools": [WEATHER], "tool_choice": "none"}, CALL)
    assert "weather" not in base.tokenizer.decode(request.prompt)
    assert whole["choices"][0]["message"]["content"] == CALL


def test_calls_and_their_results_go_back_to_the_model(base: Base) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    said = [*HI, {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}]
    said += [{"role": "tool", "tool_call_id": "c1", "content": "It rains."}]
    _, _, (request,), _ = asked(base, {"messages": said, "tools": [WEATHER]})
    prompt = base.tokenizer.decode(request.prompt)
    assert "Ulm" in prompt
    assert "It rains." in prompt


def test_a_format_is_held(base: Base) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for wanted in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}):
        _, _, requests, _ = asked(base, {"response_format": wanted, "n": 2})
        constraints = [request.constraint for request in requests]
        assert all(constraint is not None for constraint in constraints)
        assert constraints[0] is not constraints[1]
    _, _, (request,), _ = asked(base, {"response_format": {"type": "text"}})
    assert request.constraint is None


def test_logprobs_are_the_same_streamed_and_whole(base: Base) -> None:
    whole, chunks, _, _ = asked(base, {"logprobs": True, "top_logprobs": 2, "return_token_ids": True})
    (choice,) = whole["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == SAID
    assert bytes(byte for entry in content for byte in entry["bytes"]) == SAID.encode()
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in content)
    told = [part for chunk in chunks for part in chunk["choices"]]
    assert [entry for part in told if part["logprobs"] for entry in part["logprobs"]["content"]] == content
    assert choice["token_ids"] == words(base, SAID)
    assert [token for part in told for token in part.get("token_ids", [])] == words(base, SAID)
    assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"]
    plain, chunks, _, _ = asked(base, {})
    assert plain["choices"][0]["logprobs"] is None
    assert all(part["logprobs"] is None for chunk in chunks for part in chunk["choices"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "wether"}}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "response_format"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 10_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 10_000}], "tools": [WEATHER]}, "messages"),
        ({"n": 17}, "n"),
    ],
)  # fmt: skip
def test_what_cannot_be_put_to_the_model_is_a_400(base: Base, fields: dict[str, Any], param: str) -> None:
    async def run() -> None:
        async with scripted(base, lambda _: words(base, SAID)) as made:
            check(await made.client.post(PATH, json={"model": BASE, "messages": HI, **fields}), 400, param)

    asyncio.run(run())


def test_a_model_without_a_chat_template_says_where_to_ask(base: Base) -> None:
    async def run() -> None:
        async with scripted(base, lambda _: words(base, SAID)) as made:
            made.backend.template = ChatTemplate(base.tokenizer)
            error = check(await made.client.post(PATH, json={"model": BASE, "messages": HI}), 400, "messages")
            assert "/v1/completions" in error["message"]

    template, base.tokenizer.chat_template = base.tokenizer.chat_template, None
    try:
        asyncio.run(run())
    finally:
        base.tokenizer.chat_template = template
