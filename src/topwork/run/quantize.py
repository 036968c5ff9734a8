"""`topwork quantize`: a base in 4 or 8 bits, as a bitsandbytes checkpoint that transformers loads."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError, did_you_mean
from topwork.common.files import write_folder, write_json
from topwork.common.memory import memory_for
from topwork.common.os_errors import explained
from topwork.common.paths import plain_path
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.quantized import ORIGIN
from topwork.models.writing import write_model
from topwork.ops.packed import Packed, Packed4bit
from topwork.ops.quantize import BLOCK_SIZES
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import packed_modules, weight_bytes
from topwork.run.folder import check_out
from topwork.run.loading import open_base

TYPES = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class Quantized:
    """What was written: layers, their parameters and bytes, and the whole model's bytes."""

    folder: str
    type: str
    layers: int
    quantized_parameters: int
    quantized_bytes: int
    bits_per_parameter: float
    model_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def quantization_of(kind: str, block_size: int | None, double_quant: bool) -> QuantizationConfig:
    """The options behind the command's flags. Raises RequestError for what bitsandbytes has not."""
    if kind not in TYPES:
        raise RequestError(f"--type {kind}: expected {', '.join(TYPES)}{did_you_mean(kind.lower(), TYPES)}")
    if kind == "int8":
        if block_size is not None or not double_quant:
            raise RequestError(
                "--block-size and --no-double-quant go with nf4 and fp4; bitsandbytes' int8 has one constant per row"
            )
        return QuantizationConfig(load_in_8bit=True)
    if block_size is not None and block_size not in BLOCK_SIZES:
        raise RequestError(
            f"--block-size {block_size}: bitsandbytes reads {', '.join(map(str, BLOCK_SIZES))} and no other"
        )
    return QuantizationConfig.model_validate(
        {
            "load_in_4bit": True, "bnb_4bit_quant_type": kind, "block_size": block_size or 64,
            "bnb_4bit_use_double_quant": double_quant,
        }
    )  # fmt: skip


@explained()
@memory_for("quantizing", "a base is read into 4 or 8 bits tensor by tensor, so its packed size is what is needed")
def quantize(
    model: ModelConfig,
    out: Path | str,
    kind: str = "nf4",
    block_size: int | None = None,
    double_quant: bool = True,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> Quantized:
    """Read a 16- or 32-bit base into `kind` and write it to the folder `out`, whole or not at all.

    Raises RequestError where `out` holds files or the options cannot be, ModelError where the base is quantized already
    or cannot be read.
    """
    out = Path(out)
    wanted = quantization_of(kind, block_size, double_quant)
    source = Path(plain_path(model.model_name_or_path))
    check_out(out, source if source.exists() else None, "the model's own folder", overwrite)
    base = open_base(model.model_copy(update={"device": "cpu"}), log, wanted)  # packed and written by the host
    _tell_of_split_rows(base, log)
    write_folder(out, lambda folder: _write(base, wanted, folder), overwrite)
    return measured(base, kind, out)


def _tell_of_split_rows(base: Base, log: Callable[[str], None]) -> None:
    """bitsandbytes 0.50's CPU back end takes it that each row begins with a block of its own."""
    split = [
        (path, layer.shape[1], layer.packed.block_size)
        for path, layer in packed_modules(base.module).items()
        if isinstance(layer.packed, Packed4bit) and layer.shape[1] % layer.packed.block_size
    ]
    if split:
        path, inputs, size = split[0]
        log(
            f"note: {len(split)} layers have rows that are no multiple of the block (first {path}: {inputs} inputs, "
            f"blocks of {size}). bitsandbytes as of 0.50 reads such layers wrongly on the CPU; on CUDA, and here, they "
            "are right. A block size that divides the rows avoids it"
        )


def measured(base: Base, kind: str, out: Path) -> Quantized:
    """What a quantized base holds."""
    packed: list[Packed] = [module.packed for module in packed_modules(base.module).values()]
    count, held = sum(p.shape[0] * p.shape[1] for p in packed), sum(p.nbytes for p in packed)
    return Quantized(str(out), kind, len(packed), count, held, round(8 * held / count, 4), weight_bytes(base.module))


def _write(base: Base, wanted: QuantizationConfig, folder: Path) -> None:
    write_model(base, folder)
    origin = {"base": {"id": base.name, "fingerprint": base.fingerprint}, "quantization": wanted.model_dump()}
    write_json(folder / ORIGIN, origin)
