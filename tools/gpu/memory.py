"""What the plan foresees beside what was measured, from the files that the parts before left."""

import json
from typing import Any

from transformers import PretrainedConfig

from gpu.bases import shaped
from gpu.result import Result, main
from gpu.training import ALPHA, R
from topwork.adapters.config import AdapterConfig
from topwork.adapters.sizes import tensor_sizes
from topwork.models.skeleton import skeleton
from topwork.models.structure_of import structure_of
from topwork.quantization.config import QuantizationConfig
from topwork.training.memory import PassShape, Setup, peak
from topwork.training.memory_held import base_bytes
from topwork.training.memory_pass import logits_bytes, pass_need
from topwork.training.memory_setup import Member

CASES = (
    ("smollm2", "chats_memory", "bf16"),
    ("llama8b", "lora_memory", "bf16"),
    ("llama8b", "qlora_memory", "NF4 + DQ"),
)
"""A part, its table, and how the plan calls the base's type."""
MOST = 2.0
"""What a pass needs may be so many times what the plan foresees; not yet held to a card more closely."""


def part(result: Result) -> None:
    for name, table, held in CASES:
        with result.section(f"{name}, {table}"):
            file = result.path.with_name(f"{name}.json")
            left = json.loads(file.read_text("utf-8")) if file.exists() else {}
            measured = left.get(table)
            if measured is None:
                result.tell(f"{name} left no {table}, so nothing is compared")
                continue
            rows = compared(measured, shaped(left["shape"], result.tiny), held)
            result.put(f"{name}, {table}", rows)
            pass_bytes = measured["kept"] + measured["temporaries"]
            result.check(
                f"{name}, {table}: a pass over what is foreseen of it", pass_bytes / rows["pass"]["foreseen"], MOST
            )


def compared(measured: dict[str, Any], config: PretrainedConfig, held: str) -> dict[str, Any]:
    """By part: bytes foreseen and measured, and by how many percent the second is more."""
    tokens = measured["tokens"]
    adapter = AdapterConfig(r=R, lora_alpha=ALPHA)
    structure = structure_of(skeleton(config), fast=True)
    wanted = QuantizationConfig(load_in_4bit=held != "bf16")
    member = Member(adapter, "adamw", tensor_sizes(structure, adapter))
    setup = Setup(structure, "bfloat16", wanted, (member,), "cuda", process_bytes=0)
    shape = PassShape(tokens, tokens, tokens)
    need, weights = pass_need(setup, shape, 0), sum(base_bytes(setup))
    foreseen = {
        "weights": weights,
        "adapter_and_optimizer": measured["adapter_foreseen"],
        "kept": need.saved + need.heap,
        "pass": need.saved + need.heap + need.scratch + need.handoff + need.passing + sum(logits_bytes(setup, shape)),
        "peak": peak(setup, shape).bytes,
    }
    found = {**measured, "pass": measured["kept"] + measured["temporaries"]}
    return {
        name: {"foreseen": value, "measured": found[name], "percent_more": 100 * (found[name] / value - 1)}
        for name, value in foreseen.items()
    }


if __name__ == "__main__":
    main(part)
