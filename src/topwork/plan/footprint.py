"""Bytes of a model's weights in each type, from a config alone.

Quantized are the linear layers but the output head; embeddings, head, norms and biases stay in 16 bits (in 32 in the
fp32 row). Tied weights count once. Rotary tables and other buffers, activations and optimizer states are not weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from topwork.models.weights import quantizable, weight_shape
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.error import Packing

QUANTIZED = {
    "int8": Packing("int8", None),
    "NF4": Packing("nf4", 64),
    "NF4 + DQ": Packing("nf4", 64, double_quant=True),
}
"""The types that a base can be held in, as a recipe's defaults hold them."""


@dataclass(frozen=True)
class FootprintRow:
    """One type. `linear_bytes` are the quantizable layers' weights, `other_bytes` all else that is a parameter."""

    name: str
    linear_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """The whole model."""
        return self.linear_bytes + self.other_bytes


def footprint(model: PreTrainedModel) -> list[FootprintRow]:
    """fp32, bf16, int8, NF4 and NF4 with double quantization, of an unquantized model or its skeleton."""
    layers = quantizable(model)
    shapes = [weight_shape(layer) for layer in layers.values()]
    linear = sum(rows * columns for rows, columns in shapes)
    other = sum(parameter.numel() for parameter in model.parameters()) - linear
    return [
        FootprintRow("fp32", 4 * linear, 4 * other),
        FootprintRow("bf16", 2 * linear, 2 * other),
        *(
            FootprintRow(name, sum(form.held_bytes(shape) for shape in shapes), 2 * other)
            for name, form in QUANTIZED.items()
        ),
    ]


def held_bytes(model: PreTrainedModel, dtype: str, quantization: QuantizationConfig) -> int:
    """What the weights take as a recipe asks for them, of its base's skeleton; the least where it is packed already."""
    packed = getattr(model.config, "quantization_config", None) is not None
    wide = "float32" in (str(model.config.dtype or "float32") if dtype == "auto" else dtype)
    form = "int8" if quantization.load_in_8bit else "NF4 + DQ" if quantization.active or packed else ""
    rows = {row.name: row for row in footprint(model)}
    other = rows["fp32" if wide else "bf16"]
    return (rows[form] if form else other).linear_bytes + other.other_bytes


def as_table(rows: Sequence[FootprintRow]) -> str:
    """For people."""
    half = next(row.total_bytes for row in rows if row.name == "bf16")
    lines = [f"{'weights held as':16} {'linear MiB':>12} {'other MiB':>12} {'total MiB':>12} {'of bf16':>8}"]
    lines += [
        f"{row.name:16} {_mib(row.linear_bytes)} {_mib(row.other_bytes)} {_mib(row.total_bytes)} "
        f"{row.total_bytes / half:8.1%}"
        for row in rows
    ]
    return "\n".join(lines)


def _mib(count: int) -> str:
    return f"{count / 2**20:12,.1f}"
