"""TRL + PEFT, as its users run it. (Not `trl.py`: a script beside it would import that instead of TRL.)

    python -m peers.trl_sft JOB.json default|tuned|packed|qlora      (in benchmarks/)

default  SFTTrainer's own settings, which include gradient checkpointing
tuned    without gradient checkpointing
packed   also packed into sequences of max_length, as many per step as hold the tokens of the job's batch
qlora    as tuned, on a base that bitsandbytes holds in NF4 with double quantization

TRL learns the line break that the template puts after the end of turn; Topwork does not: one token more per row here.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from common import MAX_ROWS, Chat, Job, measurement, read_chats


class Timer(TrainerCallback):
    """Seconds from the start of a step to its end, and what is logged after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.logs: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.logs.append(dict(logs))


def sequences_per_step(job: Job, mode: str, chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> int:
    """The job's batch; when packed, the number of full sequences with about as many tokens."""
    if mode != "packed":
        return job.batch
    sample = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats[:200]]
    tokens = sum(min(job.max_length, len(ids)) for ids in tokenizer(sample)["input_ids"]) / len(sample)
    return max(1, round(job.batch * tokens / job.max_length))


def settings(job: Job, mode: str, sequences: int, out: str) -> SFTConfig:
    """Rows are visited in the order given, except when packed, which gives them another order anyway."""
    tuned = {} if mode == "default" else {"gradient_checkpointing": False, "packing": mode == "packed"}
    return SFTConfig(
        output_dir=out, max_steps=job.steps, per_device_train_batch_size=sequences, learning_rate=job.learning_rate,
        max_grad_norm=job.max_grad_norm, max_length=job.max_length, bf16=True, use_cpu=True, logging_steps=1,
        train_sampling_strategy="random" if mode == "packed" else "sequential", seed=job.seed, report_to=[],
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **tuned,
    )  # fmt: skip


def set_initial(model: PeftModel, folder: str) -> None:
    """The same first weights as Topwork's."""
    missed = set_peft_model_state_dict(model, load_file(os.path.join(folder, "adapter_model.safetensors")))
    lora = [key for key in missed.missing_keys if "lora_" in key]
    if missed.unexpected_keys or lora:
        raise SystemExit(f"the initial adapter does not fit: unexpected {missed.unexpected_keys}, missing {lora}")


def main(path: str, mode: str) -> None:
    job = Job.read(path)
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    chats = read_chats(job.rows)[:MAX_ROWS] if mode == "packed" else read_chats(job.ordered)
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
    sequences, timer = sequences_per_step(job, mode, chats, tokenizer), Timer()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    held = {"quantization_config": nf4} if mode == "qlora" else {}
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=torch.bfloat16, **held),
            args=settings(job, mode, sequences, out),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[timer],
            peft_config=LoraConfig(
                r=job.r, lora_alpha=job.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        set_initial(trainer.model, job.initial)
        trainer.train()
    losses, norms, seen = ([float(log[key]) for log in timer.logs] for key in ("loss", "grad_norm", "num_tokens"))
    tokens = [round(after - before) for before, after in zip([0.0, *seen], seen, strict=False)]
    more = {"threads": torch.get_num_threads(), "sequences_per_step": sequences}
    print(json.dumps(measurement(losses, norms, tokens, timer.seconds, **more)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
