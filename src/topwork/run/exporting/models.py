"""Whole models for `topwork export`: as a Hugging Face folder, or as a GGUF file."""

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from topwork.common.errors import RunError
from topwork.export.gguf.model import write_gguf_model
from topwork.export.gguf.readback import answers_of, read_back
from topwork.export.read_back import NATS, ReadBack
from topwork.export.readers import Reader
from topwork.models.config import ModelConfig
from topwork.models.lazy import LazyModel, in_type, open_lazily
from topwork.models.lazy_writing import write_lazily
from topwork.models.load import load_base
from topwork.models.skeleton import skeleton
from topwork.models.source import ALIASES, Source
from topwork.models.tokenizer import load_config
from topwork.models.writing import clean_config, write_tokenizer
from topwork.run.exporting.check import MOST, not_loaded
from topwork.run.exporting.written import OUT, Written
from topwork.run.given import Given
from topwork.run.merging.inputs import TEXTS

HF_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
DENSE_TYPES, LARGEST_MEAN = ("f32", "f16", "bf16"), 0.1
"""Types that round so little that log-probabilities stay within LARGEST_MEAN nats in the mean."""


@dataclass(frozen=True)
class ModelJob:
    """A whole model that is to be written, as its folder has it.

    name     what files are called by
    check    on how many texts what was written is compared
    learned  the adapter that is merged into it, if one is
    """

    name: str
    source: Source
    reader: Reader
    type: str | None
    tokenizer: PreTrainedTokenizerBase | None
    check: int
    log: Callable[[str], None]
    learned: Given | None = None


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
    write_lazily(model, folder)
    if job.tokenizer is not None:
        write_tokenizer(job.tokenizer, folder)
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
    file = folder / f"{job.name}-{job.type}.gguf"
    done = write_gguf_model(open_lazily(job.source), job.tokenizer, None, file, job.type, job.log)
    figures = {"file": file.name, "architecture": done.architecture, "bytes": done.bytes, "notes": list(done.notes)}
    use = [
        f"llama-server -m {OUT}/{shlex.quote(file.name)} --jinja",
        f"llama-cli -m {OUT}/{shlex.quote(file.name)} --jinja",
    ]
    return Written({**figures, "fell_back": done.fell_back}, use, [_by_llama_cpp(job, file)])


def _by_llama_cpp(job: ModelJob, file: Path) -> ReadBack:
    """Raises RunError where the file says something else than its type's rounding explains."""
    answers, texts = [], TEXTS[: min(job.check, MOST)]
    model = ModelConfig(model_name_or_path=job.source.folder, dtype="float32", device="cpu")
    if texts and job.tokenizer is not None:
        if why := not_loaded(model, job.log):
            job.log(f"no answers are compared: {why}")
        else:
            base = load_base(model, lambda _: None, None, job.tokenizer)
            answers = answers_of(base, [job.tokenizer(text)["input_ids"] for text in texts])
    found = read_back(file, answers, job.tokenizer, texts if answers else ())
    if found.texts_equal < found.texts:
        raise RunError(
            f"llama.cpp cuts {found.texts - found.texts_equal} of {found.texts} texts into other tokens than "
            "transformers does. Nothing was written; this is a defect of the export"
        )
    if job.type in DENSE_TYPES and found.mean_difference > LARGEST_MEAN:
        raise RunError(
            f"llama.cpp's log-probabilities are {found.mean_difference:.2g} nats from ours in the mean, and {job.type} "
            f"explains {LARGEST_MEAN}. Nothing was written; this is a defect of the export"
        )
    return ReadBack(found.reader, found.answers, found.largest_difference, unit=NATS, details=found.as_dict())
