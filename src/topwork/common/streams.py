"""Standard input and output as they really are: closed, hung up, full, or in an encoding that has not every letter.

A run that takes hours does not end because nobody reads its lines any more (`| head`, a closed terminal, a full log):
metrics.jsonl has all of them. A command that only prints ends there, in silence.
"""

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

BROKEN_PIPE = 141
"""What a shell calls the end of a program whose reader has gone: 128 and SIGPIPE's number."""


class _Out(io.RawIOBase):
    """Writes to another raw stream. What that refuses is dropped; a pipe that broke is SystemExit where `ends`."""

    def __init__(self, stream: io.TextIOWrapper, raw: Any, ends: bool) -> None:
        self._stream, self._raw, self._ends = stream, raw, ends  # the stream closes what it is over when it goes
        self.refused: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = self._raw.write(rest)
                if written is None:  # one that does not block, and is full
                    select.select([], [self._raw], [])
                rest = rest[written or 0 :]
        except OSError as error:
            first, self.refused = self.refused is None, error
            if first and self._ends and error.errno == errno.EPIPE:
                raise SystemExit(BROKEN_PIPE) from error
        return size

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def writable(self) -> bool:
        return True


class SureStreams:
    """Puts standard streams in place of which no print fails: what an encoding lacks is escaped, what cannot be written
    is dropped. With `ends`, a reader of standard output that has gone ends the process with 141. They stay until the
    process ends: Python flushes them then."""

    def __init__(self, ends: bool) -> None:
        self._ends = ends
        sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - stays open
        if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is told by `readable`
            ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
            with suppress(io.UnsupportedOperation):  # read from already, by a program that calls this one
                sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="surrogateescape")
        sys.stdout, self._out = _sure(sys.stdout, ends)
        sys.stderr, _ = _sure(sys.stderr, False)

    def close(self, code: int) -> int:
        """The exit code: `code`, unless a command that only prints could not."""
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        refused = self._out.refused if self._out is not None else None
        if refused is None or refused.errno in (errno.EPIPE, errno.EIO):
            return code
        print(f"warning: standard output could not be written ({refused.strerror})", file=sys.stderr, flush=True)
        return code or int(self._ends)


def _sure(stream: Any, ends: bool) -> tuple[Any, _Out | None]:
    """The stream over an `_Out`, and this; one that is no file's is only told to escape."""
    if stream is None:  # closed by whoever began the process
        return open(os.devnull, "w", encoding="utf-8"), None
    if not isinstance(stream, io.TextIOWrapper):
        return stream, None
    with suppress(OSError):
        stream.flush()
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.RawIOBase) or isinstance(raw, _Out):  # in memory, or done
        stream.reconfigure(errors="backslashreplace")
        return stream, None
    out = _Out(stream, raw, ends)
    buffer: Any = out if raw is stream.buffer else io.BufferedWriter(out)
    made = io.TextIOWrapper(
        buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip
    return made, out


def readable(text: str, what: str, warn: Callable[[str], None]) -> str:
    """Text that came with bytes that are no UTF-8 (kept as surrogates), read as Windows-1252, which has all letters of
    latin-1; `warn` is told, and how to give it rightly."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair: no byte of anything
        return text.encode("utf-8", "replace").decode()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        read = data.decode("cp1252", errors="replace")
        warn(
            f"warning: {what} is no UTF-8 (byte 0x{data[error.start]:02x} at {error.start + 1}) and was read as "
            f"Windows-1252: {read[max(0, error.start - 10) : error.start + 10]!r}; give it in UTF-8, for example "
            "through: iconv -f latin1 -t utf-8"
        )
        return read


def sure(tell: Callable[..., None]) -> Callable[..., None]:
    """`tell`, which is then never the end of a run: what an encoding lacks is escaped, and a stream that nobody reads
    is left alone."""

    def told(*values: Any, **named: Any) -> None:
        with suppress(OSError):
            try:
                tell(*values, **named)
            except UnicodeEncodeError:
                tell(*(ascii(value)[1:-1] if isinstance(value, str) else value for value in values), **named)

    if (status := getattr(tell, "doing", None)) is not None:  # a command's log shows what is being done, too
        vars(told)["doing"] = sure(status)
    return told
