"""`topwork init`: a recipe for a base and rows, every line with its reason, that fits and trains as it stands."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork import __version__
from topwork.common.errors import RequestError
from topwork.common.files import write_text
from topwork.common.os_errors import explained
from topwork.common.paths import plain_path
from topwork.data.files.sources import implied_eval, memory_notes
from topwork.plan.advice.advise import Advice
from topwork.plan.advice.advise import advise as advice_on
from topwork.plan.advice.compare import value_at
from topwork.plan.advice.looked import look
from topwork.recipe.pasted import setting
from topwork.recipe.recipe import Recipe, make_recipe, overridden, parse_yaml
from topwork.run.initial.base import NewBase, find_base
from topwork.run.initial.chosen import lines_of, lines_of_memory
from topwork.run.initial.known import Held, Known, refuse_short
from topwork.run.initial.lines import in_order, recipe_text, values_of
from topwork.run.initial.room import Fitted, fitted
from topwork.run.initial.rows import find_rows
from topwork.run.initial.sources import NewSources, find_sources
from topwork.run.initial.template import take_rows
from topwork.run.planning.place import find_place
from topwork.run.recipes import YAML, refuse_taken

Log = Callable[[str], None]


@dataclass(frozen=True)
class Begun:
    """A recipe that was written.

    told  lines for people: what the base and the rows are, what is made of them, how it fits
    """

    path: Path
    recipe: Recipe
    told: tuple[str, ...]
    text: str

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        own = self.recipe.model_dump(mode="json", exclude_defaults=True)
        return {"path": str(self.path), "told": list(self.told), "recipe": own}


@explained()
def init(
    model: str,
    data: str | Sequence[str],
    out: Path | str = "recipe.yaml",
    *,
    task: str | None = None,
    device: str | None = None,
    memory: str | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    log: Log = lambda _: None,
) -> Begun:
    """Write a recipe that trains `model` on `data` as it stands.

    model      an alias, a folder, a `.gguf` file, a Hub id, or a shipped shape's name
    data       files, folders or data sets of the Hub; of several, those called after validation or test are held out
    task       a name of `plan.advice.facts.TASKS`; left out, it is recognised
    device     a card by its name, or `memory` as "24GB", for which it is made to fit; left out, this machine
    overrides  `a.b=c`: options that are given; the rest is chosen around them

    Raises RequestError (ModelError, DataError …) for what cannot be found, read or made to fit, and where `out` is
    there and is not to be overwritten.
    """
    out, data = _free(out, overwrite), [data] if isinstance(data, str) else list(data)
    base, sources = find_base(model, log), find_sources(data)
    draft = _draft(base, sources, overrides)
    place = find_place(device, memory, draft.model.device)
    known = _known(base, sources, draft, overrides, task, out)
    advice = advice_on(known.facts(place.memory_bytes, place.kind))
    lines = in_order(lines_of(known, advice))
    recipe = make_recipe(values_of(lines), "what was chosen")
    refuse_short(known, recipe)
    fit = fitted(recipe, base.structure, place, known.shape, known.given.keys())
    told = _told(known, advice, fit)
    text = recipe_text(in_order([*lines, *lines_of_memory(known, fit)]), _title([model, *data]), told)
    made = make_recipe(parse_yaml(text, str(out)), str(out), out.parent)
    write_text(out, text)
    return Begun(out, made, told, text)


def _free(out: Path | str, overwrite: bool) -> Path:
    """Where the recipe goes. Raises RequestError where that is no place for one."""
    path = Path(plain_path(str(out)))
    if path.suffix.lower() not in YAML:
        raise RequestError(f"--out {str(out)!r} is no recipe's name; expected one that ends in .yaml")
    refuse_taken([path], overwrite)
    return path


def _draft(base: NewBase, sources: NewSources, overrides: Sequence[str]) -> Recipe:
    """What stands before anything is chosen. Raises RecipeError for options that are none."""
    train: Any = sources.train[0] if len(sources.train) == 1 else sources.train
    values: dict[str, Any] = {"model": {"model_name_or_path": base.named}, "data": {"train": train}}
    if sources.eval:
        values["data"]["eval"] = sources.eval[0] if len(sources.eval) == 1 else sources.eval
    return make_recipe(overridden(values, overrides), "what was asked for")


def _known(
    base: NewBase, sources: NewSources, draft: Recipe, overrides: Sequence[str], task: str | None, out: Path
) -> Known:
    rows = find_rows(draft.data, sources.are_texts)
    given = {key: value_at(draft, key) for each in overrides for key, _ in [setting(each) or ("", "")]}
    looked = look(rows.conversations)
    taken = take_rows(rows, base.tokenizer) if base.tokenizer is not None else None
    held: Held = "file" if draft.data.eval is not None else "folder" if implied_eval(draft.data) else "share"
    return Known(base, sources, rows, looked, taken, task or looked.task, given, held, out)


def _told(known: Known, advice: Advice, fit: Fitted) -> tuple[str, ...]:
    """What was found and made of it, in a line each."""
    rows, answer = known.rows, advice.answer
    why = f" ({known.looked.why}; --task says otherwise)" if known.task == known.looked.task else ""
    beside = [f"beside it and not read: {path}; name it too, and it is held out" for path in known.sources.beside]
    bad = [f"{known.unusable()}; they are left out"] if known.bad else []
    first = [f"{answer.value} first may be better: {answer.reason}"] if answer.value != "fine-tune" else []
    reasons = {**known.rows.set, **(known.taken.reasons if known.taken else {})}
    options = [f"data.{key}: {reason}" for key, reason in reasons.items()]
    return (
        f"base: {known.base.named}: {known.base.why}",
        *(f"rows: {each}" for each in rows.told),
        *beside,
        *bad,
        *memory_notes(rows.config),
        f"task: {known.task}{why}",
        f"lengths: {known.lengths(advice.value('data.max_length') or known.longest)}",
        *options,
        f"memory: {fit.sentence}",
        *(f"made to fit: {change.key}: {change.value}, {change.says}" for change in fit.changes),
        *first,
    )


def _title(given: Sequence[str]) -> str:
    return (
        f"Written by `{shlex.join(['topwork', 'init', *given])}` (topwork {__version__}). It trains as it stands; each "
        "line says why it is there, and docs/options.md has all others."
    )
