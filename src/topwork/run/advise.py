"""`topwork advise`: prompt, retrieval or fine-tune, and a recipe, each choice with its reason and source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.common.files import write_text
from topwork.common.memory import free_host_memory
from topwork.common.os_errors import explained
from topwork.common.paths import plain_path
from topwork.data.config import DataConfig, paths_of
from topwork.data.parts import read_parts
from topwork.models.config import ModelConfig
from topwork.plan.advice.advise import DEFAULT_MODEL, Advice
from topwork.plan.advice.advise import advise as advice_on
from topwork.plan.advice.compare import Difference, compare, value_at
from topwork.plan.advice.facts import Facts
from topwork.plan.advice.looked import Looked, look
from topwork.plan.advice.pages import skill_files
from topwork.plan.advice.text import advice_text, differences_text, recipe_text
from topwork.plan.base import structure_named
from topwork.recipe.pasted import setting
from topwork.recipe.recipe import Recipe, load_recipe, make_recipe, with_overrides

Log = Callable[[str], None]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Request:
    """What is asked, beside a recipe. All of it may be left out but the task, where there are no rows to tell it.

    examples  training rows, where there are no files of them
    tokens    of a row on average; `longest` of the longest
    train     a file of rows, which then tell the task, their number and their lengths; `eval` one of held-out rows
    memory    24GB, 16GiB; left out, what this machine has free
    goals     names of `plan.advice.facts.GOALS`
    """

    task: str | None = None
    examples: int | None = None
    tokens: float | None = None
    longest: int | None = None
    model: str | None = None
    train: str | None = None
    eval: str | None = None
    memory: str | None = None
    goals: Sequence[str] = ()


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
    read = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)
    decided = {key: value_at(read, key) for key in map(_key, overrides)}
    if read.training.max_steps is not None:
        decided["training.max_steps"] = read.training.max_steps
    looked = _look(read.data, log)
    held_out = read.data.eval is not None
    facts, told = _facts(request, looked, read.model, decided, held_out, _documents(read.data))
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


def memory_bytes(text: str) -> int:
    """24GB, 16 GiB. Raises RequestError."""
    number, unit = text.strip().rstrip("GgMmKkTtIiBb "), text.strip().upper()
    unit = unit[len(number) :].strip()
    try:
        found = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise RequestError(f"memory {text!r}: expected a number with a unit, as 24GB or 16GiB") from None
    if not 0 < found < float("inf"):
        raise RequestError(f"memory {text!r}: expected more than nothing")
    return round(found)


def _for_request(request: Request, overrides: Sequence[str], log: Log) -> Advised:
    if request.task is None and request.train is None:
        raise RequestError("nothing to advise on: give a recipe, --task (and --examples), or --data with its rows")
    model = ModelConfig(model_name_or_path=request.model or DEFAULT_MODEL)
    values: dict[str, Any] = {"model": {"model_name_or_path": model.model_name_or_path}, "data": {}}
    values["data"]["train"] = request.train or "train.jsonl"
    if request.eval is not None:
        values["data"]["eval"] = request.eval
    recipe = make_recipe(with_overrides(values, overrides), "what was given")
    decided = {key: value_at(recipe, key) for key in map(_key, overrides)}
    data = recipe.data
    if _documents(data) and "data.documents" not in decided:  # as advised: a file is more than one row
        data = data.model_copy(update={"documents": "paragraph"})
    looked = _look(data, log) if request.train is not None else None
    held_out = request.eval is not None or "data.eval" in decided
    facts, told = _facts(request, looked, recipe.model, decided, held_out, _documents(recipe.data))
    given = {"model.model_name_or_path": model.model_name_or_path, "data.train": values["data"]["train"]}
    if request.eval is not None:
        given["data.eval"] = request.eval
    stem = Path(plain_path(request.train)).name.partition(".")[0] if request.train else "advised"
    given |= {**decided, "output_dir": decided.get("output_dir", f"runs/{stem}")}
    return Advised(advice_on(facts), told, given)


def _look(data: DataConfig, log: Log) -> Looked:
    """At the rows that can be read; `log` is told how many cannot."""
    parts = read_parts(data, data.train, data.max_rows)
    rows = [row for part in parts for row in part.conversations]
    bad = [row for part in parts for row in part.bad]
    if not rows:
        first = f": {bad[0].source}: {bad[0].reason}" if bad else ""
        raise RequestError(f"none of {len(bad):,} rows can be used{first}; topwork lint RECIPE shows why")
    if bad:
        log(f"warning: {len(bad):,} of {len(bad) + len(rows):,} rows cannot be used; topwork lint RECIPE shows why")
    return look(rows)


def _facts(
    request: Request, looked: Looked | None, model: ModelConfig, decided: Mapping[str, Any], held_out: bool,
    documents: bool,
) -> tuple[Facts, tuple[str, ...]]:  # fmt: skip
    """What advice is given on, and the lines that tell it. What a request says goes before what rows look like."""
    structure = structure_named(model)
    memory = memory_bytes(request.memory) if request.memory is not None else free_host_memory().bytes
    task = request.task or (looked.task if looked else "")
    rows = request.examples if request.examples is not None else looked.rows if looked else None
    tokens = request.tokens if request.tokens is not None else looked.tokens_per_row if looked else None
    longest = request.longest if request.longest is not None else looked.longest if looked else None
    text = (looked.kind == "text") if looked else task == "continued-pretraining"
    facts = Facts(
        task, rows, tokens, looked.learned_share if looked else None, longest,
        measured=request.longest is not None, kind="text" if text else "messages", documents=documents,
        turns=looked.turns if looked else task == "chat-style", structure=structure, memory_bytes=memory,
        goals=frozenset(request.goals), held_out=held_out, decided=decided,
    )  # fmt: skip
    told = [f"task: {task}{f' ({looked.why}; --task says otherwise)' if looked and not request.task else ''}"]
    if rows is not None:
        told.append(f"examples: {rows:,}")
    if tokens is not None:
        of = "" if request.tokens is not None else ", estimated from letters"
        told.append(f"tokens of an example: {tokens:,.0f}{f', at most {longest:,}' if longest else ''}{of}")
    name = model.model_name_or_path
    told.append(f"base: {name}, {structure.parameters:,} parameters, width {structure.hidden:,}")
    told.append(f"memory: {memory / 2**30:.1f} GiB{'' if request.memory else ' free on this machine'}")
    told += [f"goal: {goal}" for goal in request.goals]
    told += [f"decided: {key} = {value}" for key, value in decided.items()]
    return facts, tuple(told)


def _documents(data: DataConfig) -> bool:
    return all(path.lower().partition(".txt")[1] == ".txt" for path in paths_of(data.train))


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
