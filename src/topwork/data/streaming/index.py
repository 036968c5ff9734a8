"""Rows that stay in their files: where each begins is known, and it is read when it is asked for."""

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from topwork.common.errors import RunError
from topwork.common.files import sha256_bytes, sha256_file
from topwork.data.files.rows import Row

_RUN = 1 << 14  # numbers that are looked up at a time


class IndexedRows(Sequence[Row]):
    """Rows that are read from disk when they are asked for."""

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, numbers: Iterable[int]) -> Iterator[Row]:
        """The rows of these numbers, in this order."""
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Raises RunError where a file is no more what was indexed."""
        raise NotImplementedError

    def digest(self) -> str:
        """What tells these rows from others, by what is in the files."""
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


class Index:
    """Where rows begin in a file, 8 bytes each, and the number that each has for people.

    end  where the last row ends; a row ends where the next begins
    """

    def __init__(self) -> None:
        self.starts, self.end = array("q"), 0
        self._numbers = array("q")

    def __len__(self) -> int:
        return len(self.starts)

    def add(self, start: int, number: int) -> None:
        """One more row."""
        self.starts.append(start)
        self._numbers.append(number)

    def close(self, end: int) -> None:
        """There are no more. Numbers that run on with the rows, as they nearly always do, are not kept."""
        self.end = end
        if self._numbers and self._numbers[-1] - self._numbers[0] == len(self) - 1:
            self._numbers = self._numbers[:1]

    def place(self, at: int) -> tuple[int, int]:
        """Where a row begins, and its length with what is between it and the next."""
        start = self.starts[at]
        return start, (self.starts[at + 1] if at + 1 < len(self.starts) else self.end) - start

    def number(self, at: int) -> int:
        """The row's number for people."""
        return self._numbers[at] if len(self._numbers) > 1 else self._numbers[0] + at


class FileRows(IndexedRows):
    """A file's rows. `row` makes one of its bytes and its number for people; `sources` are what the file is made of,
    where it is a copy."""

    def __init__(
        self, path: Path, index: Index, row: Callable[[bytes, int], Row], sources: Sequence[Path] = ()
    ) -> None:
        self.path, self.where, self._row = path, index, row
        self._sources = list(sources)
        self._stamps = {each: stamp(each) for each in (path, *sources)}

    def __len__(self) -> int:
        return len(self.where)

    def read(self, numbers: Iterable[int]) -> Iterator[Row]:
        with open(self.path, "rb") as file:
            handle = file.fileno()
            for at in numbers:
                start, length = self.where.place(at)
                yield self._row(os.pread(handle, length, start), self.where.number(at))

    def check_unchanged(self) -> None:
        for path, before in self._stamps.items():
            if not path.exists() or stamp(path) != before:
                raise RunError(
                    f"{path} changed while its rows were being streamed: what is read now are not the rows that were "
                    "indexed. Bring the file back and go on with --resume, or begin anew with what it is now"
                )

    def digest(self) -> str:
        return sha256_bytes(" ".join(map(sha256_file, self._sources or [self.path])).encode())


class Joined(IndexedRows):
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[IndexedRows]) -> None:
        self.parts = parts
        self._firsts = [sum(map(len, parts[:at])) for at in range(len(parts))]
        self._count = sum(map(len, parts))

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: Iterable[int]) -> Iterator[Row]:
        for owner, own in by_owner(self._firsts, numbers):
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


def stamp(path: Path) -> tuple[int, int, int]:
    """What tells a file from another under its name, and from itself after a change."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
