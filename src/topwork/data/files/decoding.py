"""Files of text as text: unpacked, decoded, and where that cannot be done one line that says what to do."""

import codecs
import encodings.aliases
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from topwork.common.errors import DataError, did_you_mean
from topwork.data.files.charsets import likely_encodings

PACKED = (".gz", ".bz2", ".xz", ".zst")
_HEAD_BYTES = 1 << 20
_ENOUGH_LINES = 2000  # of letters beyond ASCII, to judge an encoding by
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What damaged archives raise, each library its own; pyarrow's are children of OSError or ValueError."""
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_OTHER_KINDS = (
    (b"\x1f\x8b", "packed with gzip; name it so: {name}.gz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; name it so: {name}.zst"),
    (b"BZh", "packed with bzip2; name it so: {name}.bz2"),
    (b"\xfd7zXZ\x00", "packed with xz; name it so: {name}.xz"),
    (b"PK\x03\x04", "a zip archive or an Excel sheet; unpack it, or name it .xlsx"),
    (b"PAR1", "a parquet file; name it .parquet"),
    (b"ARROW1", "an arrow file; name it .arrow"),
    (b"SQLite format 3", "a SQLite data base; export its table as CSV"),
    (b"%PDF", "a PDF; take its text out first"),
    (b"version https://git-lfs", "a pointer of git-lfs in place of the file; fetch the file itself: git lfs pull"),
    (b"<!DOCTYPE html", "a web page in place of the file; download the file itself (its raw address)"),
    (b"<!doctype html", "a web page in place of the file; download the file itself (its raw address)"),
)  # fmt: skip


@dataclass
class DataFile:
    """A file that rows are read from.

    name       what people call it: its name, or its path in a folder where several have this name
    encoding   of text that is not UTF-8; None where nobody said
    documents  what is one document of a .txt: file, paragraph or line
    split      the list of this name, in a .json that holds several; the sheet of a .xlsx
    chosen     whether the recipe says which columns are read, so that others may be what they like
    notes      what was noticed while it was read, for people
    """

    path: Path
    name: str = ""
    encoding: str | None = None
    documents: str = "file"
    split: str | None = None
    chosen: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.name or self.path.name

    def note(self, sentence: str) -> None:
        """Keep a sentence about this file, once."""
        line = f"{self.name}: {sentence}"
        if line not in self.notes:
            self.notes.append(line)


def packing(path: Path) -> str:
    """`.gz`, `.bz2`, `.xz` or `.zst`, or nothing."""
    return path.suffix.lower() if path.suffix.lower() in PACKED else ""


def unpacked_name(path: Path) -> Path:
    """The path without the suffix of its packing."""
    return path.with_suffix("") if packing(path) else path


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, unpacked while it is read."""
    kind = packing(path)
    if kind == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if kind == ".bz2":
        import bz2

        return bz2.open(path)
    if kind == ".xz":
        return lzma.open(path)
    if kind == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def read_lines(file: DataFile, newline: str = "\n") -> Iterator[str]:
    """The lines with their ends, in constant memory. newline="" ends lines at \\r too, as in quoted CSV.

    Raises DataError for what is empty, damaged, in another encoding than it is read in, or holds a NUL byte.
    """
    codec = _codec(file)
    some = False
    try:
        with open_bytes(file.path) as raw, io.TextIOWrapper(raw, encoding=codec, newline=newline) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.lstrip("\ufeff")
                if "\0" in line:
                    raise DataError(_nul(file, codec, number))
                some = some or not line.isspace()
                yield line
    except UnicodeDecodeError as error:
        raise DataError(_undecodable(file, codec)) from error
    except _BROKEN as error:
        raise DataError(_unreadable(file, error)) from error
    if not some:
        raise DataError(f"{file.name} is empty; expected at least one row")


def read_text(file: DataFile) -> str:
    """The whole text. Raises DataError as `read_lines` does."""
    return "".join(read_lines(file))


def _unreadable(file: DataFile, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    kind = packing(file.path)
    if kind:
        return (
            f"{file.path} cannot be unpacked ({reason}): it is cut off or damaged, or no {kind} at all; fetch it again"
        )
    return f"{file.path} cannot be read ({reason})"


# Which encoding


def _codec(file: DataFile) -> str:
    """What to decode with: as a byte order mark says, as `data.encoding` says, or UTF-8."""
    named = None if file.encoding is None else checked_encoding(file.encoding)
    try:
        with open_bytes(file.path) as stream:
            head = stream.read(_HEAD_BYTES)
    except _BROKEN as error:
        raise DataError(_unreadable(file, error)) from error
    other = next((what for magic, what in _OTHER_KINDS if head.startswith(magic)), None)
    if other is not None:
        raise DataError(f"{file.path} is no {unpacked_name(file.path).suffix}: it is {other.format(name=file.name)}")
    marked = next((codec for mark, codec in _BOMS if head.startswith(mark)), None)
    if marked is not None:
        if marked != "utf-8-sig":
            file.note(f"read as {marked.upper()}, as its byte order mark says")
        return marked
    if named is None:
        if b"\x1b$B" in head or b"\x1b$@" in head:
            raise DataError(f"{file.path} is in iso2022_jp, not UTF-8; say data.encoding: iso2022_jp")
        return "utf-8"
    if codecs.lookup(named).name != "utf-8" and not head.isascii() and _is_utf8(head):
        file.note(f"it is UTF-8 and read so; data.encoding ({file.encoding}) is for files that are not")
        return "utf-8"
    return named


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD_BYTES)
    except UnicodeDecodeError:
        return False
    return True


def checked_encoding(name: str) -> str:
    """The name, if it is one of an encoding of text. Raises DataError with the nearest right one."""
    try:
        found = codecs.lookup(name)
    except (LookupError, ValueError):
        known = {*encodings.aliases.aliases, *encodings.aliases.aliases.values()}
        near = did_you_mean(name.lower().replace("-", "_"), sorted(known), 2)
        raise DataError(
            f"data.encoding is {name!r}, which is no encoding{near or '; say gb18030, shift_jis, cp1251, cp1252 …'}"
        ) from None
    if not getattr(found, "_is_text_encoding", True):
        raise DataError(f"data.encoding is {name!r}, which is no encoding of text; say gb18030, shift_jis, cp1252 …")
    return name


# What to say where it cannot be decoded


@dataclass
class _Scan:
    """A file's lines, as far as they tell which encoding it is in. The first line that cannot be decoded is `bad`."""

    bad: bytes = b""
    line: int = 0
    offset: int = 0
    byte: int = 0
    reason: str = ""
    last: bool = False
    good_lines: int = 0
    bad_lines: int = 0
    sample: bytes = b""


def _scan(file: DataFile, codec: str) -> _Scan:
    """Go through a file line by line; the codec is one in which a line ends in the byte of ASCII's."""
    found = _Scan()
    offset = 0
    with open_bytes(file.path) as stream:
        for number, line in enumerate(stream, 1):
            found.last = False
            if not line.isascii():
                try:
                    line.decode(codec)
                    found.good_lines += 1
                except UnicodeDecodeError as error:
                    found.bad_lines += 1
                    if found.bad_lines == 1:
                        found.bad, found.line, found.offset = line, number, offset + error.start
                        found.byte, found.reason, found.last = line[error.start], error.reason, True
                if len(found.sample) < _HEAD_BYTES // 16:
                    found.sample += line
            offset += len(line)
            if found.good_lines + found.bad_lines > _ENOUGH_LINES and found.bad_lines:
                break
    return found


def _undecodable(file: DataFile, codec: str) -> str:
    if codec in ("utf-16", "utf-32"):
        return f"{file.path} is {codec.upper()} and ends in the middle of a character, or is damaged; fetch it again"
    if codec not in ("utf-8", "utf-8-sig"):
        return _not_as_named(file, codec)
    scan = _scan(file, "utf-8")
    where = f"byte 0x{scan.byte:02x} at offset {scan.offset:,}, line {scan.line:,}"
    if scan.last and scan.reason == "unexpected end of data" and scan.good_lines:
        return f"{file.path} ends in the middle of a character ({where}): it was cut off; fetch it again"
    if scan.good_lines and scan.good_lines >= scan.bad_lines:
        return _mixed(file, scan, where)
    if b"\0" in scan.bad or b"\0" in scan.sample:
        return f"{file.path} is not UTF-8: {where}. {_wide(file, codec)}"
    return f"{file.path} is not UTF-8: {where}. {_choices(scan)}"


def _mixed(file: DataFile, scan: _Scan, where: str) -> str:
    """Another encoding for the whole file would break the lines that are right."""
    names = likely_encodings(scan.bad)
    shown = f" (read as {names[0]}: {_around(scan.bad, names[0])})" if names else ""
    half = " They look like halves of surrogate pairs, which other programs wrote." if b"\xed\xa0" in scan.bad else ""
    return (
        f"{file.path} is UTF-8 but for {scan.bad_lines:,} line{'s' if scan.bad_lines > 1 else ''}; the first: {where}"
        f"{shown}.{half} Correct those lines; another data.encoding would damage the others"
    )


def _choices(scan: _Scan) -> str:
    """The offending line in the likeliest encodings, so that whoever knows the language sees which is right."""
    if b"\xed\xa0" in scan.bad or b"\xed\xb0" in scan.bad:
        return "It holds halves of surrogate pairs, which no encoding has; write the file anew as UTF-8"
    names = likely_encodings(scan.sample)
    if not names:
        return "No encoding that is known here reads it: it is damaged, or no text; fetch it again, as UTF-8"
    first, *others = (f"{name} it reads {_around(scan.bad, name)}" for name in names)
    if not others:
        return f"In {first}; if that is right, say data.encoding: {names[0]}"
    listed = ", in ".join([first, *others])
    return f"In {listed}. Say data.encoding: {names[0]}, or the one in which it reads right"


def _not_as_named(file: DataFile, codec: str) -> str:
    if codecs.lookup(codec).name.startswith(("utf-16", "utf-32")):
        return f"{file.path} is not {codec} as data.encoding says, or it is cut off"
    scan = _scan(file, codec)
    where = f"line {scan.line:,}"
    rest = [name for name in likely_encodings(scan.sample) if name != codec]
    as_utf8 = " It is UTF-8: leave data.encoding out." if _is_utf8(scan.sample) else ""
    shown = "".join(f" In {name} it reads {_around(scan.bad, name)}." for name in rest[:2]) if not as_utf8 else ""
    return f"{file.path} is not {codec}, as data.encoding says: it cannot be read on {where}.{as_utf8}{shown}"


def _around(line: bytes, codec: str, width: int = 40) -> str:
    """What the first letters beyond ASCII are in, in this encoding."""
    text = line.decode(codec, "replace").strip("\r\n")
    at = next((number for number, char in enumerate(text) if not char.isascii()), 0)
    start = max(0, at - width // 3)
    return repr(("…" if start else "") + text[start : start + width] + ("…" if start + width < len(text) else ""))


def _nul(file: DataFile, codec: str, number: int) -> str:
    if codec.startswith(("utf-16", "utf-32")):
        return f"{file.path} holds a NUL character in line {number:,}: it is damaged or no text; write it anew"
    with open_bytes(file.path) as stream:
        offset = 0
        for line in stream:
            if b"\0" in line:
                offset += line.index(b"\0")
                break
            offset += len(line)
    return f"{file.path} holds a NUL byte at offset {offset:,}, line {number:,}. {_wide(file, codec)}"


def _wide(file: DataFile, codec: str) -> str:
    """UTF-16 without a byte order mark has a NUL in every letter of ASCII's; else it is damage."""
    with open_bytes(file.path) as stream:
        head = stream.read(1000)
    for name, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[0::2])):
        if codec.startswith("utf-8") and len(zeros) > 1 and zeros.count(0) > 0.4 * len(zeros):
            return f"It is likely {name}: say data.encoding: {name}"
    return "Text has none: the file is damaged or no text; write it anew, or take those bytes out (tr -d '\\000')"
