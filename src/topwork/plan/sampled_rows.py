"""Some of a source's rows, spread over it, and how many it has: what a look at large files costs is a look at these."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from topwork.common.errors import DataError
from topwork.data.config import SourceConfig
from topwork.data.files.decoding import DataFile, packing
from topwork.data.files.json_rows import DECODER
from topwork.data.files.places import kind_of
from topwork.data.files.rows import Row, read_rows
from topwork.data.files.sources import file_bytes, locate

WHOLE_BYTES = 16 << 20
"""Files that are not larger together are read whole: all rows are counted, and the longest is known."""
FIRST_ROWS = 20_000
"""Of larger files whose rows have no place that could be gone to, so many are read from the beginning."""
SAMPLE_LETTERS = 400_000
"""About so many letters are put into tokens, which takes half a second."""
SAMPLE_ROWS = 4_000
LONGEST = 8
"""So many of the longest rows are looked at beside the sample, since one row decides how large a pass has to be."""
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class SampledRows:
    """A source's rows as far as they were looked at.

    rows     those of the sample, in their order
    longest  of those that were read and are not in it, the ones with the most letters
    count    how many rows the source has
    exact    whether that was counted, and not told from the sizes of some
    """

    rows: list[Row]
    longest: list[Row]
    count: int
    exact: bool

    @property
    def whole(self) -> bool:
        """Whether no row is left out."""
        return self.exact and len(self.rows) == self.count


def sampled_rows(source: SourceConfig, documents: str, left: int | None) -> SampledRows | None:
    """The first `left` rows of a source, or all, sampled; None where it is a data set of the Hub, for which nobody is
    asked. Raises DataError as reading it whole would."""
    located = locate(source, documents)
    if located is None:
        return None
    limit = source.at_most(left)
    size = sum(map(file_bytes, located.files))
    if located.saved or size <= WHOLE_BYTES or (limit is not None and limit <= FIRST_ROWS):
        rows = read_rows(source, documents, limit).rows
        return _spread(rows, len(rows), exact=True)
    found = _by_place(located.files, size)
    if found is None:
        rows = read_rows(source, documents, FIRST_ROWS).rows
        count = max(len(rows), round(len(rows) * size / max(1, sum(map(_letters, rows)))))
        found = _spread(rows, count, exact=len(rows) < FIRST_ROWS)
    return SampledRows(found.rows, found.longest, min(found.count, limit or found.count), found.exact)


def _spread(rows: Sequence[Row], count: int, exact: bool) -> SampledRows:
    """As many as are quickly looked at, spread over all, and the longest of the others."""
    letters = [_letters(row) for row in rows]
    step = max(1, -(-sum(letters) // SAMPLE_LETTERS), -(-len(rows) // SAMPLE_ROWS))
    if step == 1:
        return SampledRows(list(rows), [], count, exact)
    drawn = Random(0)  # one of each stretch, not every so manieth: rows often repeat in a rhythm
    chosen = [drawn.randrange(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]
    others = sorted(set(range(len(rows))).difference(chosen), key=lambda number: -letters[number])[:LONGEST]
    return SampledRows([rows[number] for number in chosen], [rows[number] for number in others], count, exact)


def _letters(row: Row) -> int:
    """About how many letters a row has, whatever it is made of."""
    return len(str(row.fields))


# Lines of JSON, which can be gone to


def _by_place(files: Sequence[DataFile], size: int) -> SampledRows | None:
    """Lines of plain files, from all over them; None where they are of another kind, or one cannot be read."""
    if not all(_is_lines(file) for file in files):
        return None
    lines = [line for file in files for line in _lines_of(file, round(SAMPLE_ROWS * file_bytes(file) / size))]
    try:
        rows = [Row(DECODER.decode(text.decode("utf-8")), place) for place, text in lines]
    except (ValueError, RecursionError, DataError):
        return None
    if not rows or not all(isinstance(row.fields, dict) for row in rows):
        return None
    return _spread(rows, round(size * len(lines) / sum(len(text) for _, text in lines)), exact=False)


def _is_lines(file: DataFile) -> bool:
    return not packing(file.path) and kind_of(file.path) in _LINES and file.encoding in (None, "utf-8")


def _lines_of(file: DataFile, wanted: int) -> Iterator[tuple[str, bytes]]:
    """(where it stands, the line): the first behind a place in each of so many stretches, so that long lines are no
    likelier than short ones."""
    stretch, drawn = max(1, file_bytes(file) // max(1, wanted)), Random(0)
    with file.path.open("rb") as opened:
        for start in range(0, file_bytes(file), stretch):
            opened.seek(drawn.randrange(start, start + stretch))
            opened.readline()
            place = opened.tell()
            line = opened.readline().removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{file.name}, at byte {place:,}", line
