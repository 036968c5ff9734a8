"""The rows of a new recipe: what they are and how many."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import yaml

from topwork.common.errors import DataError
from topwork.data.config import DataConfig, SourceConfig, called
from topwork.data.conversations import BadRow, Conversation
from topwork.data.files.rows import Row, read_rows
from topwork.data.files.sources import file_bytes, locate
from topwork.data.parts import part_of
from topwork.data.summary import refuse_bad
from topwork.plan.sampled_rows import WHOLE_BYTES, sampled_rows

HUB_ROWS = 2000
"""Of a data set of the Hub, so many rows are looked at."""
BAD_SHARE = 0.1
"""Up to this share of rows that cannot be used, they are left out; where it is more, something else is wrong."""


@dataclass(frozen=True)
class SeenRows:
    """Rows as far as they were looked at.

    told   how each source was read, and what was noticed
    count  how many rows there are; `exact` whether that was counted
    bad    those of the `seen` rows that cannot be used
    set    options of `data` that they are read with although nobody asked for them, each with its reason
    """

    config: DataConfig
    conversations: list[Conversation]
    told: tuple[str, ...]
    count: int
    exact: bool
    bad: list[BadRow]
    seen: int
    set: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def usable(self) -> int:
        """How many rows can be learned, of all."""
        return round(self.count * (1 - len(self.bad) / max(1, self.seen)))


DOCUMENTS = {
    "paragraph": "What stands between empty lines is a document, so that some can be held out.",
    "line": "Each line is a document: there are no empty lines between them.",
}
LABELS = "The texts have a label beside them, which is learned as the answer."
GUESSED = "A guess by what the columns hold: turn it round, or name others, where it is not what you mean."
_SUGGESTED = re.compile(
    r'(Set|Say which is which, for example) data\.columns: (\{(?:"(?:\\.|[^"\\])*"|[^"{}])*\})(?! and data\.)'
)
"""How reading says which columns are likely meant; where it says "set", in small letters, there are two ways."""


def find_rows(config: DataConfig, texts: bool) -> SeenRows:
    """As `see_rows`, of plain `texts` cut up so that there are several, and with the columns that are likely meant
    where none are named. Raises DataError, which says how such options are named here."""
    try:
        found = _cut_up(config) if texts and "documents" not in config.model_fields_set else None
        return found or see_rows(config)
    except DataError as error:
        suggested = _SUGGESTED.search(str(error))
        named = config.model_fields_set | {each for source in _sources(config) for each in source.model_fields_set}
        if suggested is not None and "columns" not in named and isinstance(config.train, str):
            why = LABELS if suggested[1] == "Set" else GUESSED
            found = see_rows(config.model_copy(update={"columns": yaml.safe_load(suggested[2])}))
            return replace(found, set={"columns": why})
        if "data." not in str(error):
            raise
        raise DataError(
            f"{error}\nSuch an option is given as: topwork init MODEL DATA --set 'data.KEY: VALUE'"
        ) from error


def _sources(config: DataConfig) -> Sequence[SourceConfig]:
    given = config.train if isinstance(config.train, list) else [config.train]
    return [each for each in given if isinstance(each, SourceConfig)]


def _cut_up(config: DataConfig) -> SeenRows | None:
    """By paragraphs, else by lines; None where neither makes several documents."""
    for way, why in DOCUMENTS.items():
        found = see_rows(config.model_copy(update={"documents": way}))
        if found.count > 1:
            return replace(found, set={"documents": why})
    return None


def see_rows(config: DataConfig) -> SeenRows:
    """Files up to 16 MB whole, of larger ones some rows from all over. Raises DataError for what cannot be read, and
    where too many rows cannot be used."""
    conversations, told, bad = list[Conversation](), list[str](), list[BadRow]()
    count, seen, exact = 0, 0, True
    for source in config.sources(config.train):
        rows, total, whole, notes = _rows(source, config.documents)
        part = part_of(config, source, rows)
        more = "" if whole else f" of about {total:,}; the others were not looked at"
        told += [f"{called(source.path)}: {part.format.sentence}{more}", *notes]
        conversations += part.conversations
        bad += part.bad
        count, seen, exact = count + total, seen + len(rows), exact and whole
    if len(bad) > BAD_SHARE * seen:
        refuse_bad(bad, seen, config)
    if not conversations:
        raise DataError(f"none of {seen:,} rows can be used: {bad[0].source}: {bad[0].reason}")
    return SeenRows(config, conversations, tuple(told), count, exact, bad, seen)


def _rows(source: SourceConfig, documents: str) -> tuple[list[Row], int, bool, tuple[str, ...]]:
    """(rows, how many there are, whether these are all, remarks)."""
    located = locate(source, documents)
    if located is None:
        reading = read_rows(source, documents, source.at_most(HUB_ROWS))
        return reading.rows, len(reading.rows), len(reading.rows) < HUB_ROWS, reading.notes
    if sum(map(file_bytes, located.files)) <= WHOLE_BYTES:
        reading = read_rows(source, documents, source.max_rows)
        return reading.rows, len(reading.rows), True, reading.notes
    sampled = sampled_rows(source, documents, None)
    assert sampled is not None  # which it is for data sets of the Hub alone
    rows = [*sampled.rows, *sampled.longest]
    return rows, max(sampled.count, len(rows)), sampled.whole, located.notes
