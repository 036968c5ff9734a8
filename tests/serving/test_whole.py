"""Servers from their configuration on, with the engine itself: in a thread, and as processes that are killed."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from run.processes import Commands
from serving.scripted import BASE, adapter_folder, tiny
from serving.test_completions import events
from serving.test_refusals import check
from topwork.common.errors import RequestError
from topwork.serving.config import ServeConfig
from topwork.serving.launch import listening, run, serve
from topwork.serving.opening import named_by, open_service
from topwork.serving.shutdown import Server

CHAT, COMPLETIONS, LOAD = "/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter"
CLIENTS = 16
HI = {"messages": [{"role": "user", "content": "Hi there"}], "max_tokens": 12}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and adapters `one` and `two` on a shelf."""
    folder = tmp_path_factory.mktemp("place")
    base = tiny(folder)
    for seed, name in enumerate(("one", "two"), 1):
        adapter_folder(base, folder / "shelf" / name, seed)
    return folder


def values(place: Path, **more: Any) -> dict[str, Any]:
    """A configuration's."""
    return {
        "model": {"model_name_or_path": str(place / BASE), "dtype": "float32", "device": "cpu"}, "port": 0,
        "adapters": {"one": str(place / "shelf" / "one")}, "adapters_folder": str(place / "shelf"), **more,
    }  # fmt: skip


@contextmanager
def serving(config: dict[str, Any]) -> Iterator[httpx.Client]:
    """A client of a server that runs in a thread, which is told to end afterwards."""
    made = ServeConfig.model_validate(config)
    said: list[str] = []
    started: list[Server] = []
    ready = threading.Event()

    async def answer(listener: socket.socket) -> None:
        opened = open_service(made, said.append)
        try:
            await run(opened, listener, say, started.append)
        finally:
            opened.close()

    def say(text: str) -> None:
        said.append(text)
        if "answers at" in text:
            ready.set()

    with listening(made) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(answer(listener)))
        thread.start()
        assert ready.wait(60), said
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
                yield client
        finally:
            started[0].stop()
            thread.join(30)
            assert not thread.is_alive()
    assert said[-1] == "the server has ended"


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[httpx.Client]:
    with serving(values(place)) as client:
        yield client


def ask(client: httpx.Client, model: str = BASE, path: str = CHAT, **fields: Any) -> Any:
    body = {"model": model, **(HI if path == CHAT else {"prompt": "Hi there", "max_tokens": 12}), **fields}
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return events(response) if fields.get("stream") else response.json()


def said(answer: Any) -> list[str]:
    """The choices' texts, of a whole answer or of chunks."""
    if isinstance(answer, dict):
        return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in answer["choices"]]
    texts: dict[int, str] = {}
    for part in (part for chunk in answer for part in chunk["choices"]):
        texts[part["index"]] = texts.get(part["index"], "") + part.get("delta", part).get(
            "content", part.get("text", "")
        )
    return [texts[index] for index in sorted(texts)]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"seed": 5, "n": 2}, {"seed": 6, "temperature": 1.5, "top_p": 0.8}]
)
def test_the_same_request_gets_the_same_answer_streamed_or_whole(client: httpx.Client, path: str, fields: Any) -> None:
    for model in (BASE, "one"):
        whole = ask(client, model, path, **fields)
        assert said(ask(client, model, path, **fields)) == said(whole)
        chunks = ask(client, model, path, stream=True, stream_options={"include_usage": True}, **fields)
        assert said(chunks) == said(whole)
        assert chunks[-1]["usage"] == whole["usage"]
        assert whole["usage"]["completion_tokens"] <= 12 * len(whole["choices"])


def test_an_adapter_changes_what_is_said_and_company_does_not(client: httpx.Client) -> None:
    asked: list[dict[str, Any]] = [
        {"model": model, "seed": seed, "temperature": 1.0, "prompt": "Hi there", "path": COMPLETIONS}
        for model in (BASE, "one") for seed in range(4)
    ]  # fmt: skip
    alone = [said(ask(client, **fields)) for fields in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda fields: said(ask(client, **fields)), asked))
    assert together == alone
    assert alone[:4] != alone[4:]


def test_a_schema_is_obeyed_by_a_model_that_knows_nothing(client: httpx.Client) -> None:
    schema = {
        "type": "object", "properties": {"sort": {"enum": ["fan", "lamp"]}, "late": {"type": "boolean"}},
        "required": ["sort", "late"], "additionalProperties": False,
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": schema, "strict": True}}
    answer = ask(client, "one", max_tokens=200, seed=1, response_format=wanted)
    assert answer["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(said(answer)[0]), schema)


def test_a_tool_is_called_where_one_has_to_be(client: httpx.Client) -> None:
    parameters = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "switch", "parameters": parameters}}]
    answer = ask(client, max_tokens=200, seed=1, tools=tools, tool_choice="required", parallel_tool_calls=False)
    ((call,), reason) = answer["choices"][0]["message"]["tool_calls"], answer["choices"][0]["finish_reason"]
    assert (call["function"]["name"], reason) == ("switch", "tool_calls")
    jsonschema.validate(json.loads(call["function"]["arguments"]), parameters)


def test_log_probabilities_are_of_the_tokens(client: httpx.Client) -> None:
    (choice,) = ask(client, temperature=0, logprobs=True, top_logprobs=3)["choices"]
    for entry in choice["logprobs"]["content"]:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
        assert entry["token"] == entry["top_logprobs"][0]["token"]
        assert sorted((e["logprob"] for e in entry["top_logprobs"]), reverse=True) == [
            e["logprob"] for e in entry["top_logprobs"]
        ]


def test_an_adapter_that_comes_while_others_are_asked_answers_as_one_that_was_there(
    client: httpx.Client, place: Path
) -> None:
    before = ask(client, "one", COMPLETIONS, temperature=0)
    stop = threading.Event()

    def keep_asking() -> int:
        count = 0
        while not stop.is_set():
            assert said(ask(client, "one", COMPLETIONS, temperature=0)) == said(before)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking) for _ in range(2)]
        try:
            for name, path in (("two", "two"), ("again", "one"), ("two", "one"), ("two", "two")):
                body = {"lora_name": name, "lora_path": path, "load_inplace": True}
                assert client.post(LOAD, json=body).status_code == 200
                found = said(ask(client, name, COMPLETIONS, temperature=0))
                assert (found == said(before)) is (path == "one")
        finally:
            stop.set()
        assert all(one.result() for one in asking)
    for name in ("two", "again"):
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
        check(client.post(COMPLETIONS, json={"model": name, "prompt": "a"}), 404, "model", "model_not_found")


def test_the_page_the_figures_and_the_document_are_there(client: httpx.Client) -> None:
    assert "<html" in client.get("/").text
    figures = client.get("/metrics").text
    assert 'vllm:generation_tokens_total{model_name="one"}' in figures
    assert "vllm:num_requests_running" in figures
    waited = next(line for line in figures.splitlines() if line.startswith("vllm:request_queue_time_seconds_count"))
    assert float(waited.rpartition(" ")[2]) >= 1
    assert client.get("/version").json()["version"]
    paths = client.get("/openapi.json").json()["paths"]
    assert {CHAT, COMPLETIONS, LOAD, "/v1/feedback", "/metrics"} <= set(paths)


def test_a_run_brings_its_base_its_adapter_and_its_template(trained: Path) -> None:
    config = ServeConfig.model_validate({"model": {"model_name_or_path": str(trained)}, "port": 0})
    named = named_by(config)
    assert named.adapters == {trained.name: trained}
    assert (named.model.dtype, named.template) == ("float32", str(trained / "chat_template.jinja"))
    with serving(config.model_dump(exclude_unset=True)) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["tiny-llama", trained.name]
        assert said(ask(client, trained.name, temperature=0)) != said(ask(client, "tiny-llama", temperature=0))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"adapters": {"x": "nowhere"}}, "'x': nowhere is no folder"),
        ({"adapters": {BASE: "shelf/one"}}, "the name of the base and of an adapter"),
        ({"adapters": {"x": "empty"}}, "'x'"),
        ({"routes": [{"name": "ab", "arms": [{"name": "a"}, {"name": "b", "model": "ones"}]}]}, "did you mean 'one'"),
        ({"host": "256.0.0.1"}, "nobody can listen"),
    ],
)
def test_what_is_wrong_before_the_first_request_is_told(place: Path, change: dict[str, Any], told: str) -> None:
    (place / "empty").mkdir(exist_ok=True)
    change = dict(change)
    if "adapters" in change:
        change["adapters"] = {n: p if p == "nowhere" else str(place / p) for n, p in change["adapters"].items()}
    change |= {"no_auth": True} if "host" in change else {}

    with pytest.raises(RequestError, match=told):
        serve(values(place, **change), lambda _: None)


def test_a_port_that_is_taken_is_told_before_the_base_is_loaded(place: Path) -> None:
    told: list[str] = []
    with listening(ServeConfig.model_validate(values(place))) as taken:
        taken.listen()
        config = values(place, port=taken.getsockname()[1])
        with pytest.raises(RequestError, match="another --port"):
            serve(config, told.append)
    assert told == []


# Processes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def ready(url: str) -> None:
    """Waits until it takes requests."""
    end = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end
        time.sleep(0.02)


def streamed_until_told(url: str, child: int) -> Callable[[], list[list[str]]]:
    """Streams that have begun when the process is told to end, every other one longer than it waits; their lines."""
    lines: list[list[str]] = [[] for _ in range(CLIENTS)]
    begun = [threading.Event() for _ in lines]

    def read(number: int) -> None:
        model, tokens = ("late", "one", BASE, "ab")[number % 4], (1800, 30)[number % 2]
        body = {"model": model, "prompt": "Hi there", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=60) as response:
            for line in response.iter_lines():
                lines[number].append(line)
                begun[number].set()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    assert all(one.wait(30) for one in begun)
    os.kill(child, signal.SIGTERM)

    def ended() -> list[list[str]]:
        for thread in threads:
            thread.join(60)
        return [[line for line in own if line] for own in lines]

    return ended


@pytest.mark.slow
def test_what_was_loaded_survives_a_kill_and_sigterm_cuts_no_answer_in_silence(
    place: Path, tmp_path: Path, commands: Commands
) -> None:
    port, found = free_port(), {}
    url = f"http://127.0.0.1:{port}"
    arguments = [
        "serve", str(place / BASE), "--dtype", "float32", "--adapter", f"one={place / 'shelf' / 'one'}", "--port",
        str(port), "--adapters-folder", str(place / "shelf"), "--state-folder", str(tmp_path / "state"),
        "--set", "limits.grace_seconds=0.2", "--json-log",
        "--set", "routes=[{name: ab, arms: [{name: a, model: one}, {name: b}]}]",
    ]  # fmt: skip

    def first(child: int) -> None:
        ready(url)
        for name in ("late", "gone"):
            assert httpx.post(url + LOAD, json={"lora_name": name, "lora_path": "two"}).status_code == 200
        assert httpx.post(url + "/v1/unload_lora_adapter", json={"lora_name": "gone"}).status_code == 200
        assert httpx.put(url + "/v1/routes/ab", json={"weights": {"a": 0, "b": 1}}).status_code == 200
        found["before"] = httpx.post(url + COMPLETIONS, json={"model": "late", "prompt": "Hi", "temperature": 0}).json()
        os.kill(child, signal.SIGKILL)

    code, _ = commands.run(arguments, first)
    assert code == -signal.SIGKILL

    def second(child: int) -> None:
        ready(url)
        body = {"model": "late", "prompt": "Hi", "temperature": 0}
        assert said(httpx.post(url + COMPLETIONS, json=body).json()) == said(found["before"])
        assert {card["id"] for card in httpx.get(url + "/v1/models").json()["data"]} == {BASE, "one", "late", "ab"}
        arms = httpx.get(url + "/v1/routes/ab").json()["arms"]
        assert {arm["name"]: arm["weight"] for arm in arms} == {"a": 0, "b": 1}
        found["lines"] = streamed_until_told(url, child)

    code, printed = commands.run(arguments, second)
    assert code == 0, printed
    for number, (*chunks, last, done) in enumerate(found["lines"]()):
        assert chunks
        assert done == "data: [DONE]", "cut in silence"
        error = json.loads(last.removeprefix("data: ")).get("error")
        assert error is not None or number % 2
        assert error is None or error["code"] == "shutting_down"
    assert f"answers at {url}" in printed
    assert "the server has ended" in printed
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert any("POST /v1/completions 200" in line["message"] for line in lines)


def test_without_the_extra_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import topwork
    from topwork.serving.extra import check_extra

    check_extra()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    with pytest.raises(RequestError, match=r"pip install 'topwork\[serve\]'"):
        check_extra()
    with pytest.raises(RequestError, match="uvicorn, which is not installed"):
        topwork.serve({"model": "nobody"})
