"""`topwork advise`: prompt, retrieval or fine-tune, and a recipe, each choice with its reason and source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.common.files import write_text
from topwork.common.os_errors import explained
from topwork.common.paths import plain_path
from topwork.models.config import ModelConfig
from topwork.plan.advice.advise import DEFAULT_MODEL, Advice
from topwork.plan.advice.advise import advise as advice_on
from topwork.plan.advice.compare import Difference, compare, value_at
from topwork.plan.advice.pages import skill_files
from topwork.plan.advice.text import advice_text, differences_text, recipe_text
from topwork.plan.base import structure_named
from topwork.recipe.pasted import setting
from topwork.recipe.recipe import Recipe, load_recipe, make_recipe, overridden
from topwork.run.advising.facts import Request as Request
from topwork.run.advising.facts import facts_of
from topwork.run.advising.seen import are_documents, see

INSTEAD = ("training.max_steps", "training.warmup_steps")
"""What a recipe may say in the place of something that is advised, which then is not."""
Log = Callable[[str], None]


@dataclass(frozen=True)
class Advised:
    """Advice, the lines that tell what it is given for, and what stands already.

    differences  from the recipe, where one was given
    given        dotted keys of the recipe that are not advised: the base, the rows, what `--set` said
    """

    advice: Advice
    told: tuple[str, ...]
    given: Mapping[str, Any]
    differences: tuple[Difference, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        advice = self.advice
        found = {
            "answer": advice.answer.value,
            "reason": advice.answer.as_json(),
            "given": list(self.told),
            "steps": advice.steps,
            "choices": [choice.as_json() for choice in advice.choices],
            "recipe": advice.recipe(self.given),
        }
        if self.differences is not None:
            found["differences"] = [each.as_json() for each in self.differences]
        return found

    def as_text(self) -> str:
        """For people."""
        if self.differences is None:
            return advice_text(self.advice, self.told)
        return differences_text(self.advice, self.differences, self.told)

    def recipe_yaml(self) -> str:
        """The recipe, with the reason above each line. Raises RecipeError where what was given does not go together."""
        make_recipe(self.advice.recipe(self.given), "the advised recipe")
        answer = self.advice.answer
        head = [f"Advised for: {'; '.join(self.told)}."]
        if answer.value != "fine-tune":
            head.append(f"The advice is {answer.value} first: {answer.reason}")
        return recipe_text(self.advice, self.given, [*head, "`topwork advise` told the reasons and their sources."])

    def write(self, path: Path) -> None:
        """The recipe as a file. Raises RequestError where one is there."""
        _refuse_existing(path)
        write_text(path, self.recipe_yaml())


@explained()
def advise(
    recipe: Recipe | Path | str | None = None,
    overrides: Sequence[str] = (),
    request: Request | None = None,
    log: Log = lambda _: None,
) -> Advised:
    """Advice for a request, or on a recipe. Keys in `overrides` (`a.b=c`) stand; the rest is advised around them.

    Raises RequestError for a task, a goal or amounts that cannot be, for data and bases that cannot be read, and where
    neither a task nor rows are given.
    """
    request = request or Request()
    if recipe is None:
        return _for_request(request, overrides, log)
    beside = [name for name in ("model", "train", "eval") if getattr(request, name) is not None]
    if beside:
        raise RequestError(f"{beside[0]}: the recipe names its own; change that with --set, or leave out the recipe")
    read = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)
    decided = {key: value_at(read, key) for key in map(_key, overrides)}
    for key in INSTEAD:
        if value_at(read, key) is not None:
            decided[key] = value_at(read, key)
    structure = structure_named(read.model)
    more = {"decided": decided, "held_out": read.data.eval is not None, "documents": are_documents(read.data)}
    facts, told = facts_of(request, see(read, request.task, structure, log), read.model, structure, more)
    found = advice_on(facts)
    given = {**_places(read), **decided}
    return Advised(found, told, given, compare(read, found))


def write_skill(folder: Path) -> list[Path]:
    """The knowledge as a skill's folder: SKILL.md and the rules beside it. Raises RequestError where one is there."""
    files = {folder / name: text for name, text in skill_files().items()}
    for path in files:
        _refuse_existing(path)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return list(files)


def _for_request(request: Request, overrides: Sequence[str], log: Log) -> Advised:
    if request.task is None and request.train is None:
        raise RequestError("nothing to advise on: give a recipe, --task (and --examples), or --data with its rows")
    model = ModelConfig(model_name_or_path=request.model or DEFAULT_MODEL)
    values: dict[str, Any] = {"model": {"model_name_or_path": model.model_name_or_path}, "data": {}}
    values["data"]["train"] = request.train or "train.jsonl"
    if request.eval is not None:
        values["data"]["eval"] = request.eval
    recipe = make_recipe(overridden(values, overrides), "what was given")
    decided = {key: value_at(recipe, key) for key in map(_key, overrides)}
    documents = are_documents(recipe.data)
    if documents and "data.documents" not in decided:  # as advised: a file is more than one row
        data = recipe.data.model_copy(update={"documents": "paragraph"})
        recipe = recipe.model_copy(update={"data": data})
    structure = structure_named(recipe.model)
    seen = see(recipe, request.task, structure, log) if request.train is not None else None
    more = {"decided": decided, "held_out": recipe.data.eval is not None, "documents": documents}
    facts, told = facts_of(request, seen, recipe.model, structure, more)
    given = {"model.model_name_or_path": model.model_name_or_path, "data.train": values["data"]["train"]}
    if request.eval is not None:
        given["data.eval"] = request.eval
    stem = Path(plain_path(request.train)).name.partition(".")[0] if request.train else "advised"
    given |= {**decided, "output_dir": decided.get("output_dir", f"runs/{stem}")}
    return Advised(advice_on(facts), told, given)


def _places(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of its base, its rows and its folder, as dotted keys; defaults left out."""
    own = recipe.model_dump(mode="json", exclude_defaults=True)
    found = {f"{part}.{key}": value for part in ("model", "data") for key, value in own.get(part, {}).items()}
    advised = ("data.max_length", "data.too_long", "data.eval_fraction", "data.documents")
    return {key: value for key, value in found.items() if key not in advised} | {"output_dir": recipe.output_dir}


def _key(override: str) -> str:
    found = setting(override)
    assert found is not None  # else the recipe would have been refused
    return found[0]


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise RequestError(f"{path} is there; name another file, or delete it")
