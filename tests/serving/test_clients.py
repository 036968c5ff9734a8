"""The clients that people have work unchanged: openai, LangChain, LiteLLM, against a real server over a tiny base."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serving.live import Live, live
from serving.scripted import BASE
from topwork.models.base import Base
from topwork.serving.keys import new_key

ASKED: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Where is my kettle?"}]
PLACE = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}, "cold": {"type": "boolean"}}}
PLACE |= {"required": ["city", "cold"], "additionalProperties": False}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PLACE}}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
KEYS = {name: new_key() for name in ("all", "narrow", "once")}


@pytest.fixture(scope="module")
def served(base: Base, adapters: Path) -> Iterator[Live]:
    """The base and two adapters; keys of which one may ask once at a time, and one once a minute."""
    own = {"all": {"admin": True}, "narrow": {"concurrent": 1}, "once": {"requests_per_minute": 1}}
    tenants = [{"name": name, "key_sha256": [KEYS[name][1]], **more} for name, more in own.items()]
    with live({
        "model": {"model_name_or_path": base.name, "dtype": "float32", "device": "cpu"}, "served_model_name": BASE,
        "adapters": {name: str(adapters / name) for name in ("one", "two")}, "tenants": tenants,
    }) as found:  # fmt: skip
        yield found


def client(served: Live, key: str = "all", **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key=KEYS[key][0], **more)


def is_place(text: str | None) -> bool:
    place = json.loads(text or "")
    return set(place) == {"city", "cold"} and place["city"] in ("Paris", "Oslo") and isinstance(place["cold"], bool)


def test_openai_lists_the_models(served: Live) -> None:
    with client(served) as asked:
        assert [model.id for model in asked.models.list()] == [BASE, "one", "two"]
        assert asked.models.retrieve("one").id == "one"


@pytest.mark.parametrize("model", [BASE, "one"])
def test_openai_chats_and_streams_the_same(served: Live, model: str) -> None:
    asking: Any = {"model": model, "messages": ASKED, "max_completion_tokens": 12, "temperature": 0.8, "seed": 3}
    with client(served) as asked:
        whole = asked.chat.completions.create(**asking, n=2, logprobs=True, top_logprobs=2)
        chunks = list(asked.chat.completions.create(**asking, stream=True, stream_options={"include_usage": True}))
        [said] = asked.chat.completions.create(**asking).choices
    first, second = whole.choices
    assert whole.model == chunks[0].model == model
    assert first.message.content != second.message.content
    assert first.message.content == said.message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said.message.content
    assert first.logprobs is not None
    assert first.logprobs.content is not None
    assert all(len(token.top_logprobs) == 2 for token in first.logprobs.content)
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == len(first.logprobs.content)
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_openai_completes(served: Live) -> None:
    with client(served) as asked:
        found = asked.completions.create(model="two", prompt=["Once", "Upon"], max_tokens=4, echo=True, temperature=0)
        adapted = asked.completions.create(model="one", prompt="Once", max_tokens=4, echo=True, temperature=0)
        narrowest = asked.completions.create(model="one", prompt="Once", max_tokens=4, echo=True, top_p=0)
    assert [choice.text[:4] for choice in found.choices] == ["Once", "Upon"]
    assert found.usage is not None
    assert found.usage.completion_tokens == 8
    assert adapted.choices[0].text != found.choices[0].text
    assert narrowest.choices[0].text == adapted.choices[0].text


def test_openai_calls_a_tool(served: Live) -> None:
    with client(served) as asked:
        asking: Any = {"model": "one", "messages": ASKED, "tools": [WEATHER], "tool_choice": "required"}
        asking["parallel_tool_calls"] = False  # else this one, being random, calls until it has no room
        [choice] = asked.chat.completions.create(**asking, max_tokens=1000, temperature=0).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls
        [call, *_] = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "weather"
        assert is_place(call.function.arguments)
        answered: Any = [*ASKED, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        after = asked.chat.completions.create(model="one", messages=answered, tools=[WEATHER], max_tokens=4)
        assert after.choices[0].finish_reason == "length"


def test_openai_gets_json_of_a_schema(served: Live) -> None:
    with client(served) as asked:
        found = asked.chat.completions.create(
            model="two", messages=ASKED, response_format=FORMAT, max_tokens=1000, temperature=0
        )
    assert found.choices[0].finish_reason == "stop"
    assert is_place(found.choices[0].message.content)


def test_openai_without_waiting(served: Live) -> None:
    """Sixteen at once, of three models, and one of them as a stream."""

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key=KEYS["all"][0]) as asked:
            asking: Any = {"messages": ASKED, "max_tokens": 6, "temperature": 0}
            names = [(BASE, "one", "two")[number % 3] for number in range(16)]
            done = await asyncio.gather(*(asked.chat.completions.create(model=name, **asking) for name in names))
            told = {name: {d.choices[0].message.content for d in done if d.model == name} for name in names}
            assert all(len(texts) == 1 for texts in told.values())
            stream = await asked.chat.completions.create(model="one", stream=True, **asking)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert {text} == told["one"]

    asyncio.run(ask())


def test_openai_tells_what_was_wrong(served: Live) -> None:
    with client(served, max_retries=0) as asked:
        with pytest.raises(openai.NotFoundError, match="did you mean 'one'") as unknown:
            asked.chat.completions.create(model="onne", messages=ASKED)
        assert unknown.value.code == "model_not_found"
        assert unknown.value.request_id
        with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
            asked.chat.completions.create(model="one", messages=ASKED, temperature=3)
        assert wrong.value.param == "temperature"
        long: Any = [{"role": "user", "content": "word " * 5000}]
        with pytest.raises(openai.BadRequestError, match="context") as too_long:
            asked.chat.completions.create(model="one", messages=long)
        assert too_long.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=f"{served.address}/v1", api_key="sk-wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    with client(served, "once", max_retries=0) as asked:
        asked.chat.completions.create(model="one", messages=ASKED, max_tokens=1)
        with pytest.raises(openai.RateLimitError) as again:
            asked.chat.completions.create(model="one", messages=ASKED, max_tokens=1)
        assert int(again.value.response.headers["retry-after"]) > 1


def test_openai_tries_again_where_it_is_told_to(served: Live) -> None:
    """The second request is refused while the first runs; that ends, and the client, unasked, comes again."""
    refused = threading.Event()

    def seen(response: httpx.Response) -> None:
        if response.status_code == 429:
            first.close()
            refused.set()

    own = httpx.Client(event_hooks={"response": [seen]})
    with client(served, "narrow") as asked, client(served, "narrow", http_client=own) as second:
        endless: Any = {"ignore_eos": True}
        first = asked.chat.completions.create(
            model="one", messages=ASKED, max_tokens=1500, stream=True, extra_body=endless
        )
        next(iter(first))
        found = second.chat.completions.create(model="two", messages=ASKED, max_tokens=2)
        assert refused.is_set()
        assert found.choices[0].message.content is not None


def test_langchain(served: Live) -> None:
    from langchain_core.messages import AIMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    chat: Any = ChatOpenAI(
        base_url=f"{served.address}/v1", api_key=KEYS["all"][0], model="one", temperature=0, max_completion_tokens=1000
    )  # type: ignore[call-arg]
    said = chat.invoke("Where is my kettle?", max_completion_tokens=8)
    assert isinstance(said, AIMessage)
    assert said.usage_metadata is not None
    pieces = list(chat.stream("Where is my kettle?", max_completion_tokens=8))
    assert "".join(piece.content for piece in pieces) == said.content
    called = chat.bind_tools([WEATHER], tool_choice="any").invoke("How is Oslo?")
    assert called.tool_calls[0]["name"] == "weather"
    assert called.tool_calls[0]["args"]["city"] in ("Paris", "Oslo")
    answered = ["How is Oslo?", called, ToolMessage("rain", tool_call_id=called.tool_calls[0]["id"])]
    assert isinstance(chat.invoke(answered, max_completion_tokens=4), AIMessage)
    place = chat.with_structured_output({"title": "place", **PLACE}, method="json_schema").invoke("A place?")
    assert is_place(json.dumps(place))
    with pytest.raises(openai.NotFoundError):
        chat.bind(model="nobody").invoke("Hello?")


def test_litellm(served: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it asks the web for prices as it is imported
    import litellm

    asking: Any = {"model": "hosted_vllm/two", "api_base": f"{served.address}/v1", "api_key": KEYS["all"][0]}
    asking |= {"messages": ASKED, "temperature": 0, "num_retries": 0}
    whole = litellm.completion(**asking, max_tokens=8)
    pieces = [piece.choices[0].delta.content or "" for piece in litellm.completion(**asking, max_tokens=8, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 8
    asking["model"] = "openai/two"  # which leaves schemas as they are
    called = litellm.completion(
        **asking, max_tokens=1000, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    assert is_place(called.choices[0].message.tool_calls[0].function.arguments)
    told = litellm.completion(**asking, max_tokens=1000, response_format=FORMAT)
    assert is_place(told.choices[0].message.content)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**asking, "model": "hosted_vllm/nobody"})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**asking, "api_key": "sk-wrong"})
