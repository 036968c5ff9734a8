"""What the plan foresees beside what was measured, from the files that the parts before left."""

import json
from typing import Any

from transformers import PretrainedConfig

from gpu.bases import shaped
from gpu.result import Result, main
from topwork.models.skeleton import skeleton
from topwork.plan.footprint import footprint
from topwork.training.passes import activation_bytes_per_token, kept_bytes_per_token

CASES = (
    ("smollm2", "chats_memory", "bf16"),
    ("llama8b", "lora_memory", "bf16"),
    ("llama8b", "qlora_memory", "NF4 + DQ"),
)
"""A part, its table, and how the plan calls the base's type."""
MOST = 2.0
"""What a pass needs may be so many times what the plan foresees: it plans with half of the free memory."""


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
    weights = next(row.total_bytes for row in footprint(skeleton(config)) if row.name == held)
    foreseen = {
        "weights": weights,
        "adapter_and_optimizer": measured["adapter_foreseen"],
        "kept": tokens * kept_bytes_per_token(config),
        "pass": tokens * activation_bytes_per_token(config),
    }
    foreseen["peak"] = foreseen["weights"] + foreseen["adapter_and_optimizer"] + foreseen["pass"]
    found = {**measured, "pass": measured["kept"] + measured["temporaries"]}
    return {
        name: {"foreseen": value, "measured": found[name], "percent_more": 100 * (found[name] / value - 1)}
        for name, value in foreseen.items()
    }


if __name__ == "__main__":
    main(part)
