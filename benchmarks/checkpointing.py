"""Activation checkpointing of all layers beside none: the same losses, in less memory, for more time.

    python benchmarks/checkpointing.py [--rounds 10] [--model smollm2-135m] [--tokens 2048]

LoRA r16 on all linear layers, bf16, one pass of random rows of 150-300 tokens a step. Both arms train an adapter of
their own from the same weights on the same rows, in one process and in turns (which goes first changes every round);
peaks are of fresh processes. What autograd keeps is counted by its hooks and stands beside the estimate that `auto`
plans with. Writes benchmarks/results/checkpointing.*.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from common import BENCHMARKS, peak_mib, run_processes, surroundings, surroundings_text, table, write_record

if TYPE_CHECKING:
    from topwork.models.base import Base
    from topwork.ops.batch import Batch

ARMS = ("off", "full")
WARM_UP = 1
PEAK_STEPS = 2
MIB = 2**20


class Arm:
    """One adapter in training, of LoRA with options of its own, with its optimizer."""

    def __init__(self, base: "Base", adapters: Any, name: str, **options: float) -> None:
        import torch

        from topwork.adapters.config import AdapterConfig

        adapters.add(name, AdapterConfig(**{"r": 16, "lora_alpha": 32, **options}), seed=0)
        adapters.train(name)
        self.base, self.name = base, name
        self.parameters = list(adapters.parameters(name).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4, fused=True)

    def switch(self) -> None:
        """Checkpoint as this arm does."""
        from topwork.models.checkpointing import checkpoint_layers, decoder_layers

        checkpoint_layers(self.base, len(decoder_layers(self.base.module)) if self.name == "full" else 0)

    def step(self, tokens: int, seed: int) -> dict[str, float]:
        """One optimizer step over random rows, checkpointed as this arm is, timed."""
        batch = random_rows(self.base, tokens, seed, self.name)
        self.switch()
        return self.train([batch])

    def train(self, passes: "Sequence[Batch]") -> dict[str, float]:
        """One optimizer step over these passes, timed."""
        from topwork.objectives.sft import Sft
        from topwork.training.step import Learner, train_step

        start = time.perf_counter()
        learner = Learner(self.name, Sft(), self.parameters, self.optimizer, 1.0)
        [result] = train_step(self.base, [learner], passes)
        if isinstance(result, Exception):
            raise result
        return {"seconds": time.perf_counter() - start, "loss": result.loss, "grad_norm": result.grad_norm}


def random_rows(base: "Base", tokens: int, seed: int, adapter: str) -> "Batch":
    """Rows of 150-300 random tokens, `tokens` in all; the last half of each is learned."""
    from dataclasses import replace

    import torch

    from topwork.ops.batch import Labels, batch_of

    generator = torch.Generator().manual_seed(seed)
    rows, left = [], tokens
    while left:
        length = min(left, int(torch.randint(150, 301, (1,), generator=generator)))
        rows.append(torch.randint(0, base.module.config.vocab_size, (length,), generator=generator))
        left -= length
    batch = batch_of(rows, adapter).with_dropout_seeds(range(len(rows)))
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    learned = torch.cat([torch.arange((start + stop) // 2, stop - 1) for start, stop in spans])
    return replace(batch, labels=Labels(learned, batch.tokens[learned + 1], torch.ones(len(learned))))


def load(model: str, **quantization: Any) -> "Base":
    from topwork.models.config import ModelConfig
    from topwork.models.load import load_base
    from topwork.quantization.config import QuantizationConfig

    config = ModelConfig(model_name_or_path=model, dtype="bfloat16")
    return load_base(config, lambda _: None, QuantizationConfig.model_validate(quantization))


def both_arms(model: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Steps in turns, and what each arm keeps."""
    from topwork.adapters.graft import Adapters
    from topwork.models.fast import FastLayer

    base = load(model)
    adapters = Adapters(base.module)
    arms = [Arm(base, adapters, name) for name in ARMS]
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for turn in range(WARM_UP + rounds):
        for arm in arms if turn % 2 else arms[::-1]:
            steps[arm.name].append(arm.step(tokens, seed=turn))
    kept = {arm.name: kept_by(arm, tokens) for arm in arms}
    fast = [layer for layer in base.module.modules() if isinstance(layer, FastLayer)]
    return {"steps": steps, "kept": kept, "left_out": sum(layer.wiring.after_mlp is None for layer in fast)}


def kept_by(arm: Arm, tokens: int) -> dict[str, float]:
    """Bytes that a pass keeps by autograd's hooks, and by the estimate."""
    sys.path.insert(0, str(BENCHMARKS.parent / "tests"))
    from reference.kept import kept_bytes, kept_bytes_per_token
    from topwork.models.checkpointing import decoder_layers

    arm.switch()
    short, long = (random_rows(arm.base, count, 0, arm.name) for count in (tokens // 4, tokens))
    layers = len(decoder_layers(arm.base.module)) if arm.name == "full" else 0
    return {
        "bytes": kept_bytes(arm.base, long),
        "per_token": kept_bytes_per_token(arm.base, short, long),
        "estimate": planned_per_token(tokens, layers),
    }


def planned_per_token(tokens: int, layers: int) -> float:
    """What `auto` plans with, of SmolLM2 with this LoRA."""
    from topwork.adapters.config import AdapterConfig
    from topwork.adapters.sizes import tensor_sizes
    from topwork.models.config import ModelConfig
    from topwork.plan.base import structure_named
    from topwork.quantization.config import QuantizationConfig
    from topwork.training.memory import PassShape, Setup
    from topwork.training.memory_pass import pass_need
    from topwork.training.memory_setup import Member

    structure, adapter = structure_named(ModelConfig(model_name_or_path="smollm2-135m")), AdapterConfig(r=16)
    member = Member(adapter, "adamw", tensor_sizes(structure, adapter))
    setup = Setup(structure, "bfloat16", QuantizationConfig(), (member,))
    need = pass_need(setup, PassShape(tokens, tokens, tokens), layers)
    return (need.saved + need.heap) / tokens


def one_arm(model: str, tokens: int, name: str) -> dict[str, Any]:
    """The peak of a process that does nothing else."""
    from topwork.adapters.graft import Adapters

    base = load(model)
    arm = Arm(base, Adapters(base.module), name)
    loaded = peak_mib()
    for seed in range(PEAK_STEPS):
        arm.step(tokens, seed)
    return {"peak_mib": peak_mib(), "loaded_mib": loaded}


def told(found: dict[str, Any], peaks: dict[str, dict[str, Any]], tokens: int) -> str:
    """The table."""
    steps, kept = found["steps"], found["kept"]
    counted = {name: steps[name][WARM_UP:] for name in ARMS}
    ratios = [full["seconds"] / off["seconds"] for off, full in zip(*counted.values())]
    spread = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    same = {
        key: [step[key] for step in steps["off"]] == [step[key] for step in steps["full"]]
        for key in ("loss", "grad_norm")
    }
    worst = max(
        abs(full[key] / off[key] - 1) for off, full in zip(*steps.values()) for key in ("loss", "grad_norm")
    )  # fmt: skip
    figures = {
        "step, ms (median)": lambda name: f"{1e3 * median(step['seconds'] for step in counted[name]):,.0f}",
        f"kept by {tokens:,} tokens, MiB": lambda name: f"{kept[name]['bytes'] / MIB:,.1f}",
        "kept per token, bytes (hooks)": lambda name: f"{kept[name]['per_token']:,.0f}",
        "kept per token, bytes (estimate)": lambda name: f"{kept[name]['estimate']:,.0f}",
        "peak of a fresh process, MiB": lambda name: f"{peaks[name]['peak_mib']:,}",
        "of that before the first step, MiB": lambda name: f"{peaks[name]['loaded_mib']:,}",
        "last loss": lambda name: f"{steps[name][-1]['loss']:.6f}",
        "last gradient norm": lambda name: f"{steps[name][-1]['grad_norm']:.6f}",
    }
    rows = [[label, *(figure(name) for name in ARMS)] for label, figure in figures.items()]
    return "\n".join([
        table(["checkpointing", *ARMS], rows),
        "",
        f"Time, full / off: median {median(ratios):.3f} of {len(ratios)} pairs, quartiles {spread[0]:.3f} and "
        f"{spread[2]:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}.",
        f"Losses the same to the bit: {same['loss']}; gradient norms: {same['grad_norm']}; largest relative "
        f"difference {worst:.1e}, over {len(steps['off'])} steps.",
        f"Linear layers left out while recomputing: {found['left_out']}.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--process", choices=["both", *ARMS], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process == "both":
        print(json.dumps(both_arms(asked.model, asked.tokens, asked.rounds)))
    elif asked.process:
        print(json.dumps(one_arm(asked.model, asked.tokens, asked.process)))
    else:
        options = ["--rounds", str(asked.rounds), "--model", asked.model, "--tokens", str(asked.tokens)]
        done = run_processes("checkpointing", options, ("both", *ARMS))
        around, both = surroundings(), done.pop("both")
        shown = told(both, done, asked.tokens)
        title = f"# Checkpointing all layers beside none: {asked.model}, LoRA r = 16 on all linear layers, bf16"
        text = "\n\n".join([title, shown, surroundings_text(around)]) + "\n"
        record = {"tokens": asked.tokens, "model": asked.model, "both": both, "peaks": done, "surroundings": around}
        write_record(BENCHMARKS / "results" / "checkpointing", record, text)
        print(text)


if __name__ == "__main__":
    main()
