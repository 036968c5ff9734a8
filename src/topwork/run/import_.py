"""`topwork import`: another tool's training config as a recipe, and what became of each of its keys."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.common.errors import RecipeError, RequestError
from topwork.common.files import write_text
from topwork.common.os_errors import explained
from topwork.common.paths import plain_path
from topwork.recipe.recipe import make_recipe
from topwork.run.importing.convert import A_DEVICE
from topwork.run.importing.draft import Draft, Told, translate
from topwork.run.importing.read import read
from topwork.run.importing.records import FATES, Fate
from topwork.run.importing.written import HEADINGS, LOUD, nested, recipe_text, sentence


@dataclass(frozen=True)
class Imported:
    """A config of theirs as a recipe.

    recipe   its YAML, commented with where each line came from
    values   the same as plain values
    told     what became of each key, in the file's order; then the tool's defaults that had to be written out
    missing  what has to be filled in before the recipe can be read
    refused  why no recipe is made of it at all: it is for something that is not done here
    remarks  what is told of the whole
    """

    tool: str
    recognised: bool
    source: str
    recipe: str
    values: dict[str, Any]
    told: tuple[Told, ...]
    missing: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the recipe is one that can be trained."""
        return not self.missing and not self.refused

    def of(self, fate: Fate) -> list[Told]:
        """The keys with this fate."""
        return [told for told in self.told if told.fate == fate]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "tool": self.tool, "recognised": self.recognised, "source": self.source, "whole": self.whole,
            "recipe": self.recipe, "values": self.values, "missing": list(self.missing), "refused": list(self.refused),
            "remarks": list(self.remarks), "keys": [_told(each) for each in self.told],
        }  # fmt: skip

    def as_text(self, everything: bool = False) -> str:
        """What became of the keys: those without an equal line by line, the others where `everything` is asked for."""
        how = "recognised" if self.recognised else "as you say"
        counts = ", ".join(f"{len(self.of(fate))} {HEADINGS[fate]}" for fate in FATES if self.of(fate))
        lines = [f"{self.source} is {self.tool}'s ({how}): {counts}"]
        for fate in FATES:
            if self.of(fate) and (everything or fate in LOUD):
                lines += ["", f"{HEADINGS[fate]}:", *(f"  {sentence(told)}" for told in self.of(fate))]
        differing = [told for told in self.of("mapped") if told.note and not everything]
        if differing:
            lines += ["", "mapped, and how:", *(f"  {sentence(told)}" for told in differing)]
        packed = [told for told in self.of("needless") if "raise training.batch_size" in told.note and not everything]
        lines += ["", *(f"note: {sentence(told)}" for told in packed)] if packed else []
        lines += ["", *(f"note: {remark}" for remark in self.remarks)] if self.remarks else []
        for heading, entries in (("missing", self.missing), ("no recipe is made of it", self.refused)):
            if entries:
                lines += ["", f"{heading}:", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


@explained()
def import_recipe(place: Path | str, tool: str | None = None, devices: int | None = None) -> Imported:
    """A training config of Axolotl, LLaMA-Factory, TRL, Unsloth, torchtune or mlx-lm as a recipe of ours.

    The tool is recognised from the file's keys, unless `tool` names it. `devices` is on how many it was meant to run,
    which multiplies its batch; left out, what a command line says, or 1. Python is parsed and never run.

    Raises RequestError for a file that cannot be read, or is for no tool that is known.
    """
    path = Path(plain_path(str(place)))
    if devices is not None and devices < 1:
        raise RequestError(f"there are {devices} devices; name how many it was meant to run on, 1 or more")
    found = read(path, tool)
    count = devices or found.devices or 1
    draft = Draft(found.tool, found.given, path.parent, count, remarks=list(found.remarks))
    translate(draft)
    if draft.values.get("model.model_name_or_path") is None and not draft.refused:
        draft.missing.append("model.model_name_or_path has no value: no model is given that can be read; name one")
    if any(A_DEVICE in told.note for told in draft.told) and not devices and not found.devices:
        draft.remarks.append("one device is taken; for several say --devices, which multiplies training.batch_size")
    if not draft.missing and not draft.refused:
        _checked(draft)
    return Imported(
        found.tool.name, found.recognised, str(path), recipe_text(draft, path.name), nested(draft.values),
        tuple(draft.told), tuple(draft.missing), tuple(draft.refused), tuple(dict.fromkeys(draft.remarks)),
    )  # fmt: skip


def write_recipe(imported: Imported, out: Path | str, partial: bool = False) -> Path:
    """Writes the recipe to a new file. With `partial` also one from which something is missing, told in its comments.

    Raises RequestError where there is a file already, or where no recipe can be made.
    """
    path = Path(plain_path(str(out)))
    if path.exists() or path.is_symlink():
        raise RequestError(f"{path} is there already, and is kept; name another file with --out")
    refuse_unusable(imported, partial)
    write_text(path, imported.recipe)
    return path


def refuse_unusable(imported: Imported, partial: bool = False) -> None:
    """Raises RequestError for what no recipe can be made of, or one with something missing unless `partial`."""
    if imported.refused:
        raise RequestError(f"no recipe is made of {imported.source}: {'; '.join(imported.refused)}")
    if imported.missing and not partial:
        raise RequestError(
            f"something is missing in {imported.source}: {'; '.join(imported.missing)}; with --partial the rest is "
            f"written"
        )


def _checked(draft: Draft) -> None:
    """Reads the recipe as `topwork train` would; what it refuses is missing."""
    try:
        make_recipe(nested(draft.values))
    except RecipeError as error:
        draft.missing += [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]


def _told(told: Told) -> dict[str, Any]:
    given = told.given
    return {
        "key": given.key, "value": given.value if given.code is None else given.code, "line": given.line,
        "cell": given.cell, "fate": told.fate, "ours": told.ours, "note": told.note,
    }  # fmt: skip
