"""One epoch of banking77 in TRL + PEFT: the peer's half of `benchmarks/banking77.py`, as its users would write it.

    python benchmarks/peers/trl_banking77.py MODEL_DIR TRAIN_JSONL OUT_DIR

Writes the adapter as a PEFT folder, which `topwork eval --adapter` grades with the same grader as ours,
and OUT_DIR/result.json. Its fifteen warm-up steps begin at rate zero and ours at a sixteenth of the peak; from there on
the rates are the same.
"""

import json
import os
import resource
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main(model_dir: str, train: str, out: str) -> None:
    torch.set_num_threads(os.cpu_count())
    with open(train, encoding="utf-8") as lines:
        chats = [json.loads(line)["messages"] for line in lines]
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
    config = SFTConfig(
        output_dir=out, num_train_epochs=1, per_device_train_batch_size=32, learning_rate=5e-4,
        lr_scheduler_type="cosine", warmup_steps=15, bf16=True, use_cpu=True, gradient_checkpointing=False,
        logging_steps=10, report_to=[], max_length=512, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    start = time.perf_counter()
    trainer.train()
    trainer.save_model(out)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "seconds": round(time.perf_counter() - start, 1),
        "tokens": int(logs[-1]["num_tokens"]),
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [entry["grad_norm"] for entry in logs],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    with open(os.path.join(out, "result.json"), "w") as file:
        json.dump(result, file)
    print(json.dumps({key: result[key] for key in ("seconds", "tokens", "peak_mib")}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
