"""Which base an adapter is merged into, in which type, and how the result is written; no weight is read for it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from topwork.adapters.graft import Adapters, bare_base
from topwork.adapters.peft_format import BaseId, check_base, settle
from topwork.common.errors import RequestError, did_you_mean
from topwork.merging.merge import merge
from topwork.merging.rounding import Rounding
from topwork.merging.stream import merged_lazily
from topwork.models.base import Base
from topwork.models.lazy import LazyModel, in_type, open_lazily
from topwork.models.lazy_fingerprint import lazy_fingerprint
from topwork.models.lazy_packed import as_trained
from topwork.models.lazy_writing import write_lazily
from topwork.models.load import DTYPES
from topwork.models.quantized import is_packed
from topwork.models.skeleton import skeleton
from topwork.models.source import Source, find_source
from topwork.models.stored_names import NotStoredError
from topwork.models.tokenizer import load_config
from topwork.models.writing import all_ends, clean_config, write_model, write_tokenizer
from topwork.run.counted import telling
from topwork.run.folder import ADAPTER_NAME
from topwork.run.given import Given
from topwork.run.merging.inputs import Inputs
from topwork.run.opened import open_adapter

DEQUANTIZED, ORIGINAL = "dequantized", "16bit"
AUTO = DEQUANTIZED
"""Which base `--base auto` takes after a training on a quantized one: the very weights that the adapter was trained
on, so that the merged model answers as the run does."""
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Log = Callable[[str], None]


@dataclass(frozen=True)
class MergePlan:
    """A merge that is yet to be done.

    write         puts model, tokenizer and code into an empty folder
    nbytes        of the merged weights
    dtype         their type
    source        the base, where it was found
    fingerprint   of the base, where it is known without reading it all
    base          which base was taken after a training on a quantized one; None where there is but one
    changes_base  whether that is another than the adapter was trained on, so that the result differs by construction
    rounding      told of what storing takes, while it is written
    model         the merged model, not in memory; None where it can only be merged there
    """

    write: Callable[[Path], None]
    nbytes: int
    dtype: torch.dtype
    source: Source
    fingerprint: str | None
    base: str | None
    changes_base: bool
    rounding: Rounding
    model: LazyModel | None = None


def plan_merge(adapter: Given, inputs: Inputs, dtype: str | None, base: str, force: bool, log: Log) -> MergePlan:
    """Find the base and fit the adapter to it. Raises RequestError, ModelError and AdapterError for what does not go
    together."""
    source = find_source(adapter.model, log)
    remote = adapter.model.trust_remote_code
    config: Any = load_config(source, remote)
    taken = _taken(adapter, source, is_packed(config, source.name), base)
    vars(config).pop("quantization_config", None)
    trained_type = _type(adapter.model.dtype, config)
    kind = _type(dtype, config) if dtype is not None else trained_type
    if taken is not None:
        log(_TAKEN[taken])
    held = open_lazily(source, trained_type, remote)
    trained = skeleton(config, remote, trained_type)
    fingerprint = lazy_fingerprint(in_type(held, trained, trained_type), trained)  # as training took it
    read_type = trained_type if taken == DEQUANTIZED else kind
    bare = skeleton(config, remote, read_type)
    held = in_type(held, bare, read_type)
    warning = check_base(adapter.saved, BaseId(source.name, fingerprint), force)
    if warning:
        log(f"warning: {warning}")
    rounding = Rounding()
    ready = MergePlan(lambda _: None, held.nbytes, kind, source, fingerprint, taken, taken == ORIGINAL, rounding)
    try:
        if taken == DEQUANTIZED:
            held = as_trained(held, bare, adapter.quantization)
        held = in_type(held, skeleton(config, remote, kind), kind)
        merged = merged_lazily(held, bare, adapter.saved, rounding)
        for note in settle(adapter.saved, bare_base(bare)).notes:
            log(f"note: {note}")
    except NotStoredError as error:
        log(f"{error}: merged in memory instead, which takes that of the whole model")
        return replace(ready, write=_in_memory(adapter, inputs, kind, taken, force))
    finished = _finished(merged, bare, inputs.end_ids)

    def write(folder: Path) -> None:
        telling("merged tensors", finished, log, lambda model: _write(model, inputs, folder))

    return replace(ready, write=write, nbytes=merged.nbytes, model=finished)


_TAKEN = {
    DEQUANTIZED: "the base is quantized: merged onto its dequantized weights, which the adapter was trained on "
    f"(--base {ORIGINAL} takes those from before)",
    ORIGINAL: "the base was quantized in training: merged onto its weights from before, which the adapter was not "
    f"trained on (--base {DEQUANTIZED} takes the very ones)",
}


def _taken(adapter: Given, source: Source, packed: bool, asked: str) -> str | None:
    """Which base. Raises RequestError where there is no choice."""
    if packed and asked == ORIGINAL:
        raise RequestError(
            f"--base {ORIGINAL}: {source.name} is a quantized checkpoint, and its weights from before are not in it; "
            "leave --base out, or train on the 16-bit model with quantization: {load_in_4bit: true}"
        )
    if asked == ORIGINAL and adapter.recipe is not None and adapter.recipe.adapter.needs_quantized:
        raise RequestError(
            f"--base {ORIGINAL}: {adapter.place} began with LoftQ, whose A and B hold what quantizing took from it; "
            "on the weights from before that would count twice. Leave --base out"
        )
    if packed or adapter.quantization.active:
        return DEQUANTIZED if packed or (asked if asked != "auto" else AUTO) == DEQUANTIZED else ORIGINAL
    if asked == DEQUANTIZED and adapter.recipe is None:
        raise RequestError(
            f"--base {DEQUANTIZED}: {adapter.place} does not tell how its base was held in training, and {source.name} "
            "is not quantized; give the run itself, or with --model the quantized checkpoint"
        )
    if asked != "auto":
        raise RequestError(f"--base {asked}: the base of {adapter.place} was not quantized in training; leave it out")
    return None


def _type(name: str, config: Any) -> torch.dtype:
    if name not in DTYPES:
        near = did_you_mean(name, DTYPES)
        raise RequestError(f"--dtype {name}: expected 'bfloat16', 'float16' or 'float32'{near}")
    if name != "auto":
        return DTYPES[name]
    found = config.dtype or config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _finished(merged: LazyModel, bare: PreTrainedModel, end_ids: list[int]) -> LazyModel:
    """With a config that names nothing of this machine, and a generation that ends at the template's ends of a turn."""
    config = {"architectures": [type(bare).__name__]} | clean_config(merged.config)
    text = config.get("text_config") or {}
    generation = dict(merged.generation) or {
        key: config.get(key, text.get(key)) for key in ENDS if config.get(key, text.get(key)) is not None
    }
    if end_ids:
        generation["eos_token_id"] = all_ends(generation.get("eos_token_id"), end_ids)
    return replace(merged, config=config, generation=generation)


def _write(merged: LazyModel, inputs: Inputs, folder: Path) -> None:
    write_lazily(merged, folder)
    write_tokenizer(inputs.tokenizer, folder, inputs.template)
    if merged.folder is not None and merged.config.get("auto_map"):
        for file in sorted(merged.folder.glob("*.py")):  # the model's own code, which its config names
            shutil.copyfile(file, folder / file.name)


def _in_memory(
    adapter: Given, inputs: Inputs, kind: torch.dtype, taken: str | None, force: bool
) -> Callable[[Path], None]:  # fmt: skip
    """For bases whose files hold an adapted weight in another form than the model."""

    def write(folder: Path) -> None:
        base, adapters = opened(adapter, inputs, kind, force, quantized=taken != ORIGINAL)
        merge(base, adapters, ADAPTER_NAME)
        write_model(base, folder, inputs.template, inputs.end_ids)

    return write


def opened(
    adapter: Given, inputs: Inputs, kind: torch.dtype, force: bool, quantized: bool = True, log: Log = lambda _: None
) -> tuple[Base, Adapters]:  # fmt: skip
    """The base as it was held in training, or unquantized, with the adapter, in another type."""
    held = adapter.quantization if quantized else type(adapter.quantization)()
    return open_adapter(
        adapter.model, held, adapter.saved, str(kind).removeprefix("torch."), force, log, inputs.tokenizer
    )  # fmt: skip
