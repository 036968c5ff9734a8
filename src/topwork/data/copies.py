"""Copies of files in which a row cannot be found by its place: unpacked, or as small batches of a table.

They are written once, below `$TOPWORK_CACHE`, under a name that follows from the file as it is, and may be deleted.
"""

import bz2
import gzip
import lzma
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from topwork.common.errors import DataError
from topwork.common.files import sha256_bytes, sha256_file
from topwork.data.index import IndexedRows, refuse_changed, stamp
from topwork.data.rows import Row

Log = Callable[[str], None]
PACKED = (".gz", ".zst", ".bz2", ".xz")
TABLES = (".parquet", ".arrow")
_BATCH = 64  # rows of a table that are read to have one of them


def copies_root() -> Path:
    """Where the copies are: `$TOPWORK_CACHE`, or ~/.cache/topwork."""
    return Path(os.environ.get("TOPWORK_CACHE") or "~/.cache/topwork").expanduser() / "rows"


def unpacked(path: Path, log: Log) -> Path:
    """The content of a packed file, as a file beside the cache. Raises DataError where it cannot be unpacked."""

    def write(target: BinaryIO) -> None:
        with _opened(path) as source:
            shutil.copyfileobj(source, target, 1 << 22)

    return _copy(path, path.with_suffix("").name, write, log)


def _opened(path: Path) -> Any:
    kind = path.suffix.lower()
    if kind == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    opened: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return opened[kind](path)


def _copy(path: Path, name: str, write: Callable[[BinaryIO], None], log: Log) -> Path:
    found = path.stat()
    key = sha256_bytes(f"{path.resolve()} {found.st_ino} {found.st_size} {found.st_mtime_ns}".encode())[:16]
    target = copies_root() / key / name
    if target.exists():
        return target
    aside = target.with_name(f".{name}-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            write(file)
        os.replace(aside, target)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise DataError(
            f"{path} could not be copied to {target}, from where its rows are streamed: {error}. Make room, or set "
            "TOPWORK_CACHE to a folder on a larger disk; where the file is damaged, fetch it again"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    log(f"{path.name}: rows are streamed from {target} ({target.stat().st_size:,} bytes), which may be deleted after")
    return target


def table_copy(path: Path, log: Log) -> Path:
    """A parquet or Arrow file as an Arrow file of batches of `_BATCH` rows, any of which is read alone."""
    import pyarrow

    def write(target: BinaryIO) -> None:
        schema, batches = _batches(path)
        with pyarrow.ipc.new_file(target, schema) as writer:
            left = pyarrow.Table.from_batches([], schema)
            for batch in batches:
                left = pyarrow.concat_tables([left, pyarrow.Table.from_batches([batch])]).combine_chunks()
                whole = len(left) - len(left) % _BATCH
                writer.write_table(left.slice(0, whole), max_chunksize=_BATCH)
                left = left.slice(whole)
            writer.write_table(left)

    return _copy(path, f"{path.stem}.batches", write, log)


def _batches(path: Path) -> tuple[Any, Iterable[Any]]:
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() == ".parquet":
        table = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        return table.schema_arrow, table.iter_batches(batch_size=16 * _BATCH)
    try:
        reader = pyarrow.ipc.open_file(str(path))
        return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
    except pyarrow.ArrowInvalid:
        stream = pyarrow.ipc.open_stream(pyarrow.OSFile(str(path)))
        return stream.schema, stream


class TableRows(IndexedRows):
    """The rows of a table, by their numbers."""

    def __init__(self, path: Path, log: Log, max_rows: int | None = None) -> None:
        """Make the copy where there is none. Raises DataError for what is no such table, or holds no rows."""
        import pyarrow

        self.path, self._stamp = path, stamp(path)
        self._reader = pyarrow.ipc.open_file(pyarrow.OSFile(str(table_copy(path, log))))
        batches = self._reader.num_record_batches
        last = len(self._reader.get_batch(batches - 1)) if batches else 0
        self._count = min(max(0, batches - 1) * _BATCH + last, max_rows or sys.maxsize)
        if not self._count:
            raise DataError(f"{path} holds no rows; expected at least one (is the file empty?)")

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: Iterable[int]) -> Iterator[Row]:
        held, batch = -1, None
        for number in numbers:
            if number // _BATCH != held:
                held = number // _BATCH
                batch = self._reader.get_batch(held)
            assert batch is not None
            yield Row(batch.slice(number % _BATCH, 1).to_pylist()[0], f"{self.path.name}[{number}]")

    def check_unchanged(self) -> None:
        refuse_changed(self.path, self._stamp)

    def digest(self) -> str:
        return sha256_file(self.path)


class SetRows(IndexedRows):
    """The rows of a data set of Hugging Face's, which maps its files into memory itself."""

    def __init__(self, table: Any, name: str, max_rows: int | None = None) -> None:
        self.table, self.name = table, name
        self._count = min(len(table), max_rows or sys.maxsize)

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: Iterable[int]) -> Iterator[Row]:
        for number in numbers:
            yield Row(dict(self.table[number]), f"{self.name}[{number}]")

    def check_unchanged(self) -> None:
        pass

    def digest(self) -> str:
        return str(self.table._fingerprint)
