"""Where the rows of a file stand, so that any of them can be read alone: `data.streaming`.

One scan finds where each row begins, a number of 8 bytes each. Nothing else of a file is held.
"""

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from topwork.common.errors import DataError, RunError
from topwork.common.files import sha256_bytes, sha256_file
from topwork.data.layouts import Layout
from topwork.data.rows import Row


class IndexedRows(Sequence[Row]):
    """Rows that are read from disk when they are asked for, one file's or several's."""

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, numbers: Iterable[int]) -> Iterator[Row]:
        """The rows of these numbers, in this order. Raises DataError for one that is no row."""
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Raises RunError where a file is no more what was indexed."""
        raise NotImplementedError

    def digest(self) -> str:
        """What tells these rows from others: of the files, not of what they mean."""
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...

    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        chosen = range(len(self))[at]
        return list(self.read(chosen)) if isinstance(chosen, range) else next(self.read([chosen]))

    def __iter__(self) -> Iterator[Row]:
        return self.read(range(len(self)))


class FileRows(IndexedRows):
    """A file's rows, by where they begin (8 bytes a row, and 8 more where rows and their numbers do not run alike).

    source  the file that people named, where `path` is what was unpacked of it
    """

    def __init__(self, path: Path, layout: Layout, max_rows: int | None = None, source: Path | None = None) -> None:
        """Scan the file. Raises DataError where it holds no rows."""
        self.path, self.layout, self.source = path, layout, source or path
        self._stamps = {each: stamp(each) for each in {self.path, self.source}}
        self.starts, numbers = array("q"), array("q")
        with open(path, "rb") as file:
            self.end = os.fstat(file.fileno()).st_size
            for start, number in layout.bounds(file):
                if len(self.starts) == max_rows:
                    self.end = start
                    break
                self.starts.append(start)
                numbers.append(number)
        if not self.starts:
            raise DataError(f"{path} holds no rows; expected at least one (is the file empty?)")
        self.first = numbers[0]
        self.numbers = None if numbers[-1] - self.first == len(numbers) - 1 else numbers

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, numbers: Iterable[int]) -> Iterator[Row]:
        with open(self.path, "rb") as file:
            handle = file.fileno()
            for at in numbers:
                start = self.starts[at]
                stop = self.starts[at + 1] if at + 1 < len(self.starts) else self.end
                number = self.first + at if self.numbers is None else self.numbers[at]
                yield self.layout.row(os.pread(handle, stop - start, start), number)

    def check_unchanged(self) -> None:
        for path, before in self._stamps.items():
            refuse_changed(path, before)

    def digest(self) -> str:
        return sha256_file(self.source)


class Joined(IndexedRows):
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[IndexedRows]) -> None:
        self.parts = parts
        self.firsts = [sum(map(len, parts[:at])) for at in range(len(parts))]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, numbers: Iterable[int]) -> Iterator[Row]:
        for owner, own in by_owner(self.firsts, numbers):
            yield from self.parts[owner].read(own)

    def check_unchanged(self) -> None:
        for part in self.parts:
            part.check_unchanged()

    def digest(self) -> str:
        return sha256_bytes(" ".join(part.digest() for part in self.parts).encode())


def by_owner(firsts: Sequence[int], numbers: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
    """Runs of numbers that lie in one part, as (part, numbers counted from its first); the order stays.

    firsts  the number at which each part begins
    """
    owner, own = -1, list[int]()
    for number in numbers:
        found = bisect_right(firsts, number) - 1
        if found != owner or len(own) == _RUN:
            if own:
                yield owner, own
            owner, own = found, []
        own.append(number - firsts[found])
    if own:
        yield owner, own


_RUN = 1 << 14


def stamp(path: Path) -> tuple[int, int, int]:
    """What tells a file from another under its name, and from itself after a change."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def refuse_changed(path: Path, before: tuple[int, int, int]) -> None:
    """Raises RunError where a file is gone, or its `stamp` is another."""
    if not path.exists() or stamp(path) != before:
        raise RunError(
            f"{path} changed while its rows were being streamed: what is read now are not the rows that were indexed. "
            "Bring the file back and go on with --resume, or begin anew with what it is now"
        )
