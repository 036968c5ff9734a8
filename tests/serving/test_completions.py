"""`/v1/completions` over a script: what streams and what does not are the same, and what is counted is what came."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from serving.scripted import BASE, scripted, words
from topwork.generation.requests import Request
from topwork.models.base import Base

SAID = "Hello! See you soon. Yes. No."


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def asked(
    base: Base, body: dict[str, Any], said: str | Sequence[int] = SAID
) -> tuple[Any, list[dict[str, Any]], list[Request]]:
    """The answer whole, and in chunks; what the engine was asked the first time."""

    async def run() -> tuple[Any, list[dict[str, Any]], list[Request]]:
        tokens = words(base, said) if isinstance(said, str) else said
        async with scripted(base, lambda _: tokens) as made:
            given = {"model": BASE, "prompt": "Hi", "max_tokens": 50, **body}
            whole = await made.client.post("/v1/completions", json=given)
            assert whole.status_code == 200, whole.text
            asked = list(made.engine.requests)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            return whole.json(), events(await made.client.post("/v1/completions", json=given | options)), asked

    return asyncio.run(run())


def put_together(chunks: list[dict[str, Any]], count: int = 1) -> tuple[list[dict[str, Any]], Any]:
    """The choices that chunks make, and their usage."""
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    choices: list[dict[str, Any]] = [{"index": i, "text": "", "finish_reason": None} for i in range(count)]
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        for part in chunk["choices"]:
            assert choices[part["index"]]["finish_reason"] is None
            choices[part["index"]]["text"] += part["text"]
            choices[part["index"]]["finish_reason"] = part["finish_reason"]
    assert chunks[-1]["choices"] == []
    return choices, chunks[-1]["usage"]


@pytest.mark.parametrize(
    ("body", "text", "reason", "count"),
    [
        ({}, SAID, "stop", None),
        ({"max_tokens": 3}, None, "length", 3),
        ({"stop": "soon"}, "Hello! See you ", "stop", None),
        ({"stop": ["zzz", "you so"]}, "Hello! See ", "stop", None),
        ({"stop": "lo! S", "include_stop_str_in_output": True}, "Hello! S", "stop", None),
        ({"stop": "No.x"}, SAID, "stop", None),
        ({"echo": True}, "Hi" + SAID, "stop", None),
        ({"n": 3}, SAID, "stop", None),
    ],
)
def test_what_streams_is_what_comes_whole(
    base: Base, body: Any, text: str | None, reason: str, count: int | None
) -> None:
    whole, chunks, requests = asked(base, body)
    choices, usage = put_together(chunks, body.get("n", 1))
    for one, other in zip(whole["choices"], choices, strict=True):
        assert {key: one[key] for key in other} == other
        assert one["finish_reason"] == reason
        assert text is None or one["text"] == text
    assert usage == whole["usage"]
    assert usage["prompt_tokens"] == len(words(base, "Hi"))
    if count is not None:
        assert usage["completion_tokens"] == count
    elif "stop" not in body:
        assert usage["completion_tokens"] == len(words(base, SAID)) * len(choices)
    assert [list(request.prompt) for request in requests] == [words(base, "Hi")] * len(choices)


@pytest.mark.parametrize("stop", ["o! Se", "€", "é", "ou", "a€"])
def test_a_stop_string_is_found_however_tokens_cut_it(base: Base, stop: str) -> None:
    """Each byte a token of its own: half characters and beginnings of stop strings are held back in every chunk."""
    said = "Hello! See a€ you é then"
    letters = [token for byte in said.encode() for token in base.tokenizer.convert_tokens_to_ids([_byte(byte)])]
    whole, chunks, _ = asked(base, {"stop": stop}, letters)
    before = said[: said.find(stop)]
    assert whole["choices"][0]["text"] == before
    shown = ""
    for chunk in chunks[:-1]:
        shown += chunk["choices"][0]["text"]
        assert before.startswith(shown)
    assert (
        whole["usage"]["completion_tokens"] == len((before + stop).encode()) == chunks[-1]["usage"]["completion_tokens"]
    )


def _byte(value: int) -> str:
    from topwork.generation.text import _byte_letters

    return next(letter for letter, byte in _byte_letters().items() if byte == value)


def test_prompts_of_all_kinds(base: Base) -> None:
    tokens = words(base, "Hi there")
    for prompt, prompts in (
        ("Hi there", [tokens]),
        (tokens, [tokens]),
        (["Hi there", "Hi there"], [tokens] * 2),
        ([tokens, [7]], [tokens, [7]]),
    ):
        whole, _, requests = asked(base, {"prompt": prompt, "n": 2, "max_tokens": 2})
        assert [list(request.prompt) for request in requests] == [p for p in prompts for _ in range(2)]
        assert [choice["index"] for choice in whole["choices"]] == list(range(2 * len(prompts)))
        assert whole["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_choices_draw_by_seeds_of_their_own_and_the_first_by_the_requests(base: Base) -> None:
    _, _, three = asked(base, {"n": 3, "seed": -5})
    _, _, one = asked(base, {"n": 1, "seed": -5})
    _, _, other = asked(base, {"n": 3, "seed": -6})
    seeds = [request.sampling.seed for request in three]
    assert len(set(seeds)) == 3
    assert seeds[0] == one[0].sampling.seed
    assert not set(seeds) & {request.sampling.seed for request in other}
    _, _, free = asked(base, {"n": 2})
    _, _, again = asked(base, {"n": 2})
    assert len({request.sampling.seed for request in free + again}) == 4


def test_how_to_draw_reaches_the_engine(base: Base) -> None:
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.3,
        "frequency_penalty": -0.2, "logit_bias": {"5": 2, "3": -100}, "min_tokens": 2, "logprobs": 3, "max_tokens": 9,
        "stop_token_ids": [11], "cache_salt": "s",
    }  # fmt: skip
    _, _, (request,) = asked(base, given)
    sampling = request.sampling
    renamed = ("logit_bias", "min_tokens", "max_tokens", "stop_token_ids", "cache_salt")
    same = [name for name in given if name not in renamed]
    assert {name: getattr(sampling, name) for name in same} == {name: given[name] for name in same}
    assert (sampling.bias, sampling.min_new_tokens, sampling.max_new_tokens) == (((3, -100.0), (5, 2.0)), 2, 9)
    assert request.stop_ids == {11, base.tokenizer.eos_token_id}
    assert request.salt.endswith("/s")
    _, _, (request,) = asked(base, {"stop_token_ids": [11], "ignore_eos": True})
    assert request.stop_ids == {11}
    _, _, (request,) = asked(base, {"top_k": -1, "max_tokens": None})
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (1.0, 1.0, 0)
    assert request.sampling.max_new_tokens == 16


def test_logprobs_and_token_ids_are_the_same_streamed_and_whole(base: Base) -> None:
    whole, chunks, _ = asked(base, {"logprobs": 2, "return_token_ids": True})
    tokens = words(base, SAID)
    (choice,) = whole["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == SAID == choice["text"]
    assert logprobs["token_logprobs"] == [-0.5] * len(tokens)
    assert all(text in likeliest for text, likeliest in zip(logprobs["tokens"], logprobs["top_logprobs"]))
    assert [SAID[at:].startswith(text) for text, at in zip(logprobs["tokens"], logprobs["text_offset"])]
    assert choice["token_ids"] == tokens
    assert choice["prompt_token_ids"] == words(base, "Hi")
    told = [part for chunk in chunks for part in chunk["choices"]]
    for key in logprobs:
        assert [one for part in told if part["logprobs"] for one in part["logprobs"][key]] == logprobs[key]
    assert [token for part in told for token in part["token_ids"]] == tokens


def test_usage_comes_only_where_it_is_asked_for(base: Base) -> None:
    async def run() -> None:
        async with scripted(base, lambda _: words(base, SAID)) as made:
            for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
                body = {"model": BASE, "prompt": "Hi", "stream": True, **options}
                chunks = events(await made.client.post("/v1/completions", json=body))
                assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)

    asyncio.run(run())
