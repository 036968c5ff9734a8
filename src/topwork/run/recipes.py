"""`topwork recipes`: recipes for the usual jobs, each with a few rows that show how data for it look. Free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from topwork.common.errors import RecipeError, RequestError, did_you_mean
from topwork.common.files import write_text
from topwork.common.os_errors import explained
from topwork.common.paths import is_there
from topwork.recipe.recipe import parse_yaml

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that ships with the package.

    job        what it is for, in a sentence
    text       the YAML, comments and all
    rows_file  the name of its example rows, which `data.train` says
    rows       what that file holds
    """

    name: str
    job: str
    model: str
    text: str
    rows_file: str
    rows: str

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return {
            "name": self.name, "job": self.job, "model": self.model, "recipe": self.text, "rows_file": self.rows_file,
            "rows": self.rows,
        }  # fmt: skip


def shipped_recipes() -> list[ShippedRecipe]:
    """All of them, by name."""
    return [_read(file) for file in sorted(_folder().iterdir(), key=lambda file: file.name) if _is_recipe(file)]


def shipped_recipe(name: str) -> ShippedRecipe:
    """The one of this name. Raises RecipeError naming the nearest."""
    names = [file.name.removesuffix(".yaml") for file in _folder().iterdir() if _is_recipe(file)]
    if name not in names:
        raise RecipeError(
            f"no recipe is called {name!r}{did_you_mean(name, names)}; there are {', '.join(sorted(names))}. For "
            "a recipe of your own model and data: topwork init MODEL DATA"
        )
    return _read(_folder() / f"{name}.yaml")


@explained()
def copy_recipe(name: str, out: Path, overwrite: bool = False) -> tuple[Path, Path]:
    """Write a shipped recipe and its example rows, to be changed: into the folder `out`, or as `out` where that ends in
    .yaml, with the rows beside it. Returns both paths.

    Raises RequestError where a file is there already, unless it may be overwritten: a file that a recipe was copied to
    has been worked on since.
    """
    shipped = shipped_recipe(name)
    recipe = out if out.suffix.lower() in YAML else out / f"{name}.yaml"
    rows = recipe.parent / shipped.rows_file
    refuse_taken([recipe, rows], overwrite)
    for path, text in ((rows, shipped.rows), (recipe, shipped.text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return recipe, rows


def refuse_taken(paths: Sequence[Path], overwrite: bool) -> None:
    """Raises RequestError where one of the files that are to be written is there."""
    taken = [path for path in paths if is_there(path)]
    if taken and not overwrite:
        raise RequestError(
            f"{taken[0]} is there already and may have been worked on; give --out another place, or --overwrite to "
            "replace it"
        )


def _folder() -> Traversable:
    return files("topwork") / "recipes"


def _is_recipe(file: Traversable) -> bool:
    return file.name.endswith(".yaml")


def _read(file: Traversable) -> ShippedRecipe:
    text = file.read_text(encoding="utf-8")
    values = parse_yaml(text, file.name)
    rows_file = str(values["data"]["train"])
    return ShippedRecipe(
        name=file.name.removesuffix(".yaml"),
        job=text.partition("\n")[0].lstrip("# "),
        model=str(values["model"]["model_name_or_path"]),
        text=text,
        rows_file=rows_file,
        rows=(_folder() / rows_file).read_text(encoding="utf-8"),
    )
