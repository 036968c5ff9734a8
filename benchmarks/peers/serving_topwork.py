"""Our engine, as the server owns it: alone, sixteen sequences, and these over eight adapters (`workers.py`).

    python -m peers.serving_topwork JOB bf16|nf4|nf4_head8      (in benchmarks/)

nf4 has double quantization, and the output head in 16 bits; nf4_head8 has it in int8.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers.serving_job import ADAPTERS, SEQUENCES, ServingJob
from workers import answer

from common import peak_mib, threads
from topwork.adapters.graft import Adapters
from topwork.generation.engine import Engine, EngineSettings
from topwork.generation.registry import Registry
from topwork.generation.requests import Request
from topwork.generation.sampling import Sampling
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import weight_bytes

HELD = {
    "bf16": QuantizationConfig(),
    "nf4": QuantizationConfig(load_in_4bit=True),
    "nf4_head8": QuantizationConfig(load_in_4bit=True, head="int8"),
}


class Ours:
    """A base, its registry with the job's adapters, and the engine."""

    def __init__(self, job: ServingJob, held: str) -> None:
        torch.set_num_threads(threads())
        self.job = job
        config = ModelConfig(model_name_or_path=job.model, device="cpu", dtype="bfloat16")
        base = load_base(config, lambda _: None, HELD[held])
        self.weight_bytes = weight_bytes(base.module)
        registry = Registry(base, Adapters(base.module, base.tokenizer))
        for number, folder in enumerate(job.adapters):
            registry.install(registry.prepare(f"a{number}", Path(folder)))
        self.adapters = [version.adapter for version in registry.versions()]
        self.engine = Engine(base, EngineSettings(batch_size=SEQUENCES), contents=registry.contents)
        self.runner = type(self.engine._runner).__name__  # for the record: which of the forms ran
        for arm in (self.alone, self.sixteen, self.sixteen_adapters):
            arm(-1)

    def alone(self, number: int) -> dict[str, Any]:
        return self._run(self.job.of_round(number)[:1], [None], number)

    def sixteen(self, number: int) -> dict[str, Any]:
        return self._run(self.job.of_round(number), [None] * SEQUENCES, number)

    def sixteen_adapters(self, number: int) -> dict[str, Any]:
        chosen = [self.adapters[at % ADAPTERS] for at in range(SEQUENCES)]
        return self._run(self.job.of_round(number), chosen, number)

    def _run(self, prompts: Sequence[list[int]], adapters: Sequence[str | None], number: int) -> dict[str, Any]:
        """All at once, until the last has its last token. Nothing is found cached: the salt is the round's own."""
        sampling, engine = Sampling(max_new_tokens=self.job.tokens), self.engine
        begun = time.perf_counter()
        ids = [
            engine.submit(Request(prompt, adapter, sampling=sampling, salt=f"{number} {len(prompts)}"))
            for prompt, adapter in zip(prompts, adapters)
        ]
        answers: dict[int, list[int]] = {id: [] for id in ids}
        first = 0.0
        while engine.busy:
            for event in engine.step():
                if event.token is not None:
                    answers[event.id].append(event.token)
            if not first and all(answers.values()):
                first = time.perf_counter() - begun
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "first_seconds": first, "answers": list(answers.values()), "peak_mib": peak_mib()}


def main(job: str, held: str) -> None:
    ours = Ours(ServingJob.read(job), held)
    arms = {"alone": ours.alone, "sixteen": ours.sixteen, "sixteen_adapters": ours.sixteen_adapters}
    answer(arms, weight_bytes=ours.weight_bytes, runner=ours.runner)


if __name__ == "__main__":
    main(*sys.argv[1:3])
