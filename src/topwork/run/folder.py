"""A run's folder: what stands where.

RUN/run.json             what of all this is the run's own, by which it is recognised (`run/ownership.py`)
RUN/recipe.yaml          the recipe, every option written out
RUN/metrics.jsonl        a record per step, validation and note
RUN/checkpoints/         the last k, and the best
RUN/adapter/             the result: a PEFT folder
RUN/result.json          figures of the run
RUN/provenance.json      hashes of base, data, template and recipe; versions; seed
RUN/chat_template.jinja  the template it was trained with
RUN/evaluation.json      written by `topwork eval`; evaluation-trial.json by a partial one, and
                         evaluation-step-000040.json by one of a checkpoint
RUN/report/              written by `topwork report`; report-step-000040/ by one up to a checkpoint
"""

import os
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.common.files import MANIFEST, read_object, read_text
from topwork.common.os_errors import check_link, why
from topwork.common.paths import plain_path
from topwork.data.config import DataConfig
from topwork.models.config import ModelConfig
from topwork.recipe.recipe import Recipe, make_recipe, parse_yaml

ADAPTER_NAME = "default"
RECIPE, RESULT, TEMPLATE, ADAPTER = "recipe.yaml", "result.json", "chat_template.jinja", "adapter"
WRITTEN = ("config.json", "export.json", "convert.json")
"""One of these stands in every model, every export and every conversion."""
EVALUATION, TRIAL, REPORT = "evaluation.json", "evaluation-trial.json", "report"


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


def check_beside_base(out: Path, model: ModelConfig, overwrite: bool | None) -> None:
    """`check_out` for what an adapter is written as: not over its base, where that is a folder here."""
    base = Path(plain_path(model.model_name_or_path))
    if base.is_dir():
        check_out(out, base, "the base's own folder", overwrite)


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file. Raises RequestError for one that is damaged."""
    return read_object(path, "bring back a copy of it, or move it away") if os.path.lexists(path) else {}
