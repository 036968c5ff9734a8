"""Loading a base for use: first whether memory holds it, as its config alone tells, so that no kernel ends the process
half way. One sentence says what is needed, what is free, by whose limit, and what would help."""

import os
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from topwork.common.errors import ModelError, RequestError
from topwork.common.memory import Free, free_memory
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base, pick_device
from topwork.plan.base import quantization_named, structure_named
from topwork.quantization.config import QuantizationConfig
from topwork.training.memory_held import base_bytes
from topwork.training.memory_process import HEAP_TOP_BYTES, KERNELS_BYTES
from topwork.training.memory_setup import Setup

Log = Callable[[str], None]
CHARGED_BYTES = 64 << 20
"""What a limit counts beside resident memory: pages of files that are being read and written, the kernel's tables of
the process's own pages, threads' stacks."""
ANYWAY = "TOPWORK_ANYWAY"
"""Set in the environment to try what free memory does not hold: swap, which is not counted, may."""
TRIED = f"{ANYWAY}=1 in the environment tries it all the same: swap is not counted"


def open_base(
    model: ModelConfig, log: Log = print, quantization: QuantizationConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Base:  # fmt: skip
    """`load_base`, once it is known that a CPU's memory holds the base. Raises RequestError where it does not; a base
    whose structure is not known without its weights is for its loading to speak of."""
    if pick_device(model.device).type == "cpu":
        _refuse_large_base(model, quantization or QuantizationConfig(), log)
    return load_base(model, log, quantization, tokenizer)


def _refuse_large_base(model: ModelConfig, quantization: QuantizationConfig, log: Log) -> None:
    try:
        structure = structure_named(model)
        held = quantization_named(model, quantization)
    except ModelError:
        return
    dtype = structure.dtype if model.dtype == "auto" else model.dtype
    needed = sum(base_bytes(Setup(structure, dtype, held, ()))) + KERNELS_BYTES + HEAP_TOP_BYTES
    packed = "" if held.active else ", or one in 4 bits (quantization.load_in_4bit: true, or topwork quantize)"
    refuse_large(needed, f"holding {model.model_name_or_path}", f"Give more memory, or a smaller base{packed}", log)


def refuse_large(needed_bytes: int, work: str, less: str, log: Log) -> None:
    """Raises RequestError where `work` ("holding the base") takes more than is free of a CPU's memory, with what is
    `less`."""
    free = free_memory(torch.device("cpu"))
    if needed_bytes > usable(free):
        needed = needed_bytes + free.bytes - usable(free)
        refuse(f"{work} takes about {needed / 10**6:,.0f} MB, and {told(free)} are free", less, log)


def refuse(found: str, less: str, log: Log, more: str = "") -> None:
    """Raises RequestError with what was found, what to do and `more` lines below; where TOPWORK_ANYWAY is set, it is
    told and tried."""
    if os.environ.get(ANYWAY, "0") in ("", "0"):
        raise RequestError(f"{found}. {less}. {TRIED}{more}")
    log(f"warning: {found}; tried all the same, as {ANYWAY} says, and the run may be ended for want of memory")


def usable(free: Free) -> int:
    """Of what is free, for resident memory."""
    return free.bytes - CHARGED_BYTES * free.limited


def told(free: Free) -> str:
    """How much is free, and by whose limit."""
    of = f" of {free.source}" if free.limited else ""
    return f"{free.bytes / 10**6:,.0f} MB{of}"
