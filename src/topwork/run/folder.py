"""A run's folder: what stands where, and how a finished run is opened again.

RUN/recipe.yaml          the recipe, every option written out
RUN/metrics.jsonl        a record per step, validation and note
RUN/checkpoints/         the last k, and the best
RUN/adapter/             the result: a PEFT folder
RUN/result.json          figures of the run
RUN/provenance.json      hashes of base, data, template and recipe; versions; seed
RUN/chat_template.jinja  the template it was trained with
RUN/evaluation.json      written by `topwork eval`; evaluation-trial.json by a partial one
RUN/report/              written by `topwork report`
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, SavedAdapter, load_adapter, read_adapter
from topwork.common.errors import RequestError
from topwork.common.files import MANIFEST, read_object, read_text
from topwork.common.os_errors import check_link, explained, why
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.fast import join_weights
from topwork.models.load import DTYPES, load_base
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.recipe import Recipe, make_recipe, parse_yaml
from topwork.reporting.readers import read_json as read_known

ADAPTER_NAME = "default"
RECIPE, RESULT, TEMPLATE, ADAPTER = "recipe.yaml", "result.json", "chat_template.jinja", "adapter"
WRITTEN = ("config.json", "export.json", "convert.json")
"""One of these stands in every model, every export and every conversion."""
EVALUATION, TRIAL = "evaluation.json", "evaluation-trial.json"


@dataclass(frozen=True)
class OpenRun:
    """A finished run, ready to be asked."""

    folder: Path
    recipe: Recipe
    base: Base
    adapters: Adapters
    template: ChatTemplate
    result: dict[str, Any]

    @property
    def system(self) -> str | None:
        """The system message that all training rows shared, if they did."""
        return self.result.get("system")


def check_place(folder: Path, called: str) -> None:
    """Raises RequestError where no folder can be made or written: a file stands in the way, or it is not allowed."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if _is_there(path))
        nearest.stat()  # a link to nothing is no place either
    except OSError as error:
        raise RequestError(f"{called} {folder} cannot be a folder ({why(error)}); name another place") from error
    if not nearest.is_dir():
        raise RequestError(f"{called} {folder} cannot be a folder, because {nearest} is a file; name another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"{called} {folder} cannot be written: no permission for {nearest}; name another place")


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_out(out: Path, own: Path | None, called: str, overwrite: bool | None) -> None:
    """Whether a model can be written to `out`, and not over `own`, the folder it comes from. Nothing but a model, an
    export or a conversion that was written by Topwork is ever replaced. `overwrite` is None where that cannot be asked
    for. Raises RequestError."""
    check_place(out, "OUT")
    place, inside = out.resolve(), own.resolve() if own is not None else None
    if inside is not None and (place == inside or place in inside.parents or inside in place.parents):
        raise RequestError(f"{out} is {called}, lies in it or holds it; name a folder of its own")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        way = "" if overwrite is None else ", or --overwrite"
        raise RequestError(f"{out} holds files already; give an empty or new folder{way}")
    if not ((out / MANIFEST).is_file() and any((out / name).is_file() for name in WRITTEN)):
        raise RequestError(
            f"{out} holds files that Topwork has not written; --overwrite replaces only what it wrote itself. Name "
            "another OUT"
        )


def read_recipe(folder: Path) -> Recipe:
    """The recipe a run was made with."""
    path = folder / RECIPE
    check_link(folder)
    if not os.path.lexists(path):
        raise RequestError(f"{folder} is not a run's folder (no {RECIPE}); give the output_dir of a `topwork train`")
    return make_recipe(parse_yaml(read_text(path, "bring back a copy of it"), str(path)), str(path))


def finished_recipe(folder: Path) -> Recipe:
    """The recipe of a run that has its adapter. Raises RequestError where it has none yet."""
    recipe = read_recipe(folder)
    check_link(folder / ADAPTER)
    if not (folder / ADAPTER).is_dir():
        raise RequestError(f"{folder} has no finished adapter; go on with `topwork train {folder / RECIPE} --resume`")
    return recipe


def data_of(folder: Path, recipe: Recipe) -> DataConfig:
    """A run's way to read rows, with the template that it learned them by, which it keeps: the file that the recipe
    names may be gone or another since, and rows that were read raw are none of the tokenizer's."""
    stored = folder / TEMPLATE
    if not stored.exists():
        return recipe.data
    own = {"chat_template": str(stored), "separator": "", "chat_template_kwargs": {}}  # both stand in it
    return recipe.data.model_copy(update=own)


@explained()
def open_run(
    folder: Path,
    dtype: str | None = None,
    force: bool = False,
    log: Callable[[str], None] = print,
    quantized: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> OpenRun:
    """Load a run's base, as it was held in training unless not `quantized`, and graft its adapter; `tokenizer` as in
    `load_base`.

    Raises RequestError where the run has no adapter yet.
    """
    recipe = finished_recipe(folder)
    if not quantized:
        recipe = recipe.model_copy(update={"quantization": QuantizationConfig()})
    asked = _with_dtype(recipe, dtype) if dtype is not None else recipe
    saved = read_adapter(folder / ADAPTER)
    base, adapters = open_adapter(
        recipe.model, recipe.quantization, saved, asked.model.dtype, force, log, tokenizer
    )  # fmt: skip
    template = ChatTemplate.from_config(base.tokenizer, recipe.data, folder / TEMPLATE)
    problems: list[str] = []
    result = dict(read_known(folder / RESULT, problems))  # an answer needs nothing of it
    for problem in problems:
        log(f"warning: {problem}")
    return OpenRun(folder, asked, base, adapters, template, result)


def open_adapter(
    model: ModelConfig, quantization: QuantizationConfig, saved: SavedAdapter, dtype: str, force: bool,
    log: Callable[[str], None], tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Base, Adapters]:  # fmt: skip
    """Load a base in `dtype`, held as `quantization` says, and graft an adapter as ADAPTER_NAME.

    What is packed is packed from the very values that training packed, in the type that `model` says; and float16 is
    taken from these too, since it rounds other digits away than the bfloat16 that fingerprints are taken in. Raises
    AdapterError for another base than the adapter's, unless `force`.
    """
    if quantization.active or dtype == "float16":
        base = load_base(model, log, quantization, tokenizer)
        _cast(base, DTYPES[dtype])
    else:
        base = load_base(model.model_copy(update={"dtype": dtype}), log, quantization, tokenizer)
    adapters = Adapters(base.module)
    warning = load_adapter(adapters, ADAPTER_NAME, saved, BaseId(base.name, base.fingerprint), force)
    if warning:
        log(f"warning: {warning}")
    return base, adapters


def _cast(base: Base, dtype: torch.dtype | str) -> None:
    """The dense parameters in another type; `auto` leaves them. Buffers stay: rotary tables are fp32 in every type."""
    for parameter in base.module.parameters():
        if isinstance(dtype, torch.dtype) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    join_weights(base.module)


def _with_dtype(recipe: Recipe, dtype: str) -> Recipe:
    values = recipe.model_dump()
    return make_recipe({**values, "model": {**values["model"], "dtype": dtype}}, "the type asked for")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file. Raises RequestError for one that is damaged."""
    return read_object(path, "bring back a copy of it, or move it away") if os.path.lexists(path) else {}
