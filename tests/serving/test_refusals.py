"""Each way that a request goes wrong: its status, OpenAI's shape, a bounded body, no path of this machine, and the
server unharmed."""

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.scripted import BASE, Scripted, scripted, words
from topwork.common.errors import AdapterError, RequestError
from topwork.models.base import Base
from topwork.serving.errors import LONGEST
from topwork.serving.seams import Call, Caller, OpenGate, Parts, Target

CHAT, COMPLETIONS, LOAD, UNLOAD = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)
KEYS = {"message", "type", "param", "code"}


def check(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as it has to be."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == KEYS
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert len(response.content) < 2 * LONGEST + 400
    assert not re.search(r"/(tmp|home|work|usr|root|var)\b|Traceback|\.py\b", response.text), response.text
    assert response.headers["x-request-id"]
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return error


def tried(base: Base, work: Any, adapters: Path | None = None, said: str = "Yes.", **values: Any) -> None:
    """Runs `work` with a server, which then answers as if nothing had been."""
    if adapters is not None:
        values = {"adapters": {"one": str(adapters / "one")}, "adapters_folder": str(adapters), **values}

    async def run() -> None:
        async with scripted(base, lambda _: words(base, said), **values) as made:
            await work(made)
            made.engine.gate.set()
            made.service.draining = False
            good = await made.client.post(COMPLETIONS, json={"model": BASE, "prompt": "Hi"}, headers=KEY)
            assert good.json()["choices"][0]["text"] == said

    asyncio.run(run())


KEY: Mapping[str, str] = {}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param", "code"),
    [
        ("GET", "/nothing", None, 404, None, "not_found"),
        ("GET", CHAT, None, 405, None, "method_not_allowed"),
        ("DELETE", "/v1/models", None, 405, None, "method_not_allowed"),
        ("GET", "/v1/models/nobody", None, 404, "model", "model_not_found"),
        ("POST", COMPLETIONS, {"model": "nobody", "prompt": "a"}, 404, "model", "model_not_found"),
        ("POST", COMPLETIONS, {"model": "../../etc/passwd", "prompt": "a"}, 404, "model", "model_not_found"),
        ("POST", COMPLETIONS, {"model": "\n\0\x1b[31m" * 30, "prompt": "a"}, 404, "model", "model_not_found"),
        ("POST", COMPLETIONS, {"prompt": "a"}, 400, "model", "missing_required_parameter"),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": ""}, 400, "prompt", None),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": "a " * 10_000}, 400, "prompt", "context_length_exceeded"),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": [10**6]}, 400, "prompt", None),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": "a", "n": 17}, 400, "n", None),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": ["a"] * 17}, 400, "prompt", None),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": "a", "logit_bias": {"999999": 1}}, 400, "logit_bias", None),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": "a", "stop_token_ids": [999999]}, 400, "stop_token_ids", None),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": "a", "min_tokens": 17}, 400, "min_tokens", None),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": "a", "echo": True, "logprobs": 1}, 400, "logprobs", None),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": "a", "suffix": "b"}, 400, "suffix", None),
        ("POST", COMPLETIONS, {"model": BASE, "prompt": "a", "best_of": 2}, 400, "best_of", None),
        ("POST", LOAD, {"lora_name": "x"}, 400, "lora_path", "missing_required_parameter"),
        ("POST", LOAD, {"lora_name": BASE, "lora_path": "one"}, 400, "lora_name", None),
        ("POST", LOAD, {"lora_name": "one", "lora_path": "one"}, 400, "lora_name", "already_loaded"),
        ("POST", LOAD, {"lora_name": "a b\n", "lora_path": "one"}, 400, "lora_name", None),
        ("POST", LOAD, {"lora_name": "x", "lora_path": "nowhere"}, 404, "lora_path", "adapter_not_found"),
        ("POST", LOAD, {"lora_name": "x", "lora_path": "a" * 1000}, 404, "lora_path", "adapter_not_found"),
        ("POST", LOAD, {"lora_name": "x", "lora_path": "one\0"}, 400, "lora_path", None),
        ("POST", LOAD, {"lora_name": "x", "lora_path": ".."}, 403, "lora_path", "path_not_allowed"),
        ("POST", LOAD, {"lora_name": "x", "lora_path": "/etc"}, 403, "lora_path", "path_not_allowed"),
        ("POST", LOAD, {"lora_name": "x", "lora_path": "/nowhere/at/all"}, 403, "lora_path", "path_not_allowed"),
        ("POST", LOAD, {"lora_name": "x", "lora_path": "one/../../.."}, 403, "lora_path", "path_not_allowed"),
        ("POST", LOAD, {"lora_name": "x", "lora_path": "."}, 403, "lora_path", "path_not_allowed"),
        ("POST", LOAD, {"lora_name": "x", "lora_path": "one", "base_model_name": "o"}, 404, "base_model_name", None),
        ("POST", UNLOAD, {"lora_name": "nobody"}, 404, "lora_name", "model_not_found"),
        ("POST", UNLOAD, {"lora_name": BASE}, 404, "lora_name", "model_not_found"),
        ("POST", UNLOAD, {}, 400, "lora_name", "missing_required_parameter"),
    ],
)  # fmt: skip
def test_a_wrong_request(
    base: Base, adapters: Path, method: str, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    async def work(made: Scripted) -> None:
        check(await made.client.request(method, path, json=body), status, param, code)
        assert made.registry.names() == ["one"]

    tried(base, work, adapters)


def test_the_nearest_model_is_told(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        error = check(await made.client.post(COMPLETIONS, json={"model": "onne", "prompt": "a"}), 404)
        assert "did you mean 'one'?" in error["message"]

    tried(base, work, adapters)


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_body_that_is_not_said_to_be_json_is_a_415(base: Base, kind: str | None) -> None:
    """So that no web page can make a browser send it without asking first."""

    async def work(made: Scripted) -> None:
        headers = {} if kind is None else {"content-type": kind}
        body = json.dumps({"model": BASE, "prompt": "Hi"}).encode()
        check(await made.client.post(COMPLETIONS, content=body, headers=headers), 415)

    tried(base, work)


@pytest.mark.parametrize(
    "sent", [b'{"a":' * 10**5, b"[" * 10**5, b'{"seed":' + b"9" * 5000 + b"}", b'{"prompt":"\\ud800"}', b"{}x", b""]
)
def test_traps_in_json_are_400s(base: Base, sent: bytes) -> None:
    async def work(made: Scripted) -> None:
        headers = {"content-type": "application/json"}
        check(await made.client.post(CHAT, content=sent, headers=headers), 400, None, "invalid_json")

    tried(base, work)


def test_a_body_that_is_too_long_is_a_413_whether_it_says_so_or_not(base: Base) -> None:
    async def pieces() -> Any:
        for _ in range(100):
            yield b" " * 1000

    async def work(made: Scripted) -> None:
        headers = {"content-type": "application/json"}
        check(await made.client.post(CHAT, content=b" " * 5000, headers=headers), 413, None, "body_too_large")
        check(await made.client.post(CHAT, content=pieces(), headers=headers), 413, None, "body_too_large")
        for length in ("-1", "a", "1e3", "9" * 5000):
            response = await made.client.post(CHAT, content=b"{}", headers={**headers, "content-length": length})
            check(response, 413, None, "body_too_large")

    tried(base, work, limits={"body_bytes": 4000})


def test_a_full_queue_is_a_429_until_there_is_room(base: Base) -> None:
    async def work(made: Scripted) -> None:
        made.engine.gate.clear()
        body = {"model": BASE, "prompt": "Hi"}
        waiting = [asyncio.ensure_future(made.client.post(COMPLETIONS, json=body)) for _ in range(3)]
        await made.until(lambda: made.backend.worker.running == 3)
        for more in (body, {**body, "stream": True}):
            check(await made.client.post(COMPLETIONS, json=more), 429, None, "queue_full")
        made.engine.gate.set()
        assert [(await one).status_code for one in waiting] == [200] * 3

    tried(base, work, engine={"batch_size": 2, "max_waiting": 1})


def test_an_engine_that_fails_is_a_500_or_an_error_in_the_stream(base: Base) -> None:
    async def work(made: Scripted) -> None:
        body = {"model": BASE, "prompt": "Hi"}
        made.engine.fail.append(MemoryError("/srv/secret.py"))
        check(await made.client.post(COMPLETIONS, json=body), 500, None, "generation_failed")
        made.engine.fail.append(ValueError("/srv/secret.py"))
        response = await made.client.post(COMPLETIONS, json={**body, "stream": True})
        assert response.status_code == 200
        error, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert set(json.loads(error.removeprefix("data: "))["error"]) == KEYS
        assert "secret" not in response.text

    tried(base, work)


def test_a_fault_of_ours_is_a_500_that_tells_nothing(base: Base) -> None:
    async def work(made: Scripted) -> None:
        whole = made.backend.reader.completion

        def broken(asked: Any) -> Any:
            raise KeyError("/srv/secret.py")

        made.backend.reader.completion = broken  # type: ignore[method-assign]
        error = check(await made.client.post(COMPLETIONS, json={"model": BASE, "prompt": "Hi"}), 500)
        assert "secret" not in error["message"]
        made.backend.reader.completion = whole  # type: ignore[method-assign]

    tried(base, work)


def test_what_the_parts_below_refuse_is_told_without_paths(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise AdapterError("/srv/data/adapters/one has no adapter_config.json (see /etc/topwork/serve.yaml)")

        made.registry.prepare = refuse  # type: ignore[method-assign]
        error = check(await made.client.post(LOAD, json={"lora_name": "x", "lora_path": "one"}), 400, "lora_path")
        assert "srv" not in error["message"]
        assert "adapter_config.json" in error["message"]

        def full(_: Any) -> int:
            raise RequestError("the prompt has 7 tokens")

        submit, made.engine.submit = made.engine.submit, full  # type: ignore[method-assign]
        check(await made.client.post(COMPLETIONS, json={"model": "one", "prompt": "Hi"}), 400, "prompt")
        assert made.registry.versions()[0].uses == 0
        made.engine.submit = submit  # type: ignore[method-assign]

    tried(base, work, adapters)


def test_the_time_of_a_request_is_up_and_the_engine_is_free(base: Base) -> None:
    async def work(made: Scripted) -> None:
        made.engine.say = lambda _: list(range(10**6))
        body = {"model": BASE, "prompt": "Hi", "max_tokens": 10**6, "ignore_eos": True}
        check(await made.client.post(COMPLETIONS, json=body), 504, None, "timeout")
        await made.until(lambda: not made.engine.running)
        response = await made.client.post(COMPLETIONS, json={**body, "stream": True})
        *_, error, done, _ = response.text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
        assert done == "data: [DONE]"
        await made.until(lambda: not made.engine.running)
        made.engine.say = lambda _: words(base, "Yes.")

    base_length = base.context_length
    object.__setattr__(base, "context_length", 10**7)
    try:
        tried(base, work, limits={"request_seconds": 0.3})
    finally:
        object.__setattr__(base, "context_length", base_length)


@pytest.mark.parametrize("listens", ["127.0.0.1", "127.0.0.2", "localhost.", "LOCALHOST", "[::1]"])
def test_a_host_name_that_a_web_page_brought_is_refused(base: Base, listens: str) -> None:
    """Wherever no keys are asked for because this machine alone can ask."""

    async def work(made: Scripted) -> None:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "proxy.example:80", "LOCALHOST"):
            assert (await made.client.get("/health", headers={"host": host})).status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            check(await made.client.get("/v1/models", headers={"host": host}), 421, None, "unknown_host")

    tried(base, work, host=listens, allowed_hosts=["proxy.example"])


def test_a_server_that_goes_down_takes_nothing_new_and_lives(base: Base) -> None:
    async def work(made: Scripted) -> None:
        assert (await made.client.get("/ready")).json() == {"status": "ready"}
        await made.service.drain(0)
        check(await made.client.get("/ready"), 503, None, "not_ready")
        for stream in (False, True):
            body = {"model": BASE, "prompt": "Hi", "stream": stream}
            check(await made.client.post(COMPLETIONS, json=body), 503, None, "shutting_down")
        assert (await made.client.get("/health")).status_code == 200

    tried(base, work)


class _Keys(OpenGate):
    """Two keys: one for the adapter `one` alone, one for all."""

    def identify(self, headers: Mapping[str, str]) -> Caller:
        from topwork.serving.errors import ApiError

        key = headers.get("authorization", "").removeprefix("Bearer ")
        if key not in ("small", "all"):
            raise ApiError(401, "no key that is known", code="invalid_api_key")
        return Caller(key, key == "all", salt=key, share=key)

    def may_use(self, caller: Caller, name: str) -> bool:
        return caller.admin or name == "one"


def test_a_key_sees_what_is_its_own_and_the_rest_is_as_if_it_were_not(base: Base, adapters: Path) -> None:
    small, everything = {"authorization": "Bearer small"}, {"authorization": "Bearer all"}

    async def work(made: Scripted) -> None:
        client = made.client
        check(await client.get("/v1/models"), 401, None, "invalid_api_key")
        check(await client.post(COMPLETIONS, content=b"{" * 9), 401)
        seen = (await client.get("/v1/models", headers=small)).json()["data"]
        assert [card["id"] for card in seen] == ["one"]
        other = await client.post(COMPLETIONS, json={"model": "two", "prompt": "a"}, headers=small)
        none = await client.post(COMPLETIONS, json={"model": "ten", "prompt": "a"}, headers=small)
        assert check(other, 404)["message"].replace("two", "ten") == check(none, 404)["message"]
        check(await client.get("/v1/models/two", headers=small), 404)
        check(
            await client.post(LOAD, json={"lora_name": "x", "lora_path": "one"}, headers=small), 403, None, "admin_only"
        )
        check(await client.post(UNLOAD, json={"lora_name": "two"}, headers=small), 403, None, "admin_only")
        body = {"model": "one", "prompt": "a"}
        assert (await client.post(COMPLETIONS, json=body, headers=small)).status_code == 200
        assert (await client.post(COMPLETIONS, json={**body, "model": "two"}, headers=everything)).status_code == 200
        assert [request.salt for request in made.engine.requests] == ["small/", "all/"]
        assert [request.share for request in made.engine.requests] == ["small", "all"]

    async def run() -> None:
        values = {"adapters": {name: str(adapters / name) for name in ("one", "two")}, "adapters_folder": str(adapters)}
        async with scripted(base, lambda _: words(base, "Yes."), Parts(_Keys()), **values) as made:
            await work(made)

    asyncio.run(run())


def test_without_a_folder_for_them_adapters_are_not_changed(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        check(await made.client.post(LOAD, json={"lora_name": "x", "lora_path": "one"}), 403, None, "not_enabled")
        check(await made.client.post(UNLOAD, json={"lora_name": "one"}), 403, None, "not_enabled")

    tried(base, work, adapters, adapters_folder=None)


def test_a_link_that_leads_out_of_the_folder_is_refused(base: Base, adapters: Path, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "out").symlink_to(adapters / "one")
    (tmp_path / "inside" / "ring").symlink_to("ring")

    async def work(made: Scripted) -> None:
        check(await made.client.post(LOAD, json={"lora_name": "x", "lora_path": "out"}), 403, "lora_path")
        check(await made.client.post(LOAD, json={"lora_name": "x", "lora_path": "ring"}), 404, "lora_path")

    tried(base, work, adapters, adapters_folder=str(tmp_path / "inside"))


class _Recorder:
    """A meter, and the calls that it was told of."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Call]] = []
        self.tokens = 0

    def began(self, call: Call) -> None:
        self.told.append(("began", call))

    def token(self, call: Call, seconds: float) -> None:
        assert seconds >= 0
        self.tokens += 1

    def ended(self, call: Call) -> None:
        self.told.append(("ended", call))

    def stepped(self, statistics: Any) -> None:
        pass


def test_a_record_tells_what_came_of_its_request(base: Base, adapters: Path) -> None:
    meter = _Recorder()

    class Arms:
        def names(self) -> list[str]:
            return ["ab"]

        def resolve(self, model: str, *_: Any) -> Target | None:
            return Target("one", "ab", "b") if model == "ab" else None

    async def run() -> None:
        values = {"adapters": {"one": str(adapters / "one")}}
        async with scripted(
            base, lambda _: words(base, "Yes. No."), Parts(router=Arms(), meter=meter), **values
        ) as made:
            count = len(words(base, "Yes. No."))
            for stream in (False, True):
                body = {"model": "ab", "prompt": "Hi", "n": 2, "stream": stream, "user": "me"}
                response = await made.client.post(COMPLETIONS, json=body)
                assert response.headers["x-topwork-arm"] == "b"
                assert response.headers["x-topwork-version"] == made.registry.versions()[0].content[-64:][:12]
                assert '"model":"ab"' in response.text
                call = meter.told[-1][1]
                assert [what for what, told in meter.told if told is call] == ["began", "ended"]
                assert call.id in response.text
                assert (call.status, call.finish, call.generated_tokens) == (200, ["stop"] * 2, 2 * count)
                assert (call.target, call.user, call.choices) == (Target("one", "ab", "b"), "me", 2)
                assert call.arrived_at <= call.first_token_at <= call.last_token_at <= call.ended_at
            assert meter.tokens == 4 * count
            made.engine.fail.append(ValueError())
            await made.client.post(COMPLETIONS, json={"model": "one", "prompt": "Hi"})
            call = meter.told[-1][1]
            assert (call.status, call.finish, call.error) == (500, ["failed"], "generation_failed")
            await made.client.post(COMPLETIONS, json={"model": "one", "prompt": ""})
            assert (meter.told[-1][0], meter.told[-1][1].status) == ("ended", 400)
            ids = [card["id"] for card in (await made.client.get("/v1/models")).json()["data"]]
            assert ids == [BASE, "one", "ab"]

    asyncio.run(run())


def test_pages_of_other_origins_may_ask_where_they_are_named_and_nowhere_else(base: Base) -> None:
    async def asked(origin: str, **values: Any) -> httpx.Headers:
        async with scripted(base, lambda _: words(base, "Yes."), **values) as made:
            headers = {
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type",
            }
            return (await made.client.options(COMPLETIONS, headers=headers)).headers

    good, named = "https://good.example", {"cors_origins": ["https://good.example"]}
    assert asyncio.run(asked(good, **named))["access-control-allow-origin"] == good
    assert "access-control-allow-origin" not in asyncio.run(asked("https://evil.example", **named))
    assert "access-control-allow-origin" not in asyncio.run(asked(good))


def test_every_answer_has_the_headers_that_browsers_heed_and_the_requests_id(base: Base) -> None:
    async def work(made: Scripted) -> None:
        response = await made.client.get("/v1/models", headers={"x-request-id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        for id in ("a b", "x" * 65, "a\tb"):
            assert (await made.client.get("/health", headers={"x-request-id": id})).headers["x-request-id"] != id

    tried(base, work)
