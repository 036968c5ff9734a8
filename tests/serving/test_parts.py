"""Tenants, routes, votes and figures in the whole server, whose engine says what a script has."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.scripted import BASE, Scripted, scripted, words
from topwork.generation.requests import Request
from topwork.models.base import Base
from topwork.serving.config import ServeConfig
from topwork.serving.keys import new_key
from topwork.serving.parts import parts_of

KEYS = {name: new_key() for name in ("ann", "bob", "ops")}
TENANTS = [
    {"name": "ann", "key_sha256": KEYS["ann"][1], "models": ["one", "ab"], "concurrent": 1},
    {"name": "bob", "key_sha256": KEYS["bob"][1], "models": ["two", BASE]},
    {"name": "ops", "key_sha256": KEYS["ops"][1], "admin": True},
]
SAID = "Yes. No. See you"
ROUTES = [{"name": "ab", "arms": [{"name": "plain", "model": BASE}, {"name": "tuned", "model": "one"}]}]


def tried(
    base: Base, adapters: Path, work: Callable[[Scripted], Awaitable[None]], **values: Any
) -> None:  # fmt: skip
    """Runs `work` over a server that has two adapters and a route."""
    values = {"adapters": {name: str(adapters / name) for name in ("one", "two")}, "routes": ROUTES, **values}
    config = ServeConfig.model_validate({"model": {"model_name_or_path": BASE}, **values})

    async def run() -> None:
        async with scripted(base, lambda _: words(base, SAID), parts_of(config, [BASE]), **values) as made:
            await work(made)

    asyncio.run(run())


def bearer(name: str | None) -> dict[str, str]:
    return {} if name is None else {"authorization": f"Bearer {KEYS[name][0]}"}


async def ask(made: Scripted, model: str, name: str | None = None, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 30, **more}
    return await made.client.post("/v1/chat/completions", json=body, headers=bearer(name))


async def figures(made: Scripted, name: str | None = None) -> dict[str, dict[str, Any]]:
    told = (await made.client.get("/v1/routes/ab", headers=bearer(name))).json()
    return {arm["name"]: arm for arm in told["arms"]}


@pytest.mark.parametrize("stream", [False, True])
def test_an_arm_answers_is_told_and_is_counted(base: Base, adapters: Path, stream: bool) -> None:
    async def work(made: Scripted) -> None:
        arms = []
        for number in range(12):
            came = await ask(made, "ab", user=f"u{number}", stream=stream)
            assert came.status_code == 200, came.text
            arms.append(came.headers["x-topwork-arm"])
        assert set(arms) == {"plain", "tuned"}
        internal = [request.adapter for request in made.engine.requests]
        assert [adapter is not None for adapter in internal] == [arm == "tuned" for arm in arms]
        told = await figures(made)
        generated = len(words(base, SAID))
        for arm in ("plain", "tuned"):
            assert told[arm]["requests"] == arms.count(arm)
            assert told[arm]["generated_tokens"] == generated * arms.count(arm)
            assert told[arm]["time_to_first_token_seconds"]["mean"] > 0
        assert told["plain"]["versions"] != told["tuned"]["versions"]

    tried(base, adapters, work)


def test_an_answer_is_voted_on_by_the_id_that_came_with_it(base: Base, adapters: Path, tmp_path: Path) -> None:
    async def work(made: Scripted) -> None:
        whole = await ask(made, "ab", user="u1")
        chunks = (await ask(made, "ab", user="u1", stream=True)).text.split("\n\n")
        ids = [whole.json()["id"], json.loads(chunks[0].removeprefix("data: "))["id"]]
        arm = whole.headers["x-topwork-arm"]
        for id in ids:
            came = await made.client.post("/v1/feedback", json={"id": id, "vote": 1})
            assert came.json()["kept"], came.text
        assert (await figures(made))[arm]["votes"]["count"] == 2
        lines = [json.loads(line) for line in (tmp_path / "feedback.jsonl").read_text().splitlines()]
        assert [line["version"] for line in lines] == [whole.headers.get("x-topwork-version", "")] * 2
        for body in ('{"id": "x"', "[" * 10_000, '{"id": "x", "score": 1e999}', '{"id": "\\ud800", "vote": 1}'):
            came = await made.client.post(
                "/v1/feedback", content=body, headers={"content-type": "application/json"}
            )  # fmt: skip
            assert 400 <= came.status_code < 500
            assert came.json()["error"]["message"]

    tried(base, adapters, work, state_folder=str(tmp_path))


def test_tenants_see_and_use_their_own(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        async def seen(name: str) -> set[str]:
            cards = await made.client.get("/v1/models", headers=bearer(name))
            return {card["id"] for card in cards.json()["data"]}

        assert await seen("ann") == {"one", "ab"}
        assert await seen("bob") == {"two", BASE}
        assert await seen("ops") == {"one", "two", BASE, "ab"}
        assert (await made.client.get("/v1/models")).status_code == 401
        for name in ("ann", "bob"):
            hidden = await ask(made, {"ann": "two", "bob": "one"}[name], name)
            absent = await ask(made, "zzzzz", name)
            assert (hidden.status_code, absent.status_code) == (404, 404)
            assert hidden.json()["error"]["code"] == absent.json()["error"]["code"] == "model_not_found"
            assert await seen(name) & {"one", "two"} != {"one", "two"}
        assert "two" not in (await ask(made, "twa", "ann")).text, "nor is it named as a near one"
        assert not made.engine.requests

    tried(base, adapters, work, tenants=TENANTS)


def test_tenants_share_neither_prompts_nor_a_line(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        for name, model in (("ann", "one"), ("bob", "two"), ("ops", "one")):
            assert (await ask(made, model, name)).status_code == 200
        requests: list[Request] = made.engine.requests
        assert [request.share for request in requests] == ["ann", "bob", "ops"]
        assert len({request.salt for request in requests} | {""}) == 4

    tried(base, adapters, work, tenants=TENANTS)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["whole", "failed", "gone"])
def test_a_place_comes_back_however_an_answer_ends(base: Base, adapters: Path, stream: bool, end: str) -> None:
    async def work(made: Scripted) -> None:
        made.engine.gate.clear()
        first = asyncio.ensure_future(ask(made, "one", "ann", stream=stream))
        await made.until(lambda: bool(made.engine.requests))
        refused = await ask(made, "one", "ann")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        if end == "gone":
            first.cancel()
        if end == "failed":
            made.engine.fail.append(RuntimeError("out of order"))
        made.engine.gate.set()
        if end == "gone":
            with pytest.raises(asyncio.CancelledError):
                await first
        else:
            await first
        await made.until(lambda: not made.service.running)
        assert (await ask(made, "one", "ann")).status_code == 200
        assert (await ask(made, "one", "ann")).status_code == 200

    tried(base, adapters, work, tenants=TENANTS)


def test_tokens_are_paid_by_what_was_read_and_written(base: Base, adapters: Path) -> None:
    tenants = [{**TENANTS[0], "tokens_per_minute": 1000, "requests_per_minute": 50}, *TENANTS[1:]]

    async def work(made: Scripted) -> None:
        usage = (await ask(made, "one", "ann")).json()["usage"]
        came = await ask(made, "one", "ann", stream=True)
        left = 1000 - usage["total_tokens"] - usage["prompt_tokens"]
        assert int(came.headers["x-ratelimit-remaining-tokens"]) in (left, left + 1)
        assert came.headers["x-ratelimit-remaining-requests"] == "48"

    tried(base, adapters, work, tenants=tenants)


def test_prometheus_and_the_page(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        assert (await ask(made, "one", "ann")).status_code == 200
        assert (await ask(made, "nothing-of-this-name", "ann")).status_code == 404
        assert (await made.client.get("/metrics", headers=bearer("ann"))).status_code == 403
        text = (await made.client.get("/metrics", headers=bearer("ops"))).text
        assert 'vllm:request_success_total{finished_reason="stop",model_name="one"} 1.0' in text
        assert 'vllm:time_to_first_token_seconds_count{model_name="one"} 1.0' in text
        assert "nothing-of-this-name" not in text
        page = await made.client.get("/")
        assert "text/html" in page.headers["content-type"]
        assert (await made.client.get("/page/page.js")).status_code == 200

    tried(base, adapters, work, tenants=TENANTS)


def test_what_is_there_is_described(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        document = (await made.client.get("/openapi.json")).json()
        vote = document["paths"]["/v1/feedback"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"id", "vote", "score", "preferred", "rejected", "tied"} <= set(vote["properties"])
        assert {"/v1/routes", "/v1/routes/{name}", "/v1/comparisons", "/metrics"} <= set(document["paths"])

    tried(base, adapters, work)
