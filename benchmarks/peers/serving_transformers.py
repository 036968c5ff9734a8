"""transformers' generate, and PEFT's mixed batch under it (`workers.py`).

    python -m peers.serving_transformers JOB plain|peft      (in benchmarks/)

bf16, prompts padded on the left. PEFT's adapters are bf16 too, which is the faster of its ways.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from peers.serving_job import ADAPTERS, SEQUENCES, ServingJob
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from workers import answer

from common import peak_mib, threads


class _Clock(StoppingCriteria):
    """When the first token had come; it stops nothing."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Theirs:
    """A model, with the job's adapters where PEFT is asked for."""

    def __init__(self, job: ServingJob, kind: str) -> None:
        torch.set_num_threads(threads())
        self.job = job
        model: Any = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.bfloat16).eval()
        if kind == "peft":
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, job.adapters[0], "a0", autocast_adapter_dtype=False)
            for number, folder in enumerate(job.adapters[1:], 1):
                model.load_adapter(folder, f"a{number}", autocast_adapter_dtype=False)
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.bfloat16() if "lora_" in name else parameter.data
            model.eval()
        self.model = model

    def alone(self, number: int) -> dict[str, Any]:
        return self._run(self.job.of_round(number)[:1])

    def sixteen(self, number: int) -> dict[str, Any]:
        return self._run(self.job.of_round(number))

    def sixteen_adapters(self, number: int) -> dict[str, Any]:
        names = [f"a{at % ADAPTERS}" for at in range(SEQUENCES)]
        return self._run(self.job.of_round(number), adapter_names=names)

    @torch.no_grad()
    def _run(self, prompts: Sequence[list[int]], **more: Any) -> dict[str, Any]:
        longest, clock = max(map(len, prompts)), _Clock()
        begun = time.perf_counter()
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=self.job.tokens, do_sample=False, eos_token_id=-1,
            pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]), **more,
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        return {
            "seconds": seconds, "first_seconds": clock.first - begun, "answers": found[:, longest:].tolist(),
            "peak_mib": peak_mib(),
        }  # fmt: skip


def main(job: str, kind: str) -> None:
    theirs = Theirs(ServingJob.read(job), kind)
    if kind == "peft":
        arms = {"sixteen_adapters": theirs.sixteen_adapters}
    else:
        arms = {"alone": theirs.alone, "sixteen": theirs.sixteen}
    for arm in arms.values():
        arm(-1)
    answer(arms)


if __name__ == "__main__":
    main(*sys.argv[1:3])
