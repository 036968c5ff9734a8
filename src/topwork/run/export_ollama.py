"""Folders for `ollama create`: a GGUF model, a GGUF adapter where Ollama takes one, and the Modelfile."""

from pathlib import Path
from typing import Any

from topwork.adapters.method import Bare
from topwork.common.errors import RequestError
from topwork.export.gguf.families import family_of
from topwork.export.gguf.model import write_gguf_model
from topwork.export.ollama.bos import leave_bos_to_template
from topwork.export.ollama.folder import Asking, check_prompts, write_modelfile
from topwork.export.ollama.modelfile import ADAPTERS_NOT_READ
from topwork.models.lazy import open_lazily
from topwork.models.source import find_source
from topwork.models.tokenizer import load_config, usable_length
from topwork.run.export_gguf import write_adapter_file
from topwork.run.export_models import ModelJob, stem, write_gguf
from topwork.run.export_peft import AdapterJob
from topwork.run.folder import RESULT, read_json
from topwork.run.given import Given
from topwork.run.written import OUT, Written


def takes_adapters(bare: Bare) -> bool:
    """Whether Ollama runs this family where it can have an adapter. Raises ModelError for one that GGUF has not."""
    return family_of(bare.config.to_dict()).architecture not in ADAPTERS_NOT_READ


def write_ollama_adapter(job: AdapterJob, folder: Path) -> Written:
    """The base as GGUF beside the adapter."""
    if job.tokenizer is None or job.type is None:
        raise RequestError("an Ollama folder needs the base's tokenizer, and it is not at hand; name the base's folder")
    source = find_source(job.given.model, job.log)
    written = write_adapter_file(job, folder)
    base = folder / f"{stem(job.given.model.model_name_or_path)}-{job.type}.gguf"
    write_gguf_model(open_lazily(source), job.tokenizer, None, base, job.type, job.log)
    leave_bos_to_template(base)
    asking = _asking(job.given, job.bare.config)
    chats = write_modelfile(folder, base.name, written.figures["file"], job.tokenizer, None, asking, job.log)
    prompts = check_prompts(folder, job.tokenizer, None, asking)
    figures = {**written.figures, "model": base.name, "compared_conversations": chats, "compared_prompts": prompts}
    return Written(figures, _use(), written.read_back)


def write_ollama_model(job: ModelJob, folder: Path) -> Written:
    """One GGUF file and its Modelfile."""
    if job.tokenizer is None:
        raise RequestError(f"an Ollama folder needs a tokenizer, and {job.name} has none; add its own to its folder")
    written = write_gguf(job, folder)
    file = folder / written.figures["file"]
    leave_bos_to_template(file)
    asking = _asking(job.learned, load_config(job.source, False))
    chats = write_modelfile(folder, file.name, None, job.tokenizer, None, asking, job.log)
    prompts = check_prompts(folder, job.tokenizer, None, asking)
    figures = {**written.figures, "compared_conversations": chats, "compared_prompts": prompts}
    return Written(figures, _use(), written.read_back)


def _asking(given: Given | None, config: Any) -> Asking:
    """As a run's rows asked; of a model or an adapter alone nothing is known but its base's context."""
    context = usable_length(config)
    if given is None or given.recipe is None:
        return Asking(None, 0, context)
    system, data = read_json(given.place / RESULT).get("system"), given.recipe.data
    return Asking(system if isinstance(system, str) else None, data.max_length, context, data.fold_system)


def _use() -> list[str]:
    return [f"cd {OUT} && ollama create NAME -f Modelfile", "ollama run NAME"]
