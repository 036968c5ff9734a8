"""Write docs/footprint.md: bytes of weights by type, measured of SmolLM2 and computed for larger shapes.

    python tools/footprint_table.py

Computed from configurations alone, as `topwork quantize MODEL --analyze` does; tests/plan/test_footprint.py holds the
computed figures to those of loaded models.
"""

from pathlib import Path

from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.skeleton import skeleton
from topwork.plan.built import config_of
from topwork.plan.footprint import FootprintRow, footprint
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import weight_bytes

ROOT = Path(__file__).parents[1]
MEASURED = "smollm2-135m"
SHAPES = {"7B": "llama-2-7b", "8B": "llama-3-8b", "13B": "llama-2-13b", "70B": "llama-3-70b"}
RECIPES = {
    "fp32": ("float32", QuantizationConfig()),
    "bf16": ("bfloat16", QuantizationConfig()),
    "int8": ("bfloat16", QuantizationConfig(load_in_8bit=True)),
    "NF4": ("bfloat16", QuantizationConfig(load_in_4bit=True, bnb_4bit_use_double_quant=False)),
    "NF4 + DQ": ("bfloat16", QuantizationConfig(load_in_4bit=True)),
}
HEAD = """# What weights take

Written by `python tools/footprint_table.py`. Quantized are the linear layers but the output head, in blocks of 64 (int8
by row); embeddings, head, norms and biases stay in 16 bits (fp32: 32). Counted is all that is held: codes, constants,
with double quantization (DQ) the constants' own constants and each layer's map of 1 KiB (on the CPU all layers share
one, so these bytes are counted and not taken there). Tied weights count once. Not counted are activations, an adapter
and its optimizer's state. A base is packed while it is read: 16-bit weights never stand in memory whole. MiB are 2^20
bytes, GiB 2^30.
"""
NOTE = "A small model saves less: a fifth of SmolLM2's parameters are its embedding, which stays in 16 bits."


def main() -> None:
    model = skeleton(config_of(MEASURED))
    parts = [
        HEAD,
        f"## {MEASURED}, measured\n\nSummed over the tensors of loaded models; `computed` is from its configuration.\n",
        "| weights held as | measured, bytes | computed, bytes | measured, MiB | of bf16 |",
        "| --- | ---: | ---: | ---: | ---: |",
        *_measured({row.name: row for row in footprint(model)}),
        f"\n{NOTE}\n\n## Larger models, computed\n\nTotal in GiB; in brackets the share of bf16.\n",
        "| shape | parameters | " + " | ".join(RECIPES) + " |",
        "| --- | ---: | " + " | ".join(["---:"] * len(RECIPES)) + " |",
        *(_computed(size, name) for size, name in SHAPES.items()),
    ]
    (ROOT / "docs" / "footprint.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


def _measured(computed: dict[str, FootprintRow]) -> list[str]:
    held = {}
    for name, (dtype, quantization) in RECIPES.items():
        config = ModelConfig.model_validate({"model_name_or_path": MEASURED, "dtype": dtype, "device": "cpu"})
        held[name] = weight_bytes(load_base(config, lambda _: None, quantization).module)
    return [
        f"| {name} | {count:,} | {computed[name].total_bytes:,} | {count / 2**20:,.1f} | {count / held['bf16']:.1%} |"
        for name, count in held.items()
    ]


def _computed(size: str, name: str) -> str:
    model = skeleton(config_of(name))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = footprint(model)
    half = next(row.total_bytes for row in rows if row.name == "bf16")
    cells = [f"{row.total_bytes / 2**30:,.2f} ({row.total_bytes / half:.0%})" for row in rows]
    return f"| {size}: {name} | {parameters:,} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
