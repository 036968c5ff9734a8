"""What rounding makes of right merges: base with adapter against the merged model, by method and type.

    python benchmarks/merge_rounding.py [--model smollm2-135m]

The adapters are random, of sizes that move the base by what short trainings do (`adapter KL`). The inputs are the texts
that `topwork merge` brings. The last row is the base in bf16 against itself in fp32: what storing it costs. The limits
of `merging/threshold.py` follow from this. Writes benchmarks/results/merge_rounding.*
"""

import argparse
import gc
from dataclasses import asdict
from typing import Any

import torch

from common import BENCHMARKS, surroundings, surroundings_text, table, write_record
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.merging.merge import merge
from topwork.merging.verify import Measurement, compare, measure, verify
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.run.merging.inputs import TEXTS

LORA = {"r": 16, "lora_alpha": 32}
CASES: dict[str, tuple[dict[str, Any], float, str]] = {
    "LoRA, light": (LORA, 0.001, "bfloat16"),
    "LoRA": (LORA, 0.01, "bfloat16"),
    "LoRA, strong": (LORA, 0.03, "bfloat16"),
    "DoRA": ({**LORA, "use_dora": True}, 0.01, "bfloat16"),
    "IA3": ({"method": "ia3"}, 0.1, "bfloat16"),
    "full": ({"method": "full"}, 0.001, "bfloat16"),
    "LoRA in fp16": (LORA, 0.01, "float16"),
    "LoRA in fp32": (LORA, 0.01, "float32"),
    "LoRA in fp32, strong": (LORA, 0.03, "float32"),
}
"""Name -> options, the standard deviation of what is added to every tensor but A, and the type."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    given = parser.parse_args()
    record: dict[str, Any] = {"model": given.model, "surroundings": surroundings(), "cases": {}}
    for name, (options, deviation, dtype) in CASES.items():
        record["cases"][name] = {"dtype": dtype, **case(given.model, AdapterConfig(**options), deviation, dtype)}
        print(name, record["cases"][name], flush=True)
        gc.collect()
    record["storing"] = vars(compare(bare(given.model, "float32").logits, bare(given.model, "bfloat16").logits))
    write_record(BENCHMARKS / "results" / "merge_rounding", record, text(record))


def case(model: str, config: AdapterConfig, deviation: float, dtype: str) -> dict[str, Any]:
    """One adapter, merged in memory."""
    base = opened(model, dtype)
    adapters, generator = Adapters(base.module), torch.Generator().manual_seed(0)
    adapters.add("a", config)
    with torch.no_grad():
        for key, parameter in adapters.parameters("a").items():
            if "lora_A" not in key:
                parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))
    unmerged, alone = measure(base, inputs(base), "a"), measure(base, inputs(base), None)
    merge(base, adapters, "a")
    distance = compare(unmerged.logits, alone.logits).mean_kl
    return asdict(verify(unmerged, measure(base, inputs(base), None), distance))


def bare(model: str, dtype: str) -> Measurement:
    """The base by itself."""
    base = opened(model, dtype)
    return measure(base, inputs(base), None)


def opened(model: str, dtype: str) -> Base:
    """On the CPU."""
    config = ModelConfig.model_validate({"model_name_or_path": model, "dtype": dtype, "device": "cpu"})
    return load_base(config, lambda _: None)


def inputs(base: Base) -> list[list[int]]:
    """As the merge of an adapter alone is checked."""
    return [list(base.tokenizer(text).input_ids) for text in TEXTS]


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    rows = [[name, *figures(found), f"{found['adapter_kl']:.1e}"] for name, found in record["cases"].items()]
    rows.append(["the base in bf16 against fp32", *figures(record["storing"]), ""])
    head = ["merged", "KL, nats a token", "same likeliest token", "largest logit difference, relative", "adapter KL"]
    parts = [
        f"# Rounding of right merges: {record['model']}, {len(TEXTS)} texts",
        "Base with adapter against the merged model; `adapter KL` is of the bare base from base with adapter.",
        table(head, rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def figures(found: dict[str, Any]) -> list[str]:
    """Of one comparison."""
    return [
        f"{found['mean_kl']:.1e}", f"{found['top1_agreement']:.1%}", f"{found['largest_relative_difference']:.1e}"
    ]  # fmt: skip


if __name__ == "__main__":
    main()
