"""Gradients in bf16 beside the truth in fp32: one step's mean loss on rows of GSM8K, by every tensor of an adapter.

    python benchmarks/gradients.py --data-dir DATA [--rows 8] [--model smollm2-135m] [--out OUT]

The truth is transformers + PEFT in fp32. Beside it stand Topwork in bf16 (the fast path) and in fp32, both on plain
torch alone as well ("plain": TOPWORK_NO_NATIVE=1), and PEFT in bf16: how far the peer is. Base and adapter have the
same values everywhere, those of bf16, so that only the arithmetic differs. B is random, of the size that it has after
some hundred steps (at zero, as an adapter begins, A has no gradient). Each arm is a fresh process. The goal: a cosine
of 0.999 or more on every tensor. Writes benchmarks/results/gradients.*, or OUT.*.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from common import (
    BENCHMARKS,
    model_argument,
    read_rows,
    run_process,
    surroundings,
    surroundings_text,
    table,
    write_chats,
    write_record,
)

if TYPE_CHECKING:
    from torch import Tensor

TRUTH = "peft fp32"
ARMS = {
    TRUTH: ("peft", "float32", {}),
    "topwork bf16": ("topwork", "bfloat16", {}),
    "topwork fp32": ("topwork", "float32", {}),
    "topwork fp32 plain": ("topwork", "float32", {"TOPWORK_NO_NATIVE": "1"}),
    "topwork bf16 plain": ("topwork", "bfloat16", {"TOPWORK_NO_NATIVE": "1"}),
    "peft bf16": ("peft", "bfloat16", {}),
}
"""Name -> system, type, variables of the environment."""
GOAL = 0.999
B_STD = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--b-std", type=float, default=B_STD, help="standard deviation of the adapter's B")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"comma-separated, of {', '.join(ARMS)}")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "gradients")
    given = parser.parse_args()
    names = [TRUTH, *(name for name in ARMS if name in given.arms.split(",") and name != TRUTH)]
    with tempfile.TemporaryDirectory() as work:
        ready = prepared(given, Path(work))
        arms = {name: measured(name, ready["job"], Path(work)) for name in names}
    record = {
        "model": ready["model"], "rows": given.rows, "b_std": given.b_std, "goal": GOAL, "truth": TRUTH,
        "arms": arms, "surroundings": surroundings(),
    }  # fmt: skip
    write_record(given.out, record, text(record))
    print(text(record))


def prepared(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """A job of one step whose adapter has a B, in values of bf16."""
    rows = work / "rows.jsonl"
    write_chats(rows, read_rows("gsm8k", given.data_dir))
    options = json.dumps({"steps": 1, "batch": given.rows})
    ready = run_process("peers.prepare", model_argument(given.model), str(rows), str(work), options)
    if "error" in ready:
        sys.exit(f"peers.prepare: {ready['error']}")
    randomize(work / "initial" / "adapter_model.safetensors", given.b_std)
    return ready


def randomize(path: Path, std: float) -> None:
    """Give every B of an adapter's file seeded normal values, and round everything to bf16."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = load_file(path)
    for name in sorted(tensors):
        if "lora_B" in name:
            tensors[name].normal_(0.0, std, generator=generator)
    save_file({name: tensor.bfloat16().float() for name, tensor in tensors.items()}, path)


def measured(name: str, job: str, work: Path) -> dict[str, Any]:
    """One arm in a process of its own, laid beside the truth, which is the first to run."""
    from safetensors.torch import load_file

    system, dtype, variables = ARMS[name]
    own, truth = (work / f"{arm}.safetensors" for arm in (name, TRUTH))
    told = run_process("peers.gradients_of", job, system, dtype, str(own), variables=variables)
    if "error" in told:
        sys.exit(f"{name}: {told['error']}")
    result = {**told, **compared(load_file(own), load_file(truth))}
    print(f"{name}: loss {told['loss']:.6f}, lowest cosine {min(result['cosines'].values()):.6f}", flush=True)
    return result


def compared(found: "dict[str, Tensor]", truth: "dict[str, Tensor]") -> dict[str, Any]:
    """Each tensor's cosine with the truth, the whole gradient's norm and the distance from the truth's.

    Sums are taken in fp64. Exits where the two do not have the same tensors.
    """
    if found.keys() != truth.keys():
        sys.exit(f"the gradients are not of the same tensors: {sorted(found.keys() ^ truth.keys())[:3]}")
    cosines, squares, apart = {}, 0.0, 0.0
    for name, own in sorted(found.items()):
        mine, theirs = own.double().flatten(), truth[name].double().flatten()
        cosines[name] = float(mine @ theirs / (mine.norm() * theirs.norm()))
        squares += float(mine @ mine)
        apart += float((mine - theirs).square().sum())
    return {"cosines": cosines, "norm": squares**0.5, "distance": apart**0.5}


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    truth = record["arms"][record["truth"]]
    head = ["beside the truth", "lowest cosine", "quartiles", f"≥ {GOAL}", "loss", "gradient's norm", "its distance"]
    lines, sentences = [], []
    for name, arm in record["arms"].items():
        if name == record["truth"]:
            continue
        cosines = arm["cosines"]
        spread = ", ".join(f"{quartile:.6f}" for quartile in quantiles(cosines.values(), n=4))
        good = sum(cosine >= GOAL for cosine in cosines.values())
        lines.append([
            name, f"{min(cosines.values()):.6f}", spread, f"{good} of {len(cosines)}",
            f"{arm['loss'] / truth['loss'] - 1:+.1e}", f"{arm['norm'] / truth['norm'] - 1:+.1e}",
            f"{arm['distance'] / truth['norm']:.1e}",
        ])  # fmt: skip
        worst = sorted(cosines, key=lambda key: cosines[key])[:3]
        sentences.append(f"- {name}, the lowest: " + ", ".join(f"`{key}` {cosines[key]:.6f}" for key in worst))
    return "\n\n".join([
        f"# Gradients beside the truth in fp32: {record['model']}, LoRA r = 16 on all linear layers",
        f"The mean loss of {record['rows']} rows of GSM8K ({truth['tokens']:,} tokens, {truth['learned_tokens']:,} "
        f"learned) by each of the adapter's {len(truth['cosines'])} tensors; B random with standard deviation "
        f"{record['b_std']}. The truth is transformers + PEFT in fp32: loss {truth['loss']:.6f}, norm "
        f"{truth['norm']:.6f}. Cosines are of each tensor; loss, norm and distance are relative.",
        table(head, lines),
        "\n".join(sentences),
        surroundings_text(record["surroundings"]),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
