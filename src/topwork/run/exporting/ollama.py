"""Folders for `ollama create`: a GGUF model, a GGUF adapter where Ollama takes one, and the Modelfile."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from topwork.adapters.method import Bare
from topwork.common.errors import RequestError, TopworkError
from topwork.data.conversations import Message
from topwork.data.examples import load_data
from topwork.export.gguf.families import family_of
from topwork.export.gguf.model import write_gguf_model
from topwork.export.ollama.bos import leave_bos_to_template
from topwork.export.ollama.folder import Asking, Prepared, prepared
from topwork.export.ollama.form import INSTEAD
from topwork.export.ollama.modelfile import ADAPTERS_NOT_READ
from topwork.models.lazy import open_lazily
from topwork.models.source import find_source
from topwork.models.tokenizer import load_config, usable_length
from topwork.run.counted import telling
from topwork.run.exporting.gguf import BaseFile, write_adapter_file
from topwork.run.exporting.models import ModelJob, stem, write_gguf
from topwork.run.exporting.peft import AdapterJob
from topwork.run.exporting.written import OUT, Written
from topwork.run.folder import data_of
from topwork.run.given import Given
from topwork.run.opened import system_of

ROWS = 20
"""Of a run, on which the TEMPLATE is compared."""
Log = Callable[[str], None]


def takes_adapters(bare: Bare) -> bool:
    """Whether Ollama runs this family where it can have an adapter. Raises ModelError for one that GGUF has not."""
    return family_of(bare.config.to_dict()).architecture not in ADAPTERS_NOT_READ


def write_ollama_adapter(job: AdapterJob, folder: Path) -> Written:
    """The base as GGUF beside the adapter. It is written from the weights that were trained on, also where these came
    from a GGUF file: that one's own values would be packed anew, or another base."""
    if job.tokenizer is None or job.type is None:
        raise RequestError("an Ollama folder needs the base's tokenizer, and it is not at hand; name the base's folder")
    modelfile = _prepared(job.given, job.tokenizer, job.bare.config, job.log)
    source = find_source(job.given.model, job.log)
    kind, base = job.type, folder / f"{stem(job.given.model.model_name_or_path)}-{job.type}.gguf"
    telling(
        f"tensors as {kind}", open_lazily(source), job.log,
        lambda told: write_gguf_model(told, job.tokenizer, None, base, kind, job.log),
    )  # fmt: skip
    written = write_adapter_file(job, folder, BaseFile(base, kind))
    figures = {**written.figures, "model": base.name}
    return Written(figures | _finished(modelfile, base, written.figures["file"]), _use(), written.read_back)


def write_ollama_model(job: ModelJob, folder: Path) -> Written:
    """One GGUF file and its Modelfile."""
    if job.tokenizer is None:
        raise RequestError(f"an Ollama folder needs a tokenizer, and {job.name} has none; add its own to its folder")
    modelfile = _prepared(job.learned, job.tokenizer, load_config(job.source, False), job.log)
    written = write_gguf(job, folder)
    figures = written.figures | _finished(modelfile, folder / written.figures["file"], None)
    return Written(figures, _use(), written.read_back)


def _finished(modelfile: Prepared, model: Path, adapter: str | None) -> dict[str, Any]:
    leave_bos_to_template(model)
    modelfile.write(model.parent, model.name, adapter)
    prompts = modelfile.check_prompts(model)
    return {"compared_conversations": len(modelfile.chats), "compared_prompts": prompts}


def _prepared(given: Given | None, tokenizer: PreTrainedTokenizerBase, config: Any, log: Log) -> Prepared:
    """As a run's rows asked; of a model or an adapter alone nothing is known but its base's context."""
    context = usable_length(config)
    if given is None or given.recipe is None:
        return prepared(tokenizer, None, Asking(None, 0, context), log)
    data = given.recipe.data
    asking = Asking(system_of(given, log), data.max_length, context, data.fold_system)
    return prepared(tokenizer, None, asking, log, _prompts(given, tokenizer, context, log))


def _prompts(given: Given, tokenizer: PreTrainedTokenizerBase, context: int, log: Log) -> list[Sequence[Message]]:
    """The first rows that a run learned from, up to their last answer; none, and said why, where they are gone. Raises
    RequestError for rows with tools."""
    assert given.recipe is not None
    few = {"max_rows": ROWS, "streaming": False, "eval": None, "eval_fraction": 0.0}
    try:
        config = data_of(given.place, given.recipe).model_copy(update=few)
        read = load_data(config, tokenizer, context, given.recipe.training.seed, lambda _: None)
    except (TopworkError, OSError) as error:
        log(f"the TEMPLATE is compared without rows of the run, which cannot be read: {str(error).splitlines()[0]}")
        return []
    chats = [row for row in read.train_conversations if row.kind == "chat"]
    if any(row.tools or any(message.extra.get("tool_calls") for message in row.messages) for row in chats):
        raise RequestError(f"the rows of {given.place} bring tools, which an Ollama TEMPLATE here has not; {INSTEAD}")
    return [row.messages[: _last_answer(row.messages)] for row in chats]


def _last_answer(messages: Sequence[Message]) -> int:
    return max(number for number, message in enumerate(messages) if message.role == "assistant")


def _use() -> list[str]:
    return [f"cd {OUT} && ollama create NAME -f Modelfile", "ollama run NAME"]
