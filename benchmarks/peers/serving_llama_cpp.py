"""llama.cpp's server (xllamacpp) with sixteen slots, asked over HTTP by as many threads (`workers.py`).

    python -m peers.serving_llama_cpp JOB f16|bf16|q4_0|packaged      (in benchmarks/)

Prompts go as token ids, nothing is cached between them, an answer does not end before its last token. Each request
names its adapter in `lora`, as the server has it.
"""

import http.client
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlparse

import xllamacpp
from peers.serving_job import ADAPTERS, SEQUENCES, ServingJob
from workers import answer

from common import peak_mib, threads

CONTEXT = 512
"""Of a slot."""


class LlamaServer:
    """A server of a GGUF file, with the job's adapters."""

    def __init__(self, job: ServingJob, file: str) -> None:
        self.job = job
        params = xllamacpp.CommonParams()
        params.model.path = job.files[file]
        params.n_parallel, params.n_ctx, params.n_gpu_layers = SEQUENCES, SEQUENCES * CONTEXT, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
        params.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(job.files[f"a{number}"], 0.0) for number in range(ADAPTERS)
        ]
        params.cache_ram_mib, params.verbosity = 0, 0
        self._server = xllamacpp.Server(params)
        self._host = urlparse(self._server.listening_address).netloc
        for arm in (self.alone, self.sixteen, self.sixteen_adapters):
            arm(-1)

    def alone(self, number: int) -> dict[str, Any]:
        return self._run(self.job.of_round(number)[:1], [None])

    def sixteen(self, number: int) -> dict[str, Any]:
        return self._run(self.job.of_round(number), [None] * SEQUENCES)

    def sixteen_adapters(self, number: int) -> dict[str, Any]:
        return self._run(self.job.of_round(number), [at % ADAPTERS for at in range(SEQUENCES)])

    def _run(self, prompts: Sequence[list[int]], adapters: Sequence[int | None]) -> dict[str, Any]:
        begun = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            done = list(pool.map(self._ask, prompts, adapters))
        seconds = time.perf_counter() - begun
        # its own clock: how long the slowest answer was, without its prompt
        decoding = max(one["timings"]["predicted_ms"] for one in done) / 1e3
        return {
            "seconds": seconds, "first_seconds": max(0.0, seconds - decoding),
            "answers": [one["tokens"] for one in done], "peak_mib": peak_mib(),
        }  # fmt: skip

    def _ask(self, prompt: list[int], adapter: int | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": prompt, "n_predict": self.job.tokens, "temperature": 0, "ignore_eos": True,
            "return_tokens": True, "cache_prompt": False,
            "lora": [] if adapter is None else [{"id": adapter, "scale": 1.0}],
        }  # fmt: skip
        connection = http.client.HTTPConnection(self._host, timeout=600)
        connection.request("POST", "/completion", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        found = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"llama.cpp answered {response.status}: {found}")
        return found  # type: ignore[no-any-return]


def main(job: str, file: str) -> None:
    server = LlamaServer(ServingJob.read(job), file)
    arms = {"alone": server.alone, "sixteen": server.sixteen, "sixteen_adapters": server.sixteen_adapters}
    answer(arms, system=xllamacpp.get_system_info().strip())


if __name__ == "__main__":
    main(*sys.argv[1:3])
