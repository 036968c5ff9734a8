"""A real socket: clients that are slow, that go, that do not read, that speak no HTTP; and a server that goes down."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from serving.scripted import BASE, Scripted, served, words
from topwork.models.base import Base
from topwork.serving.shutdown import Server

PATH = "/v1/completions"
LONG = {"model": BASE, "prompt": "Hi", "max_tokens": 500, "ignore_eos": True}
Address = tuple[str, int]


@contextmanager
def long_answers(base: Base, **values: Any) -> Iterator[tuple[Scripted, Server, Address]]:
    """A server whose answers are some hundred tokens long, whose engine waits at its gate once two run."""
    with served(base, lambda _: words(base, "Yes. ") * 200, **values) as (made, server, address):
        made.engine.gate.clear()
        made.engine.least = 2
        yield made, server, address


def until(true: Callable[[], Any]) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def sent(address: Address, data: bytes) -> socket.socket:
    connection = socket.create_connection(address, timeout=20)
    connection.sendall(data)
    return connection


def request(body: Any, path: str = PATH, **headers: str) -> bytes:
    """Its bytes."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    lines += [
        f"{name.replace('_', '-')}: {value}" for name, value in {"content_length": str(len(content)), **headers}.items()
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """All until the connection ends: status, headers, body."""
    data = b""
    while part := connection.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(first.split()[1]), {name.lower(): value for name, value in headers.items()}, body


def error_of(connection: socket.socket, status: int) -> dict[str, Any]:
    """OpenAI's error, after which the connection ends."""
    found, headers, body = answer(connection)
    assert found == status
    assert headers["connection"] == "close"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_the_engine_within_a_step(base: Base, stream: bool) -> None:
    with long_answers(base) as (made, _, address):
        connection = sent(address, request({**LONG, "stream": stream, "n": 2}))
        until(lambda: len(made.engine.running) == 2)
        if stream:
            made.engine.gate.set()
            until(lambda: b"data: " in connection.recv(65536))
            made.engine.gate.clear()
        steps = made.engine.steps
        connection.close()
        until(lambda: not made.service.running)
        made.engine.gate.set()
        until(lambda: made.backend.worker.running == 0)
        assert sorted(made.engine.cancelled) == [0, 1]
        assert made.engine.steps <= steps + 2  # the one that waits at the gate, and one that had begun before it


def test_a_client_that_goes_before_its_request_is_whole_leaves_nothing(base: Base) -> None:
    with long_answers(base) as (made, _, address):
        whole = request(LONG)
        sent(address, whole[:-5]).close()
        sent(address, whole[:30]).close()
        until(lambda: made.app.inside == 0)
        assert made.engine.requests == []


def test_a_head_that_comes_too_slowly_is_a_408_the_first_and_the_next(base: Base) -> None:
    with served(base, lambda _: words(base, "Yes."), limits={"header_seconds": 0.3}) as (_, _, address):
        assert "head" in error_of(sent(address, b""), 408)["message"]
        assert "head" in error_of(sent(address, b"GET /health HTTP/1.1\r\nhost: lo"), 408)["message"]
        connection = sent(address, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        until(lambda: b'"ok"' in connection.recv(4096, socket.MSG_PEEK))
        connection.recv(4096)
        connection.sendall(b"GET /health")
        assert "head" in error_of(connection, 408)["message"]


def test_a_body_that_comes_too_slowly_is_a_408(base: Base) -> None:
    with served(base, lambda _: words(base, "Yes."), limits={"body_seconds": 0.3}) as (made, _, address):
        assert error_of(sent(address, request(LONG)[:-3]), 408)["code"] == "slow_body"
        until(lambda: made.app.inside == 0)


def test_an_idle_connection_ends(base: Base) -> None:
    with served(base, lambda _: words(base, "Yes."), limits={"idle_seconds": 1}) as (_, _, address):
        connection = sent(address, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert answer(connection)[0] == 200


def test_a_client_that_reads_nothing_is_cut_off(base: Base) -> None:
    values = {"limits": {"unread_seconds": 0.3}}
    with served(base, lambda _: words(base, "Yes. ") * 200, **values) as (made, _, address):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(request({**LONG, "n": 16, "stream": True}))
        until(lambda: made.engine.requests)
        until(lambda: not made.service.running)
        connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"a" * 70_000,
        b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n",
    ],
)
def test_what_is_no_http_is_a_400(base: Base, data: bytes) -> None:
    with served(base, lambda _: words(base, "Yes.")) as (_, _, address):
        assert error_of(sent(address, data), 400)["code"] == "invalid_http"


def test_more_connections_than_are_wanted_are_a_503(base: Base) -> None:
    with served(base, lambda _: words(base, "Yes."), limits={"connections": 2}) as (_, server, address):
        held = [sent(address, b""), sent(address, b"")]
        until(lambda: len(server.server_state.connections) == 2)
        assert error_of(sent(address, b""), 503)["code"] == "overloaded"
        for connection in held:
            connection.close()
        until(lambda: not server.server_state.connections)
        assert httpx.get(f"http://127.0.0.1:{address[1]}/health").status_code == 200


def test_a_body_that_is_too_long_is_told_before_it_has_come(base: Base) -> None:
    with served(base, lambda _: words(base, "Yes.")) as (_, _, address):
        assert error_of(sent(address, request({}, content_length="99999999")), 413)["code"] == "body_too_large"


def test_a_client_that_sends_all_before_it_reads_still_gets_to_know_why(base: Base) -> None:
    """Closing over what it sent would reset the connection, and the answer would be lost."""
    with served(base, lambda _: words(base, "Yes."), limits={"body_bytes": 2000}) as (_, server, address):
        body = b" " * 3_000_000
        connection = sent(address, request({}, content_length=str(len(body))))
        connection.sendall(body)
        assert error_of(connection, 413)["code"] == "body_too_large"
        connection.close()
        until(lambda: not server.server_state.connections)


class Asking(threading.Thread):
    """A client in a thread of its own."""

    def __init__(self, address: Address, **fields: Any) -> None:
        super().__init__()
        self.url, self.body = f"http://127.0.0.1:{address[1]}{PATH}", {**LONG, **fields}
        self.response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.response = httpx.post(self.url, json=self.body, timeout=30)

    def answered(self) -> httpx.Response:
        self.join(20)
        assert self.response is not None
        return self.response


def test_told_to_end_a_server_lets_answers_end_and_takes_no_more(base: Base) -> None:
    with long_answers(base) as (made, server, address):
        asking = [Asking(address), Asking(address, stream=True)]
        until(lambda: len(made.engine.running) == 2)
        server.stop()
        until(lambda: made.service.draining)
        url = f"http://127.0.0.1:{address[1]}"
        assert httpx.get(f"{url}/ready").status_code == 503
        refused = httpx.post(url + PATH, json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        made.engine.gate.set()
        whole, stream = (one.answered() for one in asking)
        assert whole.json()["choices"][0]["finish_reason"] == "length"
        assert '"finish_reason":"length"' in stream.text
        assert stream.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("twice", [False, True])
def test_what_has_not_ended_in_time_is_told(base: Base, twice: bool) -> None:
    """Or at once, when it is told to end a second time."""
    with long_answers(base, limits={"grace_seconds": 600.0 if twice else 0.2}) as (made, server, address):
        asking = [Asking(address), Asking(address, stream=True)]
        until(lambda: len(made.engine.running) == 2)
        server.stop()
        if twice:
            until(lambda: made.service.draining)
            server.stop()
        whole, stream = (one.answered() for one in asking)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "shutting_down")
        assert stream.status_code == 200
        *_, error, done, rest = stream.text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert (done, rest) == ("data: [DONE]", "")
