"""Adapters for llama.cpp and Ollama."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from topwork.common.errors import RunError
from topwork.export.gguf.adapter import write_gguf_adapter
from topwork.export.gguf.adapter_file import reread
from topwork.export.gguf.llama_cpp import LlamaCpp, is_installed
from topwork.export.gguf.model import write_gguf_model
from topwork.export.gguf.tensors import EMBEDDING
from topwork.export.read_back import NATS, Asked, ReadBack
from topwork.models.lazy import LazyModel, open_lazily
from topwork.models.source import find_source
from topwork.run.counted import telling
from topwork.run.exporting.peft import AdapterJob
from topwork.run.exporting.written import OUT, Written

TYPE_APART = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2}
"""How far a factor's values may be from what was to be written, relative to its largest: what the type rounds."""
TOP = 20
"""Of llama.cpp's likeliest tokens after a prompt, whose log-probabilities are compared."""
LARGEST = 0.05
LEAST = {"f32": 1e-3, "f16": 0.1, "bf16": 0.5}
"""How many nats they may be from ours in fp32: a twentieth of what the adapter moves them by, no more than LARGEST and
no less than LEAST, which rounding makes of two ways to compute them. On a base in 16 bits llama.cpp rounds what it
multiplies, too, and a weak adapter that is left out is not seen; our own reader sees it."""
SMALL_BYTES = 4 << 30
"""Up to which a base is written in fp32 for this check alone; a larger one in its own 16 bits."""
SPARE_BYTES = 256 << 20
TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class BaseFile:
    """A GGUF file of an adapter's base, and the type of its numbers."""

    path: Path
    type: str


def write_adapter_file(job: AdapterJob, folder: Path, at_hand: BaseFile | None = None) -> Written:
    """One GGUF adapter, read again by ourselves, and by llama.cpp on the base where both are at hand. `at_hand` is a
    file of the base that is there anyway."""
    kind = job.type if job.reader.format == "gguf-adapter" and job.type else "f32"  # Ollama's is the base's
    name, adapter, config = job.given.name.rpartition("/")[2], job.lowered(), job.bare.config.to_dict()
    file = folder / f"{name}-adapter-{kind}.gguf"
    write_gguf_adapter(adapter, config, file, kind, name)
    apart = reread(file, adapter, config, job.bare.modules)
    if not apart <= TYPE_APART[kind]:
        raise RunError(f"{file.name} reads otherwise than it was written. This is a defect of the export")
    found = [ReadBack("Topwork", 0, apart), *_by_llama_cpp(job, folder, file, at_hand)]
    figures = {"file": file.name, "rank": adapter.rank, "alpha": adapter.alpha, "modules": len(adapter.updates)}
    return Written(figures, [f"llama-server -m BASE.gguf --lora {OUT}/{shlex.quote(file.name)}"], found)


def _by_llama_cpp(job: AdapterJob, folder: Path, file: Path, at_hand: BaseFile | None) -> list[ReadBack]:
    """At scale 0 it is the base, at scale 1 the adapter. Raises RunError."""
    if job.asked is None or job.tokenizer is None:
        return []
    if not is_installed():
        job.log("xllamacpp is not installed: read back by our own reader alone")
        return []
    base = _base_file(job, folder, at_hand)
    if base is None:
        return []
    reader = LlamaCpp(base.path, adapters=[file])
    largest = 0.0
    for scale, logits in ((0.0, job.asked.bare), (1.0, job.asked.ours)):
        largest = max(largest, _furthest(reader, job.asked.prompts, logits, scale))
    del reader
    if base is not at_hand:
        base.path.unlink()
    moved = _moved(job.asked)
    most = max(LEAST[base.type], min(LARGEST, moved / 20))
    if not largest <= most:
        raise RunError(
            f"llama.cpp's log-probabilities with the adapter are {largest:.2g} nats from ours, and rounding explains "
            f"{most:.2g}. Nothing was written; this is a defect of the export"
        )
    return [ReadBack("llama.cpp", len(job.asked.prompts), largest, moved, NATS, {"base": base.type})]


def _base_file(job: AdapterJob, folder: Path, at_hand: BaseFile | None) -> BaseFile | None:
    """The base for this check: in fp32 where it is small; else the file that is at hand, or one of its own type. None,
    and said why, where the disk has no room for it."""
    model = open_lazily(find_source(job.given.model, job.log))
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in model.tensors.values())
    free = shutil.disk_usage(folder).free - SPARE_BYTES
    kind = "f32" if 4 * numbers <= min(SMALL_BYTES, free) else _own_type(model)
    if at_hand is not None and at_hand.type in LEAST and (kind != "f32" or at_hand.type == "f32"):
        return at_hand
    needed = (4 if kind == "f32" else 2) * numbers
    if needed > free:
        job.log(
            f"not read back by llama.cpp, but by our own reader: a GGUF file of the base for that takes "
            f"{needed / 2**20:,.0f} MiB, and {max(0, free) / 2**20:,.0f} are free beside {folder.parent}"
        )
        return None
    base = BaseFile(folder / "base.gguf", kind)
    telling(
        "tensors of the base, for llama.cpp to read the adapter on", model, job.log,
        lambda told: write_gguf_model(told, job.tokenizer, None, base.path, kind, lambda _: None),
    )  # fmt: skip
    return base


def _own_type(model: LazyModel) -> str:
    """The type of its embedding, as GGUF has it."""
    return TYPES.get(model.tensors[EMBEDDING].dtype, "f32") if EMBEDDING in model.tensors else "f32"


def _moved(asked: Asked) -> float:
    """By how many nats the adapter moves the likeliest tokens after a prompt at most."""
    moved = []
    for ours, bare in zip(asked.ours, asked.bare, strict=True):
        with_it, without = ours[-1].log_softmax(-1), bare[-1].log_softmax(-1)
        likeliest = with_it.topk(min(TOP, len(with_it))).indices
        moved.append(float((with_it - without)[likeliest].abs().max()))
    return max(moved)


def _furthest(reader: LlamaCpp, prompts: Sequence[Tensor], logits: Sequence[Tensor], scale: float) -> float:
    largest = torch.zeros(())
    for prompt, ours in zip(prompts, logits, strict=True):
        found = reader.logprobs(prompt.tolist(), TOP, scale)
        wanted = ours[-1].log_softmax(-1)[list(found)]
        largest = torch.maximum(largest, (torch.tensor(list(found.values())) - wanted).abs().max())
    return float(largest)
