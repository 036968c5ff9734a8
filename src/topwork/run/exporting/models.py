"""Whole models for `topwork export`: as a Hugging Face folder, or as a GGUF file."""

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from topwork.common.errors import RunError
from topwork.export.gguf.model import GgufModel, write_gguf_model
from topwork.export.gguf.readback import TOP, Answer, answers_of, read_back
from topwork.export.read_back import NATS, ReadBack
from topwork.export.readers import Reader
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.lazy import LazyModel, in_type, open_lazily
from topwork.models.lazy_writing import write_lazily
from topwork.models.load import load_base
from topwork.models.processor import keep_processor
from topwork.models.skeleton import skeleton
from topwork.models.source import ALIASES, Source
from topwork.models.tokenizer import load_config
from topwork.models.writing import clean_config, write_tokenizer
from topwork.run.counted import telling
from topwork.run.exporting.check import MOST, not_loaded
from topwork.run.exporting.written import OUT, Written
from topwork.run.given import Given
from topwork.run.merging.inputs import TEXTS

HF_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LARGEST_MEAN = {
    "f32": 2e-3, "f16": 0.03, "bf16": 0.2, "q8_0": 1.5, "q5_1": 4.0, "q5_0": 4.0, "q4_1": 5.0, "q4_0": 5.0,
}  # fmt: skip
"""How many nats log-probabilities of the likeliest tokens may lie from ours in the mean: of a small model that takes it
badly, some times what was measured (benchmarks/results/gguf_export.md). Few bits excuse much."""


@dataclass(frozen=True)
class ModelJob:
    """A whole model that is to be written, as its folder has it.

    name     what files are called by
    source   the model, or the base of a merged one
    check    on how many texts what was written is compared
    learned  the adapter that is merged into it, if one is
    merged   the model with that adapter folded in, not in memory
    opened   opens base and adapter as they were trained, and names the adapter, to compare what was written with
    """

    name: str
    source: Source
    reader: Reader
    type: str | None
    tokenizer: PreTrainedTokenizerBase | None
    check: int
    log: Callable[[str], None]
    learned: Given | None = None
    merged: LazyModel | None = None
    opened: Callable[[], tuple[Base, str]] | None = None


def stem(name: str) -> str:
    """What a model's files are called by."""
    known = Path(ALIASES.get(name, name))
    return known.stem if known.suffix == ".gguf" else known.resolve().name


def write_hf(job: ModelJob, folder: Path) -> Written:
    """A Hugging Face folder of dense weights, one tensor in memory at a time; every one is read again."""
    model = open_lazily(job.source)
    if job.type in HF_TYPES:
        config: Any = load_config(job.source, False)
        vars(config).pop("quantization_config", None)
        model = in_type(model, skeleton(config, dtype=HF_TYPES[job.type]), HF_TYPES[job.type])
    model = replace(model, config=clean_config(model.config))
    telling("tensors written", model, job.log, lambda told: write_lazily(told, folder))
    if job.tokenizer is not None:
        write_tokenizer(job.tokenizer, folder)
    keep_processor(job.source, model.config, folder)
    if model.folder is not None and model.config.get("auto_map"):
        for file in sorted(model.folder.glob("*.py")):  # the model's own code, which its config names
            shutil.copyfile(file, folder / file.name)
    figures = {"tensors": len(model.tensors), "bytes": model.nbytes}
    return Written(figures, [f'AutoModelForCausalLM.from_pretrained("{OUT}")'], [_reread(model, folder)])


def _reread(model: LazyModel, folder: Path) -> ReadBack:
    found = open_lazily(Source(model.name, str(folder), None))
    if found.tensors.keys() != model.tensors.keys():
        raise RunError(f"{folder} holds other tensors than were to be written. This is a defect of the export")
    different = [key for key, tensor in model.tensors.items() if not _equal(tensor.fetch(), found.tensors[key].fetch())]
    if different:
        raise RunError(f"{different[0]} reads otherwise than it was written; is the disk sound?")
    return ReadBack("Topwork", 0, 0.0)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit: NaN is NaN."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def write_gguf(job: ModelJob, folder: Path) -> Written:
    """One GGUF file, read back by llama.cpp where `xllamacpp` is installed."""
    assert job.type is not None
    kind, file = job.type, folder / f"{job.name}-{job.type}.gguf"
    model = job.merged or open_lazily(job.source)
    done: list[GgufModel] = []

    def write(told: LazyModel) -> None:
        done.append(write_gguf_model(told, job.tokenizer, None, file, kind, job.log))

    telling(f"tensors as {kind}", model, job.log, write)
    figures = {"file": file.name, "architecture": done[0].architecture, "bytes": done[0].bytes}
    figures |= {"notes": list(done[0].notes), "fell_back": done[0].fell_back}
    use = [f"{program} -m {OUT}/{shlex.quote(file.name)} --jinja" for program in ("llama-server", "llama-cli")]
    return Written(figures, use, [_by_llama_cpp(job, file)])


def _by_llama_cpp(job: ModelJob, file: Path) -> ReadBack:
    """Raises RunError where the file says something else than its type's rounding explains."""
    texts = TEXTS[: min(job.check, MOST)]
    answers, moved = _ours(job, texts) if texts and job.tokenizer is not None else ([], None)
    found = read_back(file, answers, job.tokenizer, texts if answers else ())
    if found.texts_equal < found.texts:
        raise RunError(
            f"llama.cpp cuts {found.texts - found.texts_equal} of {found.texts} texts into other tokens than "
            "transformers does. Nothing was written; this is a defect of the export"
        )
    most = LARGEST_MEAN[str(job.type)]
    if not found.mean_difference <= most:
        raise RunError(
            f"llama.cpp's log-probabilities are {found.mean_difference:.2g} nats from ours in the mean, and {job.type} "
            f"explains {most}. Nothing was written; this is a defect of the export"
        )
    if found.chats_equal < found.chats:
        job.log(
            f"warning: by the same chat template llama.cpp writes {found.chats - found.chats_equal} of {found.chats} "
            "conversations otherwise than transformers does (its /apply-template shows how); give it prompts that were "
            "written elsewhere"
        )
    return ReadBack(found.reader, found.answers, found.largest_difference, moved, NATS, found.as_dict())


def _ours(job: ModelJob, texts: Sequence[str]) -> tuple[list[Answer], float | None]:
    """What we say, with the adapter beside its base where one was merged; none, and said why, where there is no memory
    for the base in fp32. Beside it by how many nats the adapter moves the likeliest tokens at most."""
    assert job.tokenizer is not None
    model = ModelConfig(model_name_or_path=job.source.folder, dtype="float32", device="cpu")
    if why := not_loaded(model if job.learned is None else job.learned.model, job.log):
        job.log(f"no answers are compared: {why}")
        return [], None
    prompts = [job.tokenizer(text)["input_ids"] for text in texts]
    if job.opened is None:
        return answers_of(load_base(model, lambda _: None, None, job.tokenizer), prompts), None
    base, adapter = job.opened()
    answers = answers_of(base, prompts, adapter)
    bare = answers_of(base, prompts, None, 1)
    return answers, max(_moved(one.logprobs[0], other.logprobs[0]) for one, other in zip(answers, bare, strict=True))


def _moved(ours: torch.Tensor, bare: torch.Tensor) -> float:
    likeliest = ours.topk(min(TOP, len(ours))).indices
    return float((ours - bare)[likeliest].abs().max())
