"""PEFT in a bare loop, as one writes it by hand: padded batches, no checkpointing, bf16 adapters, fused AdamW.

    python -m peers.peft_loop JOB.json [lora|qlora|fp32_adapters]      (in benchmarks/)

lora           a base in bf16
qlora          the same on a base that bitsandbytes holds in NF4 with double quantization
fp32_adapters  as lora, with the adapters in fp32: PEFT's own default, slower

The rows end with the end of turn, as Topwork's do, so that tokens and losses compare one by one.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common import Chat, Job, measurement, read_chats

Row = tuple[list[int], int]
"""Token ids, and how many of them are the prompt."""


def encode(tokenizer: PreTrainedTokenizerBase, chat: Chat, max_length: int) -> Row:
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
    ids, before = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, prompt))
    return ids[:max_length], min(len(before), max_length)


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def collate(rows: Sequence[Row], padding: int) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [padding] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor(
            [[-100] * prompt + ids[prompt:] + [-100] * (longest - len(ids)) for ids, prompt in rows]
        ),
    }


def adapted(job: Job, mode: str = "lora", dtype: torch.dtype = torch.bfloat16) -> PeftModel:
    """The model with the job's first adapter, whose weights are in the base's type but for fp32_adapters."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    held = {"quantization_config": nf4} if mode == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=dtype, **held)
    initial = load_file(os.path.join(job.initial, "adapter_model.safetensors"))
    return with_adapter(model, job.r, job.lora_alpha, initial, torch.float32 if mode == "fp32_adapters" else dtype)


def with_adapter(
    model: PreTrainedModel, r: int, lora_alpha: int, initial: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> PeftModel:
    """A model with LoRA on all linear layers, its adapter in `dtype` and with these first weights, by PEFT's names."""
    config = LoraConfig(r=r, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    for parameter in trained_parameters(model):  # on a 4-bit base they would be in fp32, and every input cast to it
        parameter.data = parameter.data.to(dtype)
    missed = set_peft_model_state_dict(model, dict(initial))
    if missed.unexpected_keys or any("lora_" in key for key in missed.missing_keys):
        raise SystemExit("the initial adapter does not fit")
    return model


def train_step(
    model: PeftModel, optimizer: torch.optim.Optimizer, batches: Sequence[dict[str, torch.Tensor]], max_grad_norm: float
) -> tuple[float, float]:
    """One optimizer step: the mean loss, and the gradient's norm before it is cut. Of several batches the mean goes
    over the learned tokens of all."""
    trained, losses = trained_parameters(model), []
    counted = {}
    if len(batches) > 1:
        counted["num_items_in_batch"] = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for batch in batches:
        loss = model(**batch, **counted).loss
        loss.backward()
        losses.append(loss.detach())
    norm = clip_grad_norm_(trained, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(torch.stack(losses).sum()), float(norm)


def trained_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def main(path: str, mode: str = "lora") -> None:
    job = Job.read(path)
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    rows = [encode(tokenizer, chat, job.max_length) for chat in read_chats(job.ordered)]
    padding = padding_of(tokenizer)
    model = adapted(job, mode).train()
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / job.steps)
    losses, norms, tokens, seconds = [], [], [], []
    for step in range(job.steps):
        batch = collate(rows[step * job.batch : (step + 1) * job.batch], padding)
        start = time.perf_counter()
        loss, norm = train_step(model, optimizer, [batch], job.max_grad_norm)
        losses.append(loss)
        norms.append(norm)
        seconds.append(time.perf_counter() - start)
        tokens.append(int(batch["attention_mask"].sum()))
        schedule.step()
    print(json.dumps(measurement(losses, norms, tokens, seconds, threads=torch.get_num_threads())))


if __name__ == "__main__":
    main(*sys.argv[1:3])
