"""The server as the process that people start: killed in the middle it comes back with what was loaded, and told to end
it lets no answer end in silence."""

import json
import signal
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ASKED = {"prompt": "Where is my kettle?", "temperature": 0, "ignore_eos": True}
CLIENTS, SHORT, ENDLESS = 16, 40, 1900
"""Half of the clients ask for short answers, the others for such as last longer than the server waits."""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """benchmarks/server_process.py, whose servers are gone afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import server_process

    begun: list[Any] = []

    def start(*arguments: str) -> Any:
        begun.append(server_process.ServerProcess(arguments, {"OMP_NUM_THREADS": "1"}))
        return begun[-1]

    server_process.start = start  # type: ignore[attr-defined]
    yield server_process
    for server in begun:
        server.kill()


class Client(threading.Thread):
    """Streams an answer; `first` is set when a part of it has come."""

    def __init__(self, address: str, model: str, tokens: int, processes: Any) -> None:
        super().__init__()
        self.body = {**ASKED, "model": model, "max_tokens": tokens}
        self.connection: HTTPConnection = processes.connected(address)
        self.first, self.events, self.broken = threading.Event(), [], False
        self.start()

    def run(self) -> None:
        sent = json.dumps({**self.body, "stream": True})
        self.connection.request("POST", "/v1/completions", sent, {"content-type": "application/json"})
        try:
            for line in self.connection.getresponse():
                if line.startswith(b"data: "):
                    self.events.append(line.removeprefix(b"data: ").strip())
                    self.first.set()
        except OSError:
            self.broken = True


@pytest.mark.slow
def test_killed_and_started_again_then_told_to_end(processes: Any, base: Any, adapters: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(
        json.dumps({
            "model": {"model_name_or_path": base.name, "dtype": "float32", "device": "cpu"},
            "served_model_name": "base", "adapters": {"one": str(adapters / "one")}, "adapters_folder": str(adapters),
            "state_folder": str(tmp_path / "state"), "limits": {"grace_seconds": 0.8},
            "routes": [{"name": "ab", "arms": [{"name": "a", "model": "one"}, {"name": "b"}]}],
        })
    )  # fmt: skip
    server = processes.start("--config", str(config))
    connection = processes.connected(server.address)

    def told(address: str) -> dict[str, Any]:
        again = processes.connected(address)
        asked = {model: processes.ask(again, "/v1/completions", {**ASKED, "model": model}) for model in ("late", "ab")}
        found = {model: (status, told["choices"][0]["text"]) for model, (status, _, told) in asked.items()}
        found["models"] = {card["id"]: card["root"] for card in processes.ask(again, "/v1/models")[2]["data"]}
        found["arm"] = asked["ab"][1]["x-topwork-arm"]
        again.close()
        return found

    for path, body, method in (
        ("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "two"}, "POST"),
        ("/v1/load_lora_adapter", {"lora_name": "gone", "lora_path": "two"}, "POST"),
        ("/v1/unload_lora_adapter", {"lora_name": "gone"}, "POST"),
        ("/v1/routes/ab", {"weights": {"a": 0, "b": 1}}, "PUT"),
    ):
        assert processes.ask(connection, path, body, method)[0] == 200
    before = told(server.address)
    assert set(before["models"]) == {"base", "one", "late", "ab"}
    assert before["arm"] == "b"
    clients = [Client(server.address, "late", ENDLESS, processes) for _ in range(4)]
    assert all(client.first.wait(60) for client in clients)
    assert server.ended(signal.SIGKILL) == -signal.SIGKILL
    for client in clients:
        client.join(60)

    server = processes.start("--config", str(config))
    assert told(server.address) == before
    models = ("late", "one", "base", "ab")
    clients = [
        Client(server.address, models[number % 4], (SHORT, ENDLESS)[number % 2], processes) for number in range(CLIENTS)
    ]
    assert all(client.first.wait(60) for client in clients)
    assert server.ended(signal.SIGTERM) == 0
    for number, client in enumerate(clients):
        client.join(60)
        assert not client.broken
        assert client.events[-1] == b"[DONE]", "it was cut in silence"
        last = json.loads(client.events[-2])
        if number % 2 or "error" in last:
            assert last["error"]["code"] == "shutting_down"
    assert any(b"error" not in client.events[-2] for client in clients), "none was let end"
    assert "Traceback" not in server.said()
