"""PEFT's `add_weighted_adapter` on adapters' folders, for benchmarks/combine_tasks.py. Prints one JSON line.

    python -m peers.peft_combine BASE_FOLDER JOB.json      (in benchmarks/)

A job is {"adapters": [folders], "weights": [...], "type": "ties", "density": 0.5, "svd_rank": 16, "out": folder}; its
result is a PEFT folder. What drops at random is drawn by seed 0. What PEFT refuses is told as the line's `error`.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

COMBINED = "combined"


def main() -> None:
    print(json.dumps({"error": combined(sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8")))}))


def combined(base: str, job: dict[str, Any]) -> str:
    """Write one result; says what went wrong, or nothing."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = [f"a{number}" for number in range(len(job["adapters"]))]
    model = PeftModel.from_pretrained(model, job["adapters"][0], adapter_name=names[0])
    for name, folder in zip(names[1:], job["adapters"][1:]):
        model.load_adapter(folder, adapter_name=name)
    options = {key: job[key] for key in ("density", "svd_rank") if job.get(key) is not None}
    torch.manual_seed(0)
    try:
        model.add_weighted_adapter(names, job["weights"], COMBINED, combination_type=job["type"], **options)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return str(error)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[COMBINED])
        shutil.copytree(Path(folder) / COMBINED, job["out"], dirs_exist_ok=True)
    return ""


if __name__ == "__main__":
    main()
