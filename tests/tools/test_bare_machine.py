"""What a machine without `datasets` can still do: all that does not read a table from the Hub."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT = ("datasets", "gguf", "trl", "bitsandbytes", "matplotlib", "tensorboard")
SCRIPT = f"""
import sys
sys.modules.update(dict.fromkeys({WITHOUT!r}))  # importing one of them fails

import torch
import topwork
from gpu.bases import random_base, rows_of, shaped
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.objectives.sft import Sft
from topwork.training.passes import step_passes
from topwork.training.step import Learner, train_step

for name in topwork.__all__:
    getattr(topwork, name)
base = random_base(shaped("smollm2-135m", tiny=True), torch.device("cpu"))
adapters = topwork.Adapters(base.module)
adapters.add("one", topwork.AdapterConfig(r=4, lora_alpha=8), seed=0)
parameters = list(adapters.parameters("one").values())
learner = Learner("one", Sft(), parameters, torch.optim.AdamW(parameters, lr=1e-3), 1.0)
[done] = train_step(base, [learner], step_passes([("one", rows_of([7, 5], 64, 0))], 64, base.device))
tokens = generate(base, [[3, 4, 5]], ["one"], (), Sampling(max_new_tokens=3))
print("trained", done.tokens, "generated", len(tokens[0]))
"""


def test_without_datasets_a_base_in_memory_is_trained_on_and_asked() -> None:
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tools", "benchmarks"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained 12 generated 3"
