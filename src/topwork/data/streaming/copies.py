"""Copies of rows that cannot be found by their place: of packed files, tables, text, other encodings and data sets.

They are written once, one JSON line a row, below `$TOPWORK_CACHE`, under a name that follows from the files as they are
and from how, and by which version, they are read; they may be deleted.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import topwork
from topwork.common.cache import cache_root, make_cache
from topwork.common.errors import DataError
from topwork.common.files import sha256_bytes, write_json
from topwork.data.files.rows import Row
from topwork.data.streaming.index import FileRows, Index, stamp

Log = Callable[[str], None]
_ROWS, _NOTES = "rows.jsonl", "notes.json"


def copied_rows(
    name: str, rows: Callable[[], Iterable[Row]], notes: list[str], limit: int | None, files: Sequence[Path],
    key: str, log: Log, before: str = "",
) -> FileRows:  # fmt: skip
    """The first `limit` rows, or all, of a copy, which is made where there is none.

    name    what people call the source
    notes   what was noticed while the rows were read; gets what was noticed when the copy was made
    files   what the rows are from, or folders of it
    key     what else they follow from
    before  goes in front of the rows' names

    Raises DataError for what cannot be read or copied.
    """
    sources = [inner for path in files for inner in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    sources = [path for path in sources if path.is_file()]
    made = json.dumps([topwork.__version__, key, limit, *([str(path.resolve()), *stamp(path)] for path in sources)])
    folder = cache_root() / "rows" / sha256_bytes(made.encode())[:24]
    if not (folder / _NOTES).exists() or not (folder / _ROWS).exists():
        _write(folder, islice(rows(), limit), name)
        write_json(folder / _NOTES, notes)
        size = (folder / _ROWS).stat().st_size
        log(f"{name}: its rows are streamed from a copy, {folder / _ROWS} ({size:,} bytes), which may be deleted after")
    else:
        notes[:] = json.loads((folder / _NOTES).read_text("utf-8"))
    return FileRows(folder / _ROWS, _index(folder / _ROWS), partial(_row, before), sources)


def _write(folder: Path, rows: Iterable[Row], name: str) -> None:
    aside = folder / f".{_ROWS}-{secrets.token_hex(4)}"
    make_cache(folder)
    try:
        with open(aside, "w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps([row.source, row.fields]) + "\n")
            out.flush()
            os.fsync(out.fileno())
        _put(aside, folder / _ROWS)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise DataError(
            f"{name}: its rows could not be copied to {folder}, from where they would be streamed ({error}; "
            f"{free:,} bytes are free). Make room, or set TOPWORK_CACHE to a folder on a larger disk"
        ) from error
    except TypeError as error:
        raise DataError(
            f"{name}: a row holds a value that has no place in JSON, so it is not streamed: {error}"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _put(aside: Path, target: Path) -> None:
    """A copy that another process made meanwhile stays: it is the same, and is read by its place already."""
    try:
        os.link(aside, target)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        os.replace(aside, target)


def _index(path: Path) -> Index:
    index, at = Index(), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            index.add(at, number)
            at += len(line)
    index.close(at)
    return index


def _row(before: str, raw: bytes, _: int) -> Row:
    source, fields = json.loads(raw)
    return Row(fields, before + source)
