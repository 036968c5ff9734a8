"""Adapters for llama.cpp and Ollama."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from topwork.common.errors import RunError
from topwork.export.gguf.adapter import write_gguf_adapter
from topwork.export.gguf.adapter_file import reread
from topwork.export.gguf.llama_cpp import LlamaCpp, is_installed
from topwork.export.gguf.model import write_gguf_model
from topwork.export.read_back import NATS, Asked, ReadBack
from topwork.models.lazy import open_lazily
from topwork.models.source import find_source
from topwork.run.exporting.peft import AdapterJob
from topwork.run.exporting.written import OUT, Written

TYPE_APART = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2}
"""How far a factor's values may be from what was to be written, relative to its largest: what the type rounds."""
TOP = 20
"""Of llama.cpp's likeliest tokens after a prompt, whose log-probabilities are compared."""
LARGEST, LEAST = 0.05, 1e-3
"""How many nats they may be from ours, both in fp32: a twentieth of what the adapter moves them by, no more than
LARGEST and no less than LEAST, which rounding makes of two ways to compute them."""


def write_adapter_file(job: AdapterJob, folder: Path) -> Written:
    """One GGUF adapter, read again by ourselves, and by llama.cpp on the base where both are at hand."""
    kind = job.type if job.reader.format == "gguf-adapter" and job.type else "f32"  # Ollama's is the base's
    name, adapter, config = job.given.place.resolve().name, job.lowered(), job.bare.config.to_dict()
    file = folder / f"{name}-adapter-{kind}.gguf"
    write_gguf_adapter(adapter, config, file, kind, name)
    apart = reread(file, adapter, config, job.bare.modules)
    if not apart <= TYPE_APART[kind]:
        raise RunError(f"{file.name} reads otherwise than it was written. This is a defect of the export")
    found = [ReadBack("Topwork", 0, apart), *_by_llama_cpp(job, folder, file)]
    figures = {"file": file.name, "rank": adapter.rank, "alpha": adapter.alpha, "modules": len(adapter.updates)}
    return Written(figures, [f"llama-server -m BASE.gguf --lora {OUT}/{shlex.quote(file.name)}"], found)


def _by_llama_cpp(job: AdapterJob, folder: Path, file: Path) -> list[ReadBack]:
    """At scale 0 it is the base, at scale 1 the adapter. Raises RunError."""
    if job.asked is None or job.tokenizer is None:
        return []
    if not is_installed():
        job.log("xllamacpp is not installed: read back by our own reader alone")
        return []
    base = folder / "base.gguf"
    lazily = open_lazily(find_source(job.given.model, job.log))
    write_gguf_model(lazily, job.tokenizer, None, base, "f32", lambda _: None)
    reader = LlamaCpp(base, adapters=[file])
    largest = 0.0
    for scale, logits in ((0.0, job.asked.bare), (1.0, job.asked.ours)):
        largest = max(largest, _furthest(reader, job.asked.prompts, logits, scale))
    del reader
    base.unlink()
    most = min(LARGEST, max(LEAST, _moved(job.asked) / 20))
    if largest > most:
        raise RunError(
            f"llama.cpp's log-probabilities with the adapter are {largest:.2g} nats from ours, and rounding explains "
            f"{most:.2g}. Nothing was written; this is a defect of the export"
        )
    return [ReadBack("llama.cpp", len(job.asked.prompts), largest, unit=NATS)]


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
