"""Adapters as PEFT folders: for PEFT itself, and for the servers that read its plain form."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from topwork.adapters.fitting import Parts
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import BaseId
from topwork.common.files import write_json
from topwork.export.lowered import Lowered, lowered
from topwork.export.peft import write_kept, write_plain
from topwork.export.read_back import Asked, ReadBack, by_peft, has_peft, reread
from topwork.export.readers import Reader
from topwork.export.vllm import check_as_vllm, served_rank
from topwork.models.quantized import stored_quantization
from topwork.models.source import find_source
from topwork.models.writing import write_tokenizer
from topwork.quantization.kinds import embedding_shape
from topwork.run.exporting.written import OUT, Written
from topwork.run.folder import TEMPLATE
from topwork.run.given import Given


@dataclass(frozen=True)
class AdapterJob:
    """An adapter that is to be written for a reader.

    bare       its base, a skeleton without weights
    parts      the adapter's, as they go into it
    tokenizer  the base's, with the template that the adapter was trained with; None where it is not at hand
    asked      what the base says to some prompts with the adapter and without; None where its weights are not at hand
    """

    given: Given
    reader: Reader
    type: str | None
    bare: Bare
    parts: Parts
    tokenizer: PreTrainedTokenizerBase | None
    asked: Asked | None
    log: Callable[[str], None]

    @property
    def base(self) -> BaseId:
        """What the written files call the base."""
        known = self.given.saved.base
        named = known.name or self.given.model.model_name_or_path
        return replace(known, name=named)

    @property
    def served(self) -> str:
        """The base's name in a shell's command line."""
        return shlex.quote(str(self.base.name))

    def lowered(self) -> Lowered:
        """The plain form, as this reader wants it."""
        return lowered(self.parts, self.bare, self.reader.ranks, self.reader.whole_layers)


def write_peft(job: AdapterJob, folder: Path) -> Written:
    config = job.given.saved.config
    write_kept(folder, config, job.parts, job.bare, job.base)
    _write_tokenizer(job, folder)
    use = ("from peft import AutoPeftModelForCausalLM", f'AutoPeftModelForCausalLM.from_pretrained("{OUT}")')
    return Written({"method": config.method}, use, _read_back(job, folder, job.parts))


def write_vllm(job: AdapterJob, folder: Path) -> Written:
    adapter = job.lowered()
    _write_plain(job, folder, adapter)
    rank = served_rank(adapter.rank)
    check_as_vllm(folder, rank)
    use = [
        f"vllm serve {job.served} --enable-lora --max-lora-rank {rank} --lora-modules NAME={OUT}",
        f"--chat-template {OUT}/{TEMPLATE} (vLLM takes one for all adapters)",
    ]
    figures = {**_figures(adapter), "max_lora_rank": rank}
    return Written(figures, use[: 2 if (folder / TEMPLATE).is_file() else 1], _read_back(job, folder, adapter))


def write_sglang(job: AdapterJob, folder: Path) -> Written:
    adapter = job.lowered()
    _write_plain(job, folder, adapter)
    use = f"python -m sglang.launch_server --model-path {job.served} --enable-lora --lora-paths NAME={OUT}"
    return Written(_figures(adapter), [use], _read_back(job, folder, adapter))


def write_lorax(job: AdapterJob, folder: Path) -> Written:
    adapter = job.lowered()
    _write_plain(job, folder, adapter)
    use = f'{{"parameters": {{"adapter_id": "{OUT}", "adapter_source": "local"}}}}'
    return Written(_figures(adapter), [use], _read_back(job, folder, adapter))


def _write_plain(job: AdapterJob, folder: Path, adapter: Lowered) -> None:
    """For the servers that read PEFT's plain form."""
    write_plain(folder, adapter, job.bare, job.base.name)
    write_json(folder / "topwork.json", job.base.as_json())
    _write_tokenizer(job, folder)


def _write_tokenizer(job: AdapterJob, folder: Path) -> None:
    if job.tokenizer is not None:
        write_tokenizer(job.tokenizer, folder)


def _figures(adapter: Lowered) -> dict[str, Any]:
    return {"rank": adapter.rank, "lora_alpha": adapter.alpha, "modules": len(adapter.updates)}


def _read_back(job: AdapterJob, folder: Path, adapter: Lowered | Parts) -> list[ReadBack]:
    """By our own reader always, and by PEFT where it and the base's weights are at hand. Raises RunError."""
    found = [reread(folder, job.bare, adapter)]
    if job.asked is None:
        return found
    if not has_peft():
        job.log("PEFT is not installed: read back by our own reader alone")
    elif stored_quantization(job.bare.config) is not None:
        job.log("the base is packed, which PEFT reads with bitsandbytes: read back by our own reader alone")
    else:
        model = job.given.model
        rows = embedding_shape(job.bare.modules[job.bare.embedding])[0] if model.grows and job.bare.embedding else None
        found.append(by_peft(folder, find_source(model, job.log), model.trust_remote_code, job.asked, rows))
    return found
