"""What a new recipe is made of, and how that is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from topwork.common.errors import DataError
from topwork.data.conversations import BadRow
from topwork.plan.advice.facts import Facts
from topwork.plan.advice.looked import Looked
from topwork.recipe.recipe import Recipe
from topwork.run.initial.base import NewBase
from topwork.run.initial.room import Rows
from topwork.run.initial.rows import SeenRows
from topwork.run.initial.sources import NewSources
from topwork.run.initial.template import Taken, too_long

ROOM = 1.25
"""How much longer than the longest row an estimate from letters may find it, without which it would be cut."""
Held = Literal["file", "folder", "share"]
MOST_LOST = 0.5
"""Where more rows than this would be left out for their length, it is another base that is wanted."""
NAMED = 2
"""Rows that cannot be used are named up to so many."""


@dataclass(frozen=True)
class Known:
    """The base, the rows and the request.

    taken    None where no tokenizer of the base is at hand
    given    options that the request names, and their values
    held     how rows are held out: `file`, the `folder`'s own split, or a `share`
    out      where the recipe goes
    """

    base: NewBase
    sources: NewSources
    rows: SeenRows
    looked: Looked
    taken: Taken | None
    task: str
    given: Mapping[str, Any]
    held: Held
    out: Path

    @property
    def bad(self) -> list[BadRow]:
        """Rows that cannot be used."""
        return [*self.rows.bad, *(self.taken.bad if self.taken else [])]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, within what the base reads."""
        found = self.taken.lengths.longest if self.taken else round(ROOM * self.looked.longest)
        return min(found, self.base.structure.context_length)

    @property
    def shape(self) -> Rows:
        """What a pass is made of."""
        if self.taken is None:
            return Rows(self.longest, {})
        return Rows(self.longest, self.taken.lengths.percentiles)

    def facts(self, memory_bytes: int, device: Literal["cpu", "cuda"]) -> Facts:
        """What advice is given on."""
        taken = self.taken
        return Facts(
            self.task,
            self.rows.usable,
            taken.lengths.mean if taken else self.looked.tokens_per_row,
            taken.lengths.learned_share if taken else self.looked.learned_share,
            self.longest,
            measured=taken is not None,
            kind="text" if self.looked.kind == "text" else "messages",
            documents=self.sources.are_texts,
            turns=self.looked.turns,
            structure=self.base.structure,
            memory_bytes=memory_bytes,
            device=device,
            held_out=self.held != "share",
            decided=self.given,
        )

    def lengths(self, maximum: int) -> str:
        """How long rows are beside the longest that is allowed."""
        if self.taken is None:
            return (
                f"Its tokenizer is not on this machine: from letters, the longest of the rows has about "
                f"{self.looked.longest:,} tokens"
            )
        lengths = self.taken.lengths
        told = f"Half of the rows have at most {lengths.percentiles[50]:,} tokens, 99 % {lengths.percentiles[99]:,}"
        if lengths.longest <= maximum:
            return f"{told}, the longest {lengths.longest:,}"
        count = max(1, round(lengths.longer(maximum) * self.rows.usable))
        return (
            f"{told}, the longest {lengths.longest:,}; about {count:,} {'row is' if count == 1 else 'rows are'} longer"
        )

    def unusable(self) -> str:
        """How many rows cannot be used, with the first of them."""
        first = "; ".join(f"{row.source}: {row.reason}" for row in self.bad[:NAMED])
        return f"{len(self.bad):,} of {self.rows.seen:,} rows cannot be used ({first})"


def refuse_short(known: Known, recipe: Recipe) -> None:
    """Raises DataError where most rows are longer than the base reads and nothing is left of them."""
    taken, tokenizer = known.taken, known.base.tokenizer
    maximum = recipe.data.max_length
    if taken is None or tokenizer is None or taken.lengths.longest <= maximum:
        return
    config = known.rows.config.model_copy(
        update={**taken.options, "max_length": maximum, "too_long": recipe.data.too_long}
    )
    lost, tried = too_long(taken, config, tokenizer)
    if lost > MOST_LOST * tried:
        raise DataError(
            f"{lost:,} of {tried:,} rows that were tried are too long for data.max_length: {maximum} (the base reads "
            f"{known.base.structure.context_length:,} tokens), even with data.too_long: "
            f"{recipe.data.too_long}. {known.lengths(maximum)}; take shorter rows, or a base that reads more"
        )
