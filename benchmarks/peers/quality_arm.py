"""One arm and one seed of `benchmarks/qlora_quality.py`: train, then grade. Prints one JSON line.

    python -m peers.quality_arm JOB.json

An adapter arm is `topwork train` from a recipe. Full fine-tuning is the yardstick: every parameter of a bf16 model with
fp32 masters, the same rows in the same order, the same schedule and clipping, at a tenth of the learning rate.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from topwork.data.batches import step_indices, steps_per_epoch
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig
from topwork.data.examples import load_data
from topwork.evaluation.score import questions_of, score
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.objectives.sft import Sft
from topwork.recipe.recipe import make_recipe
from topwork.run.folder import ADAPTER_NAME
from topwork.run.opened import open_run
from topwork.run.train import train
from topwork.training.config import TrainingConfig
from topwork.training.passes import step_passes
from topwork.training.schedule import learning_rate
from topwork.training.schedule import planned_steps

TOKENS_PER_PASS = 4096


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    trained = full(job) if job["arm"] == "full" else adapter(job)
    base, name, template, losses, grad_norms = trained
    held = load_data(DataConfig(train=job["test"], eval_fraction=0.0), base.tokenizer, base.context_length, 0, quiet)
    questions = questions_of(held.train_conversations, template) if job["graded"] else []
    scores = score(base, name, questions, held.train, template, "exact_match", 24, 64)
    right = "".join(str(int(grade.exact)) for grade in scores.grades)
    print(json.dumps({**scores.summary, "right": right, "losses": losses, "grad_norms": grad_norms}))


def adapter(job: dict[str, Any]) -> tuple[Base, str, ChatTemplate, list[float], list[float]]:
    """LoRA or QLoRA."""
    values = {
        "model": {"model_name_or_path": job["model"]},
        "quantization": job["quantization"],
        "adapter": job["adapter"],
        "data": {"train": job["train"], "eval_fraction": 0.0},
        "training": {**job["training"], "tokens_per_pass": TOKENS_PER_PASS},
        "output_dir": job["work"],
    }
    run = train(make_recipe(values), overwrite=True, log=quiet)
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    opened = open_run(run.folder, log=quiet)
    curves = [[record[key] for record in steps] for key in ("loss", "grad_norm")]
    return opened.base, ADAPTER_NAME, opened.template, curves[0], curves[1]


def full(job: dict[str, Any]) -> tuple[Base, None, ChatTemplate, list[float], list[float]]:
    """Every parameter."""
    config = TrainingConfig.model_validate(job["training"])
    torch.manual_seed(config.seed)
    base = load_base(ModelConfig(model_name_or_path=job["model"]), quiet)
    data = load_data(DataConfig(train=job["train"], eval_fraction=0.0), base.tokenizer, base.context_length, 0, quiet)
    own = list(base.module.requires_grad_(True).parameters())
    masters = [parameter.detach().float() for parameter in own]
    optimizer = torch.optim.AdamW(masters, weight_decay=config.weight_decay, fused=True)
    steps = planned_steps(config, steps_per_epoch(len(data.train), config.batch_size))
    losses, norms = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        indices = step_indices(len(data.train), config.batch_size, config.seed, step)
        loss, norm = full_step(base, own, masters, [data.train[i] for i in indices], config.max_grad_norm)
        optimizer.step()
        for parameter, master in zip(own, masters):
            parameter.data.copy_(master)
            parameter.grad = master.grad = None
        losses.append(loss)
        norms.append(norm)
    base.module.requires_grad_(False)
    return base, None, ChatTemplate(base.tokenizer), losses, norms


def full_step(
    base: Base, own: list[torch.nn.Parameter], masters: list[torch.Tensor], rows: list[Any], largest: float
) -> tuple[float, float]:
    """Gradients of one step's mean loss into the masters, clipped; returns loss and norm."""
    total, count, objective = 0.0, 0.0, Sft()
    for batch in step_passes([(None, rows)], TOKENS_PER_PASS, base.device):
        loss = objective(base.log_probabilities(batch, objective.gradient(batch)), batch)
        loss.total.backward()
        total, count = total + float(loss.total.detach()), count + loss.count
    for parameter, master in zip(own, masters):
        assert parameter.grad is not None
        master.grad = parameter.grad.float() / count
    norm = float(torch.nn.utils.get_total_norm([master.grad for master in masters]))
    if norm > largest:
        torch._foreach_mul_([master.grad for master in masters], largest / (norm + 1e-6))
    return total / count, norm


def quiet(_: str) -> None:
    """Nobody reads along."""


if __name__ == "__main__":
    main()
