"""A whole model as one GGUF file: its keys first, then its weights one at a time."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.common.errors import ModelError, RequestError, RunError
from topwork.common.files import whole_file
from topwork.export.gguf.hparams import hparams_of
from topwork.export.gguf.package import gguf_package
from topwork.export.gguf.template import ends_of
from topwork.export.gguf.tensors import EMBEDDING, Planned, planned
from topwork.export.gguf.tokenizer import vocabulary_of
from topwork.export.gguf.types import check_type, file_type, quantization_type, stored_bytes
from topwork.models.lazy import LazyModel

_PHI3 = re.compile("phi-?3", re.IGNORECASE)


@dataclass(frozen=True)
class GgufModel:
    """What was written.

    path          the file
    type          what was asked for: most weights are in it
    architecture  llama.cpp's name
    fell_back     weights that are in another type, by their name in the file, and why
    notes         what the file does not do as the model does
    bytes         the file's size
    """

    path: Path
    type: str
    architecture: str
    fell_back: dict[str, str]
    notes: tuple[str, ...]
    bytes: int


def write_gguf_model(
    model: LazyModel, tokenizer: Any, template: str | None, out: Path, type: str, log: Callable[[str], None] = print
) -> GgufModel:
    """Write `model` to the file `out`, in a `type` of `TYPES`. `template` is Jinja, None the tokenizer's own.

    Needs the memory of one weight (of two where a tied head is saved too). The file appears whole or not at all.
    Raises RequestError for a type that is not written and a file that is there, ModelError for a model that llama.cpp
    would read otherwise, RunError for a full disk.
    """
    gguf_package()
    check_type(type)
    if out.exists():
        raise RequestError(f"{out} exists already and would be overwritten; name another file or remove it first")
    if tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, without which a GGUF file is of no use; give its own")
    hparams = hparams_of(model.config)
    weights = planned(model, hparams, type)
    rows = model.tensors[EMBEDDING].shape[0]
    ends = ends_of(tokenizer, template, model.generation)
    vocabulary = vocabulary_of(tokenizer, rows, ends.ids)
    architecture = hparams.family.architecture
    keys = {
        "general.type": "model",
        "general.name": _called(Path(model.name).name, vocabulary.phi3),
        "general.file_type": file_type(type),
        "general.quantization_version": int(gguf_package().GGML_QUANT_VERSION),
        **{f"{architecture}.{key}": value for key, value in {**hparams.keys, "vocab_size": rows}.items()},
        **vocabulary.keys,
        **ends.keys,
    }
    fell_back = {each.name: f"{each.stored.type}: {each.stored.why}" for each in weights if each.stored.why}
    notes = (*hparams.notes, *vocabulary.notes, *ends.notes)
    for told in [*notes, *(f"{name} is {why}" for name, why in fell_back.items())]:
        log(told)
    _check_room(out, weights)
    with whole_file(out) as aside:
        _write(aside, architecture, keys, weights)
    return GgufModel(out, type, architecture, fell_back, notes, out.stat().st_size)


def _called(name: str, phi3: bool) -> str:
    """llama.cpp takes a model with Phi-3 in its name, and no other, for one whose special tokens swallow the white
    space after them; where Phi-3's own are missing it does not load it."""
    if phi3:
        return name if _PHI3.search(name) else f"{name} (phi-3)"
    return _PHI3.sub("phi 3", name)


def _check_room(out: Path, weights: Sequence[Planned]) -> None:
    """Before an hour of writing rather than after it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(stored_bytes(each.shape, each.stored.type) for each in weights)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RunError(
            f"{out} will take {needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free there; free some space "
            "or name another disk"
        )


def _write(path: Path, architecture: str, keys: dict[str, Any], weights: Sequence[Planned]) -> None:
    writer = gguf_package().GGUFWriter(path, architecture)
    try:
        for key, value in keys.items():
            _put(writer, key, value)
        for each in weights:
            _announce(writer, each)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        for each in weights:
            writer.write_padding(file, file.tell())
            file.write(each.data().data)  # the writer's own way loses the number of a full disk's error
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def _announce(writer: Any, weight: Planned) -> None:
    """Name, shape and size of a weight whose bytes come later. A type that numpy has not is announced by its number."""
    import numpy as np

    size = stored_bytes(weight.shape, weight.stored.type)
    writer.add_tensor_info(
        weight.name, weight.shape, np.dtype(np.float32), size, raw_dtype=quantization_type(weight.stored.type)
    )


def _put(writer: Any, key: str, value: Any) -> None:
    """A key in the type that its value has; whole numbers are unsigned, as llama.cpp reads counts and ids."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
