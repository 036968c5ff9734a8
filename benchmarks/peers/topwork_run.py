"""Topwork's side: one call of its public API, figures from the run's metrics.jsonl.

python -m peers.topwork_run JOB.json [qlora]      (in benchmarks/)
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

import topwork
from common import Job, measurement
from topwork.recipe.recipe import Recipe, make_recipe


def recipe(job: Job, run: Path, mode: str) -> Recipe:
    """The job as a recipe; what is left out is as users get it."""
    return make_recipe(
        {
            "model": {"model_name_or_path": job.model_name, "dtype": "bfloat16", "device": "cpu"},
            "quantization": {"load_in_4bit": mode == "qlora"},
            "adapter": {"r": job.r, "lora_alpha": job.lora_alpha, "target_modules": "all-linear"},
            "data": {"train": job.rows, "eval_fraction": 0.0, "max_length": job.max_length, "too_long": "truncate"},
            "training": {
                "learning_rate": job.learning_rate,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0,
                "max_steps": job.steps,
                "batch_size": job.batch,
                "tokens_per_pass": job.tokens_per_pass,
                "max_grad_norm": job.max_grad_norm,
                "seed": job.seed,
                "save_steps": job.steps,
            },
            "output_dir": str(run),
        }
    )


def main(path: str, mode: str = "lora") -> None:
    job = Job.read(path)
    with tempfile.TemporaryDirectory() as work:
        done = topwork.train(recipe(job, Path(work) / "run", mode), log=lambda _: None)
        lines = (done.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        passes = json.loads((done.folder / "provenance.json").read_text(encoding="utf-8"))["tokens_per_pass"]
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    figures = ([step[key] for step in steps] for key in ("loss", "grad_norm", "tokens", "seconds"))
    more = {"threads": torch.get_num_threads(), "tokens_per_pass": passes}
    print(json.dumps(measurement(*figures, learned_tokens=[step["learned_tokens"] for step in steps], **more)))


if __name__ == "__main__":
    main(*sys.argv[1:3])
