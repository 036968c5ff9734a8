"""`topwork serve` as a process of its own, and asking it over HTTP as clients do."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from urllib.parse import urlparse

WAIT_SECONDS = 120.0


class ServerProcess:
    """Started with these arguments; `address` is where it listens, `process` its number."""

    def __init__(
        self, arguments: Sequence[str], variables: Mapping[str, str] = MappingProxyType({}), port: int = 0
    ) -> None:
        """Returns when it answers. Raises RuntimeError with what it said last where it ended before."""
        command = [sys.executable, "-m", "topwork", "serve", *arguments, "--port", str(port), "--no-access-log"]
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, env=os.environ | dict(variables), stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.process = self._process.pid
        self.address = self._greeted()
        # what it says later has to go somewhere
        threading.Thread(target=self._read_on, daemon=True).start()

    def ended(self, by: signal.Signals, seconds: float = WAIT_SECONDS) -> int:
        """Send it a signal; its exit code."""
        self._process.send_signal(by)
        return self.wait(seconds)

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Its exit code, when it has ended."""
        return self._process.wait(seconds)

    def kill(self) -> None:
        """For the end of everything: nothing happens where it has ended."""
        self._process.kill()
        self._process.wait(WAIT_SECONDS)
        self._log.close()

    def said(self) -> str:
        """Its log so far."""
        self._log.seek(0)
        return self._log.read()

    def _greeted(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"answers at (http://\S+)", line):
                return found[1]
        code = self._process.wait()
        raise RuntimeError(f"the server ended with {code} before it answered:\n{self.said()[-2000:]}")

    def _read_on(self) -> None:
        for _ in self._process.stdout or ():
            pass


@dataclass
class Streamed:
    """An answer as it came: seconds from the request to each event that had tokens, and what it was.

    error  where it was refused, or where the stream told of a failure
    done   whether the stream came to its end
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    came: list[float] = field(default_factory=list)
    finish: str | None = None
    error: Mapping[str, Any] | None = None
    done: bool = False


def connected(address: str, seconds: float = 600) -> http.client.HTTPConnection:
    """A connection that can ask again and again."""
    place = urlparse(address)
    return http.client.HTTPConnection(place.hostname or "", place.port, timeout=seconds)


def ask(
    connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any] | None = None, method: str | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers (lower case) and what was said, read as JSON where it is."""
    sent = None if body is None else json.dumps(body)
    headers = {} if body is None else {"content-type": "application/json"}
    connection.request(method or ("GET" if body is None else "POST"), path, sent, headers)
    response = connection.getresponse()
    told = response.read()
    found = {name.lower(): value for name, value in response.getheaders()}
    is_json = found.get("content-type", "").startswith("application/json")
    return response.status, found, json.loads(told) if is_json else told.decode()


def streamed(connection: http.client.HTTPConnection, body: Mapping[str, Any]) -> Streamed:
    """A completion, event by event, with its tokens."""
    found = Streamed()
    began = time.perf_counter()
    sent = json.dumps({**body, "stream": True, "return_token_ids": True})
    connection.request("POST", "/v1/completions", sent, {"content-type": "application/json"})
    response = connection.getresponse()
    found.status = response.status
    found.headers = {name.lower(): value for name, value in response.getheaders()}
    if response.status != 200:
        found.error = json.loads(response.read())["error"]
        return found
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            found.done = True
            continue
        event = json.loads(line.removeprefix(b"data: "))
        found.error = event.get("error", found.error)
        for choice in event.get("choices", ()):
            if choice.get("token_ids"):
                found.came.append(time.perf_counter() - began)
                found.tokens += choice["token_ids"]
            found.text += choice.get("text", "")
            found.finish = choice.get("finish_reason") or found.finish
    return found
