"""A run, or any adapter, with its base in memory: ready to be asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import SavedAdapter, load_adapter
from topwork.common.errors import TopworkError
from topwork.common.os_errors import explained
from topwork.data.chat.template import ChatTemplate
from topwork.data.parts import read_parts
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.fast import join_weights
from topwork.models.load import DTYPES
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.recipe import Recipe, make_recipe
from topwork.reporting.readers import read_json
from topwork.run.folder import ADAPTER_NAME, RESULT, TEMPLATE
from topwork.run.given import Given, given_adapter
from topwork.run.loading import open_base
from topwork.run.merging.inputs import own_tokenizer
from topwork.run.vocabulary import base_id

ROWS = 1000
"""Of a run that has no result yet, among which its system message is looked for."""
Log = Callable[[str], None]


@dataclass(frozen=True)
class OpenRun:
    """A run, or an adapter alone, ready to be asked.

    recipe      the run's; None for an adapter alone
    system      the system message that all training rows shared, if they did
    checkpoint  the step of the checkpoint whose adapter this is; None for the finished one
    """

    folder: Path
    recipe: Recipe | None
    base: Base
    adapters: Adapters
    template: ChatTemplate
    result: dict[str, Any]
    system: str | None
    checkpoint: int | None = None


@explained()
def open_run(
    folder: Path | str,
    dtype: str | None = None,
    force: bool = False,
    log: Log = print,
    quantized: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    model: str | None = None,
    checkpoint: str | int | None = None,
) -> OpenRun:
    """Load the base of a run, as it was held in training unless not `quantized`, or of any PEFT folder or Hub id, and
    graft its adapter; `tokenizer` as in `open_base`, `model` and `checkpoint` as in `given_adapter`.

    Raises RequestError where there is no adapter, and no checkpoint of a run yet.
    """
    return open_given(given_adapter(folder, model, checkpoint, log), dtype, force, log, quantized, tokenizer)


def open_given(
    given: Given,
    dtype: str | None = None,
    force: bool = False,
    log: Log = print,
    quantized: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> OpenRun:
    """The same of one that was read."""
    if given.recipe is None:
        return _open_alone(given, dtype, force, log, tokenizer)
    recipe = given.recipe.model_copy(update={"model": given.model})
    if not quantized:
        recipe = recipe.model_copy(update={"quantization": QuantizationConfig()})
    asked = _with_dtype(recipe, dtype) if dtype is not None else recipe
    base, adapters = open_adapter(
        recipe.model, recipe.quantization, given.saved, asked.model.dtype, force, log, tokenizer
    )  # fmt: skip
    template = ChatTemplate.from_config(base.tokenizer, recipe.data, given.place / TEMPLATE)
    problems: list[str] = []
    result = dict(read_json(given.place / RESULT, problems))  # an answer needs nothing of it but the system message
    for problem in problems:
        log(f"warning: {problem}")
    return OpenRun(given.place, asked, base, adapters, template, result, system_of(given, log), given.checkpoint)


def _open_alone(
    given: Given, dtype: str | None, force: bool, log: Log, tokenizer: PreTrainedTokenizerBase | None
) -> OpenRun:
    """An adapter that no run tells of is prompted by the template beside it, or its base's."""
    held = dtype or given.model.dtype
    base, adapters = open_adapter(given.model, given.quantization, given.saved, held, force, log, tokenizer)
    stored = given.folder / TEMPLATE
    own = own_tokenizer(given.folder, base.tokenizer, log)
    template = ChatTemplate(own, str(stored) if stored.is_file() else None)
    return OpenRun(given.place, None, base, adapters, template, {}, None)


def open_adapter(
    model: ModelConfig, quantization: QuantizationConfig, saved: SavedAdapter, dtype: str, force: bool, log: Log,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Base, Adapters]:  # fmt: skip
    """Load a base in `dtype`, held as `quantization` says, and graft an adapter as ADAPTER_NAME.

    What is packed is packed from the very values that training packed, in the type that `model` says; and float16 is
    taken from these too, since it rounds other digits away than the bfloat16 that fingerprints are taken in. Raises
    AdapterError for another base than the adapter's, unless `force`.
    """
    if quantization.active or dtype == "float16":
        base = open_base(model, log, quantization, tokenizer)
        _cast(base, DTYPES[dtype])
    else:
        base = open_base(model.model_copy(update={"dtype": dtype}), log, quantization, tokenizer)
    adapters = Adapters(base.module)
    warning = load_adapter(adapters, ADAPTER_NAME, saved, base_id(base), force)
    if warning:
        log(f"warning: {warning}")
    return base, adapters


def system_of(given: Given, log: Log) -> str | None:
    """The system message that all of a run's training rows shared, if they did. One that was cut off has no result to
    tell it: then its first rows do, and where these are gone `log` is told that nothing does."""
    if given.recipe is None:
        return None
    result = read_json(given.place / RESULT, [])
    if "system" in result:
        return str(result["system"]) if result["system"] is not None else None
    data = given.recipe.data
    try:
        parts = read_parts(data, data.train, min(ROWS, data.max_rows or ROWS))
    except (TopworkError, OSError) as error:
        why = str(error).splitlines()[0]
        log(f"whether the rows of {given.place} shared a system message cannot be told ({why}); --system gives one")
        return data.system
    rows = [row.messages for part in parts for row in part.conversations]
    systems = {said[0].content if said and said[0].role == "system" else None for said in rows}
    return systems.pop() if len(systems) == 1 else None


def _cast(base: Base, dtype: torch.dtype | str) -> None:
    """The dense parameters in another type; `auto` leaves them. Buffers stay: rotary tables are fp32 in every type."""
    for parameter in base.module.parameters():
        if isinstance(dtype, torch.dtype) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    join_weights(base.module)


def _with_dtype(recipe: Recipe, dtype: str) -> Recipe:
    values = recipe.model_dump()
    return make_recipe({**values, "model": {**values["model"], "dtype": dtype}}, "the type asked for")
