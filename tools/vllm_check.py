"""What vLLM makes of an exported adapter; run by the Python of an environment that has vLLM, Topwork or not:

    python tools/vllm_check.py MODEL ADAPTER QUESTIONS.json ANSWERS.json

QUESTIONS is a list of prompts, each a list of token ids. ANSWERS gets, for the base and for the adapter, a greedy
answer of eight tokens to each, and the log-probabilities of the twenty likeliest tokens at every place of it (those of
the prompt's own tokens vLLM 0.32 cannot give beside a LoRA on a CPU). fp32 and no compiling, so that what is left
between it and us is the folder. `tests/export/test_vllm_itself.py` asks and compares.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

LENGTH, TOP = 8, 20


def main(model: str, adapter: str, questions: str, answers: str) -> None:
    """Ask, and write what it says."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    told = json.loads((Path(adapter) / "export.json").read_text())
    engine = LLM(
        model=model, enable_lora=True, max_loras=1, max_lora_rank=told["figures"]["max_lora_rank"], dtype="float32",
        enforce_eager=True, max_model_len=256, max_num_seqs=4, skip_tokenizer_init=True,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(questions).read_text())]
    asked = SamplingParams(temperature=0.0, max_tokens=LENGTH, logprobs=TOP, ignore_eos=True, detokenize=False)
    found: dict[str, Any] = {}
    for name, request in (("base", None), ("adapter", LoRARequest("exported", 1, adapter))):
        found[name] = [
            {
                "tokens": list(each.outputs[0].token_ids),
                "places": [
                    {number: said.logprob for number, said in place.items()} for place in each.outputs[0].logprobs
                ],
            }
            for each in engine.generate(prompts, asked, lora_request=request)
        ]
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:5])
