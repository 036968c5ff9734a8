"""The gradients of one step's mean loss by an adapter's tensors, as one system and type computes them.

    python -m peers.gradients_of JOB.json topwork|peft bfloat16|float32 OUT.safetensors      (in benchmarks/)

All rows of the job at once. Tensors are named as in a PEFT folder, without `base_model.model.`. Base and adapter have
the same values in either type: those of bf16. Prints the loss and what went through as one JSON line.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peers.peft_loop import adapted, collate, encode, padding_of, trained_parameters
from peers.topwork_step import open_adapted, read_examples
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from common import Job, read_chats

PREFIX = "base_model.model."


class Keep(torch.optim.Optimizer):
    """Takes the step's gradients in place of stepping."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        super().__init__(parameters.values(), {})
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.found: dict[str, Tensor] = {}

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        self.found = {self.names[id(p)]: p.grad.detach().float().clone() for p in own if p.grad is not None}


def of_topwork(job: Job, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """By Topwork's training step, in one pass, unclipped."""
    trained = open_adapted(job.model_name, job.r, job.lora_alpha, dtype)
    initial = load_file(Path(job.initial) / "adapter_model.safetensors")
    trained.load({key.removeprefix(PREFIX): tensor for key, tensor in initial.items()})
    examples = read_examples(trained.base, job.ordered, job.max_length)
    passes = trained.passes(examples, sum(len(example.tokens) for example in examples))
    keep = Keep(trained.parameters)
    result = trained.step(passes, keep, max_grad_norm=0.0)
    return keep.found, {"loss": result.loss, "tokens": result.tokens, "learned_tokens": result.learned_tokens}


def of_peft(job: Job, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """By transformers and PEFT, in one padded batch."""
    model = adapted(job, dtype=torch.bfloat16).to(getattr(torch, dtype)).train()
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    rows = [encode(tokenizer, chat, job.max_length) for chat in read_chats(job.ordered)]
    batch = collate(rows, padding_of(tokenizer))
    loss = model(**batch).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in trained_parameters(model))
    found = {
        name.removeprefix(PREFIX).replace(".default", ""): parameter.grad.float()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    learned = int((batch["labels"] != -100).sum())
    return found, {
        "loss": float(loss.detach()),
        "tokens": int(batch["attention_mask"].sum()),
        "learned_tokens": learned,
    }


def main(path: str, system: str, dtype: str, out: str) -> None:
    found, told = {"topwork": of_topwork, "peft": of_peft}[system](Job.read(path), dtype)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:5])
