"""Where adapters that are combined change the base, and whether one adapter can hold all of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from topwork.adapters.method import Bare
from topwork.common.errors import AdapterError
from topwork.merging.changes import Changes, Parameter


@dataclass(frozen=True)
class Places:
    """adapted: modules that get factors, in the model's order; whole: parameters that stay whole."""

    adapted: tuple[str, ...]
    whole: tuple[Parameter, ...]


def places_of(sources: Sequence[Changes], bare: Bare) -> Places:
    """Where any of them changes the base. A module that one trains whole and another adapts stays whole.

    Raises AdapterError where two changes lie in one another, or fall on the same rows in forms that do not add.
    """
    whole = sorted({key for source in sources for key in source.whole})
    saved, chosen = {path for path, _ in whole}, {path for source in sources for path in source.adapted}
    for path in sorted(chosen | saved):
        outer = next((other for other in sorted(saved) if path.startswith(other + ".")), None)
        if outer is not None:
            raise AdapterError(
                f"{_who(sources, outer)} trained {outer} whole and {_who(sources, path)} changes {path} in it; one "
                "adapter holds the one or the other: train both with the same modules_to_save"
            )
    for source in sources:
        if source.tokens is not None:
            _refuse_beside_rows(source, sources, chosen | saved, bare)
    adapted = tuple(path for path in bare.modules if path in chosen - saved)
    if not adapted:
        raise AdapterError("the sources' modules are all trained whole; there is nothing that factors could hold")
    return Places(adapted, tuple(whole))


def _refuse_beside_rows(source: Changes, sources: Sequence[Changes], changed: set[str], bare: Bare) -> None:
    """Rows of an embedding, which a head tied to it shares."""
    rows = {source.tokens[0]} if source.tokens is not None else set()
    head, embedding = (bare.modules.get(path or "") for path in (bare.head, bare.embedding))
    if bare.head is not None and getattr(head, "weight", head) is getattr(embedding, "weight", None):
        rows.add(bare.head)
    for path in sorted(rows & changed):
        raise AdapterError(
            f"{source.label} trained some tokens' rows (of the embedding, and of a head tied to it) and "
            f"{_who(sources, path)} changes all of {path}, which one adapter cannot hold; merge one of them into the "
            "base first (`topwork merge`)"
        )


def refuse_apart(sources: Sequence[Changes], method: str) -> None:
    """AdapterError where no two sources change the same module: a method that compares them has nothing to say."""
    touched = [_touched(source) for source in sources]
    if any(first & second for i, first in enumerate(touched) for second in touched[i + 1 :]):
        return
    told = "; ".join(f"{source.label} changes {_names(paths)}" for source, paths in zip(sources, touched))
    raise AdapterError(
        f"no module is changed by two of the sources ({told}), and {method} compares what they do to the same one; "
        "take cat or linear, which add"
    )


def alone(sources: Sequence[Changes]) -> dict[str, int]:
    """How many modules each source changes that no other does."""
    touched = [_touched(source) for source in sources]
    return {
        source.label: len(own.difference(*(other for j, other in enumerate(touched) if j != i)))
        for i, (source, own) in enumerate(zip(sources, touched))
    }


def _touched(source: Changes) -> set[str]:
    tokens = {source.tokens[0]} if source.tokens is not None else set()
    return {*source.adapted, *(path for path, _ in source.whole), *tokens}


def _who(sources: Sequence[Changes], path: str) -> str:
    return next(s.label for s in sources if path in s.adapted or any(path == whole for whole, _ in s.whole))


def _names(paths: set[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
