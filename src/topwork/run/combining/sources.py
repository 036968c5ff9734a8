"""The adapters that are combined or compared: read, held to one base, and told apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from topwork.adapters.graft import bare_base
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import BaseId, check_base
from topwork.common.errors import AdapterError, RequestError
from topwork.common.files import read_text
from topwork.merging.changes import Changes, changes_of
from topwork.merging.combine.places import alone
from topwork.plan.built import base_skeleton
from topwork.run.base_weights import base_weights
from topwork.run.folder import ADAPTER, RECIPE, TEMPLATE, finished_recipe
from topwork.run.given import Given, given_adapter

Log = Callable[[str], None]


@dataclass(frozen=True)
class Sources:
    """Adapters that were read, what each changes, and their base as a skeleton without weights."""

    given: tuple[Given, ...]
    labels: tuple[str, ...]
    changes: tuple[Changes, ...]
    bare: Bare

    @property
    def base(self) -> BaseId:
        """As the first names it, with the fingerprint that it knows, or another that names the same base."""
        first = self.given[0]
        named = [one.saved.base for one in self.given if one.saved.base.name == first.saved.base.name]
        known = (base.fingerprint for base in [first.saved.base, *named] if base.fingerprint)
        return BaseId(first.saved.base.name or first.model.model_name_or_path, next(known, None))


def read_sources(places: Sequence[Path], model: str | None = None, force: bool = False, log: Log = print) -> Sources:
    """Adapters of one base, and what each changes of it. `model` is where the base is; left out, a run knows that
    itself, and for the PEFT folders beside it.

    Raises RequestError for a place that holds none or is named twice, AdapterError for different bases (unless `force`)
    and for what has no change of weights.
    """
    _refuse_twice(places)
    labels = labels_of(places)
    runs = [finished_recipe(place).model.model_name_or_path for place in places if (place / RECIPE).is_file()]
    named = model or next(iter(runs), None)
    given = [given_adapter(place, model if (place / RECIPE).is_file() else named) for place in places]
    home = next((one.model for one in given if one.recipe is not None), given[0].model)
    given = [one if one.recipe is not None else replace(one, model=home) for one in given]
    for other, label in zip(given[1:], labels[1:]):
        _check_bases(given[0], labels[0], other, label, force, log)
    grown = next((label for one, label in zip(given, labels) if one.model.grows), None)
    if grown is not None:
        raise RequestError(
            f"{grown} has a base whose vocabulary grew (model.new_tokens), and rows of new tokens are not combined; "
            "merge it into its base (`topwork merge`)"
        )
    bare = bare_base(base_skeleton(home))
    changes = (changes_of(label, one.saved, bare, base_weights(one, log)) for one, label in zip(given, labels))
    return Sources(tuple(given), tuple(labels), tuple(changes), bare)


def labels_of(places: Sequence[Path]) -> list[str]:
    """By the ends of their paths that tell them apart, so that no path of this machine stands in the result; a run's
    inner folder goes by the run's name too."""
    parts = [place.resolve().parts for place in places]
    count = 2 if any(path[-1] == ADAPTER for path in parts) else 1
    while len(set(short := ["/".join(path[-count:]) for path in parts])) < len(set(parts)):
        count += 1
    return short


def _refuse_twice(places: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for place in places:
        if place.resolve() in seen:
            raise RequestError(f"{place} is named twice; name it once, with the sum of its weights")
        seen[place.resolve()] = place


def _check_bases(first: Given, label: str, other: Given, other_label: str, force: bool, log: Log) -> None:
    try:
        warning = check_base(other.saved, first.saved.base, force)
    except AdapterError as error:
        ours, theirs = first.saved.base.name, other.saved.base.name
        raise AdapterError(
            f"{label} is an adapter of {ours!r} and {other_label} of {theirs!r}, and they are not the same ({error}). "
            "Deltas of different weights do not add; combine adapters of one base, or pass --force if you know the "
            "bases to be alike"
        ) from error
    if warning:
        log(f"warning: {warning}")


def tell_alike(read: Sources, log: Log) -> None:
    """Log what is worth knowing before they are added: the same adapter twice, bases in other bits, targets apart."""
    held = {label: given.quantization for label, given in zip(read.labels, read.given) if given.recipe is not None}
    if any(one != next(iter(held.values())) for one in held.values()):
        log(f"warning: {', '.join(held)} were trained on the same base held in different bits; their deltas are added")
    begun = [label for label, one in zip(read.labels, read.given) if one.recipe and one.recipe.adapter.needs_quantized]
    if len(begun) > 1:
        log(f"warning: {', '.join(begun)} began with LoftQ: what quantizing took from the base is in each, and adds up")
    contents = [source.content for source in read.changes]
    for label, content in zip(read.labels, contents):
        first = read.labels[contents.index(content)]
        if first != label:
            log(f"warning: {label} and {first} hold the very same adapter")
    if len(read.changes) > 1:
        for label, count in alone(read.changes).items():
            if count:
                log(f"{label}: {count} modules are changed by it alone; the others count as zero there")


def shared_template(read: Sources, log: Log) -> str | None:
    """The chat template that all were trained with, for who prompts the result; none where they differ. A PEFT folder
    without one says nothing of it."""
    found: dict[str, str | None] = {}
    for given, label in zip(read.given, read.labels):
        stored = given.folder / TEMPLATE
        if given.recipe is not None:
            found[label] = given.template
        elif stored.is_file():
            found[label] = read_text(stored, "bring back a copy of it")
    if len(set(found.values())) > 1:
        log(
            f"warning: the sources were trained with different chat templates ({', '.join(found)}); prompts of one are "
            "not the others', and the result names none: give it the one that it should answer to"
        )
        return None
    return next(iter(found.values()), None)
