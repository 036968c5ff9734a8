"""The whole server, `topwork serve` as a process, and sixteen clients that stream from it (`workers.py`).

    python -m peers.serving_http JOB      (in benchmarks/)

A client's memory is what the server's resident memory grows by, from one answer's end to the most while the first
sixteen clients are served, for each of them.
"""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any

from peers.serving_job import ADAPTERS, SEQUENCES, ServingJob
from server_process import ServerProcess, Streamed, ask, connected, streamed
from workers import answer, resident_mib

LOOK_SECONDS = 0.02


class Clients:
    """Sixteen connections that stay open, and the server that they go to."""

    def __init__(self, job: ServingJob) -> None:
        adapters = [word for path in job.adapters for word in ("--adapter", f"{Path(path).name}={path}")]
        self.job = job
        self.server = ServerProcess([job.model, "--dtype", "bfloat16", *adapters])
        self.connections = [connected(self.server.address) for _ in range(SEQUENCES)]
        _, _, listed = ask(self.connections[0], "/v1/models")
        self.base = listed["data"][0]["id"]
        self._ask(self.connections[0], job.of_round(-1)[0], self.base, "first")
        self.idle_mib = resident_mib(self.server.process)
        self.first: float | None = None

    def sixteen(self, number: int) -> dict[str, Any]:
        return self._run([self.base] * SEQUENCES, number)

    def sixteen_adapters(self, number: int) -> dict[str, Any]:
        return self._run([f"a{at % ADAPTERS}" for at in range(SEQUENCES)], number)

    def _run(self, models: list[str], number: int) -> dict[str, Any]:
        over, largest = threading.Event(), [0.0]

        def watch() -> None:
            while not over.wait(LOOK_SECONDS):
                largest[0] = max(largest[0], resident_mib(self.server.process))

        watching = threading.Thread(target=watch)
        watching.start()
        salts = [f"{number} {models[1]}"] * SEQUENCES
        begun = time.perf_counter()
        with ThreadPoolExecutor(SEQUENCES) as pool:
            done = list(pool.map(self._ask, self.connections, self.job.of_round(number), models, salts))
        seconds = time.perf_counter() - begun
        over.set()
        watching.join()
        if self.first is None:
            self.first = (largest[0] - self.idle_mib) / SEQUENCES
        return {
            "seconds": seconds, "first_seconds": max(one.came[0] for one in done),
            "first_tokens": [one.came[0] for one in done],
            "between_tokens": [later - before for one in done for before, later in pairwise(one.came)],
            "answers": [one.tokens for one in done], "client_mib": self.first, "server_mib": largest[0],
            "peak_mib": largest[0],
        }  # fmt: skip

    def _ask(self, connection: HTTPConnection, prompt: list[int], model: str, salt: str) -> Streamed:
        body = {
            "model": model, "prompt": prompt, "max_tokens": self.job.tokens, "temperature": 0, "ignore_eos": True,
            "cache_salt": salt,
        }  # fmt: skip
        found = streamed(connection, body)
        if not found.done or found.error:
            raise RuntimeError(f"the server answered {found.status}: {found.error}")
        return found


def main(job: str) -> None:
    clients = Clients(ServingJob.read(job))
    try:
        for arm in (clients.sixteen, clients.sixteen_adapters):
            arm(-1)
        answer({"sixteen": clients.sixteen, "sixteen_adapters": clients.sixteen_adapters}, idle_mib=clients.idle_mib)
    finally:
        clients.server.kill()


if __name__ == "__main__":
    main(*sys.argv[1:2])
