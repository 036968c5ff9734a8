"""`topwork train`: one recipe, trained as `run/together.py` trains several."""

from collections.abc import Callable, Sequence
from pathlib import Path

from topwork.recipe.recipe import Recipe, load_recipe
from topwork.run.outcome import TrainedRun
from topwork.run.together import train_together
from topwork.training.progress import Progress, Silent


def train(
    recipe: Recipe | Path | str,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] = print,
) -> TrainedRun:
    """Train the adapter that a recipe describes; the result is in `output_dir`.

    `resume` goes on from the newest whole checkpoint, or starts where there is none. Raises RequestError where
    something is wrong with the request (nothing is written then), RunError where the run fails.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)
    one = progress or Silent()
    return train_together([recipe], resume, overwrite, lambda _: one, report)[0]
