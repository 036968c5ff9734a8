"""Which recipe is meant, and which folder: `topwork train` takes a YAML file, a run's folder, or its recipe.yaml.

A run that was moved or copied is where it is given, whatever place its recipe names. Free of torch.
"""

from collections.abc import Sequence
from pathlib import Path

from topwork.common.errors import RequestError
from topwork.common.paths import plain_path
from topwork.recipe.pasted import setting
from topwork.recipe.recipe import Recipe, load_recipe
from topwork.run.ownership import is_run, nothing_begun

_RECIPE = "recipe.yaml"


def which_recipe(given: Path, overrides: Sequence[str] = (), resume: bool = False) -> Recipe:
    """The recipe, with `a.b=c` overrides, and in its output_dir the folder of the run that was given, if one was.

    Raises RecipeError, and RequestError for a folder that is no run's, or where the run would write into the folder of
    its own recipe.
    """
    given = Path(plain_path(str(given)))
    folder = given if given.is_dir() else given.parent
    is_folder = given.is_dir() or given.name == _RECIPE
    if is_folder and is_run(folder):
        return _in_place(folder, overrides)
    if resume and (given.is_dir() or (not given.exists() and (is_folder or not given.suffix))):
        raise nothing_begun(folder if is_folder else given)
    if given.is_dir():
        raise RequestError(f"{given} is a folder and holds no run; give a recipe, a YAML file")
    recipe = load_recipe(given, overrides)
    _refuse_own_folder(given, Path(recipe.output_dir))
    return recipe


def _in_place(folder: Path, overrides: Sequence[str]) -> Recipe:
    if not (folder / _RECIPE).is_file():
        raise RequestError(
            f"the run in {folder} was stopped before it wrote its {_RECIPE}; give the recipe that it was begun with"
        )
    recipe = load_recipe(folder / _RECIPE, overrides)
    named = any((setting(override) or ("", ""))[0] == "output_dir" for override in overrides)
    if named or Path(recipe.output_dir).resolve() == folder.resolve():
        return recipe
    return recipe.model_copy(update={"output_dir": str(folder if folder.name else folder.resolve())})


def _refuse_own_folder(given: Path, output_dir: Path) -> None:
    """A run writes a recipe.yaml of its own into its folder."""
    if not is_run(output_dir) and output_dir.resolve() in (given.absolute().parent.resolve(), given.resolve().parent):
        raise RequestError(
            f"output_dir {output_dir} is the folder of the recipe {given} itself, and a run needs a folder of its own; "
            "name one in it, for example output_dir: runs/NAME"
        )
