"""A step with LoRA on experts beside the same model in PEFT: the same weights, the same rows, in turns in one process.

    python benchmarks/expert_lora.py [--rounds 5] [--tokens 1024] [--adapters 1]

A Qwen3-MoE with random weights, few layers and narrow experts; LoRA on attention and on `gate_up_proj` and `down_proj`
of all experts. Rows are of one length, so that neither side pads. PEFT adds W + s B A of every expert in every pass;
here rows are multiplied with B and A. The first losses of both are compared. Peaks are of fresh processes. Writes
benchmarks/results/expert_lora.*.
"""

import argparse
import json
import time
from statistics import median, quantiles
from typing import Any

from common import BENCHMARKS, peak_mib, run_processes, surroundings, surroundings_text, table, write_record

ARMS = ("topwork", "peft")
DTYPES = ("bfloat16", "float32")
WARM_UP, PEAK_STEPS, LENGTH = 1, 2, 128
SHAPE: dict[str, Any] = {
    "hidden_size": 512, "moe_intermediate_size": 384, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
    "vocab_size": 4096, "max_position_embeddings": 512, "norm_topk_prob": True,
}  # fmt: skip
RANK: dict[str, Any] = {"r": 8, "lora_alpha": 16}
TARGETS: dict[str, Any] = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}  # fmt: skip


def model_of(dtype: str) -> Any:
    """The same random weights every time."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SHAPE), dtype=getattr(torch, dtype)).eval()


class Arm:
    """One side, with an optimizer of its own."""

    def __init__(self, name: str, dtype: str) -> None:
        import torch

        self.name = name
        self.parameters = self._peft(dtype) if name == "peft" else self._topwork(dtype)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)

    def _peft(self, dtype: str) -> list[Any]:
        from peft import LoraConfig, get_peft_model

        self.model = get_peft_model(model_of(dtype), LoraConfig(task_type="CAUSAL_LM", **RANK, **TARGETS))
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _topwork(self, dtype: str) -> list[Any]:
        from topwork.adapters.config import AdapterConfig
        from topwork.adapters.graft import Adapters
        from topwork.models.load import as_base

        self.base = as_base(model_of(dtype), None, "random", lambda _: None)  # type: ignore[arg-type]
        adapters = Adapters(self.base.module)
        adapters.add("a", AdapterConfig(**RANK, **TARGETS))
        return list(adapters.parameters("a").values())

    def step(self, tokens: int, seed: int) -> dict[str, float]:
        """Seconds and loss of one."""
        import torch

        rows = torch.randint(
            0, SHAPE["vocab_size"], (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(seed)
        )
        start = time.perf_counter()
        loss = self._loss_of_peft(rows) if self.name == "peft" else self._loss_here(rows)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"seconds": time.perf_counter() - start, "loss": loss}

    def _loss_of_peft(self, rows: Any) -> float:
        loss = self.model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        return float(loss)

    def _loss_here(self, rows: Any) -> float:
        import torch

        from topwork.ops.batch import Labels, batch_of

        batch = batch_of(list(rows), "a")
        positions = torch.tensor([at for at in range(rows.numel()) if (at + 1) % LENGTH])
        weights = torch.full((len(positions),), 1.0 / len(positions))
        labels = Labels(positions, batch.tokens[positions + 1], weights)
        gradient = -weights
        loss = (gradient * self.base.log_probabilities(replaced(batch, labels), gradient)).sum()
        loss.backward()
        return float(loss)


def replaced(batch: Any, labels: Any) -> Any:
    """A batch with labels."""
    from dataclasses import replace

    return replace(batch, labels=labels)


def in_turns(tokens: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Steps of both sides, the order changing every round."""
    arms = [Arm(name, dtype) for name in ARMS]
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for turn in range(WARM_UP + rounds):
        for arm in arms if turn % 2 else arms[::-1]:
            steps[arm.name].append(arm.step(tokens, seed=turn))
    return steps


def alone(tokens: int, dtype: str, name: str) -> dict[str, int]:
    """The peak of a process that does nothing else."""
    arm = Arm(name, dtype)
    for seed in range(PEAK_STEPS):
        arm.step(tokens, seed)
    return {"peak_mib": peak_mib()}


def told(record: dict[str, Any]) -> str:
    """The record for people."""
    head = ["base in", "side", "ms a step", "over PEFT's", "quartiles", "first loss", "peak, MiB"]
    rows = []
    for dtype in DTYPES:
        peft = record["steps"][dtype]["peft"]
        for name in ARMS:
            own = record["steps"][dtype][name]
            ratios = [one["seconds"] / other["seconds"] for one, other in zip(own[WARM_UP:], peft[WARM_UP:])]
            low, middle, high = quantiles(ratios, n=4)
            rows.append([
                dtype, name, f"{1e3 * median(step['seconds'] for step in own[WARM_UP:]):,.0f}", f"{middle:.3f}",
                f"{low:.3f}–{high:.3f}", f"{own[0]['loss']:.5f}", f"{record['peaks'][dtype][name]['peak_mib']:,}",
            ])  # fmt: skip
    shape = ", ".join(f"{key} {value}" for key, value in SHAPE.items())
    parts = [
        "# A step with LoRA on experts, beside PEFT",
        f"Qwen3-MoE with random weights ({shape}); LoRA of rank {RANK['r']} on attention and on the experts' two "
        f"parameters. {record['tokens']:,} tokens a step, rows of {LENGTH}; {record['rounds']} steps of each in turns "
        "after one to warm up, the ratio taken step by step. Peaks are of fresh processes.",
        table(head, rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--process", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process:
        dtype, _, name = asked.process.partition(" ")
        done = alone(asked.tokens, dtype, name) if name else in_turns(asked.tokens, asked.rounds, dtype)
        print(json.dumps(done))
        return
    options = ["--rounds", str(asked.rounds), "--tokens", str(asked.tokens)]
    found = run_processes("expert_lora", options, [f"{d}{p}" for d in DTYPES for p in ("", *(f" {n}" for n in ARMS))])
    record = {
        "tokens": asked.tokens, "rounds": asked.rounds,
        "steps": {dtype: found[dtype] for dtype in DTYPES},
        "peaks": {dtype: {name: found[f"{dtype} {name}"] for name in ARMS} for dtype in DTYPES},
        "surroundings": surroundings(),
    }  # fmt: skip
    text = told(record)
    write_record(BENCHMARKS / "results" / "expert_lora", record, text)
    print(text)


if __name__ == "__main__":
    main()
