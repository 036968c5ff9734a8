"""The OpenAPI document says what the server does."""

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from serving.scripted import BASE, scripted, words
from topwork.models.base import Base
from topwork.serving.openai import UNSUPPORTED, ChatRequest, CompletionRequest
from topwork.serving.reading import ApiError, checked


@pytest.fixture(scope="module")
def document(base: Base) -> dict[str, Any]:
    async def run() -> Any:
        async with scripted(base, lambda _: words(base, "Yes.")) as made:
            return (await made.client.get("/openapi.json")).json()

    return asyncio.run(run())


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert "$defs" not in text
    assert {"Error", "ChatMessage", "Tool"} <= set(document["components"]["schemas"])


def test_every_path_is_there_with_its_faults(document: dict[str, Any]) -> None:
    paths = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}", "/v1/load_lora_adapter"}
    assert paths | {"/v1/unload_lora_adapter", "/health", "/ready", "/version"} <= set(document["paths"])
    for path in document["paths"].values():
        for operation in path.values():
            assert {"4XX", "5XX"} <= set(operation["responses"])
            assert "422" not in operation["responses"]


BODIES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"temperature": 1}, True),
    ({"temperature": "1"}, False),
    ({"n": True}, False),
    ({"n": 2.0, "seed": -3.0, "max_tokens": 5.0, "stop_token_ids": [4.0]}, True),
    ({"n": 2.5}, False),
    ({"stop": ["a"]}, True),
    ({"stop": [1]}, False),
    ({"seed": 2**63}, False),
    ({"logit_bias": {"5": 1.5}}, True),
    ({"logit_bias": {"x": 1.5}}, False),
    ({"response_format": {"type": "json_object"}}, True),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}}, True),
    ({"response_format": {"type": "json_schema"}}, False),
    ({"response_format": {"type": "grammar"}}, False),
    ({"use_beam_search": False}, True),
    ({"use_beam_search": True}, False),
    ({"guided_json": {}}, False),
    ({"made_up": 1}, False),
]
CHATS: list[tuple[dict[str, Any], bool]] = [
    ({"messages": []}, False),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "anything": 1}]}, True),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, False),
    ({"messages": [{"role": "robot", "content": "a"}]}, False),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "required"}, True),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, True),
    ({"tool_choice": "any"}, False),
    ({"top_logprobs": 21}, False),
]


@pytest.mark.parametrize(
    ("kind", "fields", "good"),
    [
        *((kind, *body) for kind in (ChatRequest, CompletionRequest) for body in BODIES),
        *((ChatRequest, *body) for body in CHATS),
        *((CompletionRequest, {"prompt": prompt}, True) for prompt in (["a"], [1], [1, 2.0], [[1.0], [2]])),
        *((CompletionRequest, {"prompt": prompt}, False) for prompt in ([], [[]], [1, "a"], [-1], [1.5], 1, None)),
    ],
)
def test_the_schema_takes_what_the_server_takes(
    document: dict[str, Any], kind: type[Any], fields: dict[str, Any], good: bool
) -> None:
    path = "/v1/chat/completions" if kind is ChatRequest else "/v1/completions"
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    own = {"messages": [{"role": "user", "content": "a"}]} if kind is ChatRequest else {"prompt": "a"}
    body = {"model": BASE, **own, **fields}
    whole = {**schema, "components": document["components"]}
    assert jsonschema.Draft202012Validator(whole).is_valid(body) is good
    try:
        checked(kind, body, UNSUPPORTED)
    except ApiError:
        assert not good
    else:
        assert good
