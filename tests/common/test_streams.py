"""Standard streams that are closed, full, read by nobody or in an encoding without a letter: no print fails."""

import io
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from topwork.common.streams import readable, sure

PRINTS = """
import sys
from topwork.common.streams import SureStreams
streams = SureStreams(ends={ends})
{work}
sys.exit(streams.close(0))
"""
MANY = "for number in range(20_000): print('line', number)\nprint('done', file=sys.stderr)"


def ended(work: str, ends: bool, close: str = "", **environment: str) -> tuple[int, str, bytes]:
    """(exit code, standard error, what was read) of a process whose output is read for one line alone."""
    child = subprocess.Popen(
        ["sh", "-c", f'exec "$0" -c "$1" {close}', sys.executable, PRINTS.format(ends=ends, work=work)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stderr is not None
    first = child.stdout.readline()
    child.stdout.close()
    told = child.stderr.read().decode()
    return child.wait(60), told, first


def test_a_reader_that_has_gone_ends_no_work() -> None:
    assert ended(MANY, ends=False) == (0, "done\n", b"line 0\n")


def test_a_command_that_only_prints_ends_there_in_silence() -> None:
    assert ended(MANY, ends=True) == (141, "", b"line 0\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@pytest.mark.parametrize("ends", [False, True])
def test_a_full_log_is_told_once(ends: bool) -> None:
    code, told, _ = ended(MANY, ends, "> /dev/full")
    assert code == int(ends)
    assert told == "done\nwarning: standard output could not be written (No space left on device)\n"


@pytest.mark.parametrize("close", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_streams_that_are_closed(close: str) -> None:
    work = "print('a', flush=True); print('b', file=sys.stderr); sys.stdout.isatty(); assert sys.stdin.read() == ''"
    assert ended(work, ends=False, close=f"{'' if '<' in close else '< /dev/null '}{close}")[0] == 0


def test_a_standard_input_that_a_program_has_read_from_before() -> None:
    before = "import sys; assert sys.stdin.readline() == 'a\\n'"
    code = PRINTS.format(ends=False, work="print(sys.stdin.read(), end='')")
    found = subprocess.run(
        [sys.executable, "-c", f"{before}\n{code}"], input="a\nb\n", capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "b\n"), found.stderr


@pytest.mark.parametrize(
    ("encoding", "shown"), [("latin-1", b"\xe4 \\u2192 \\udcff\n"), ("ascii", b"\\xe4 \\u2192 \\udcff\n")]
)
def test_letters_that_an_encoding_lacks_are_escaped(encoding: str, shown: bytes) -> None:
    work = "print('ä \\u2192 \\udcff')"
    assert ended(work, ends=True, PYTHONIOENCODING=encoding) == (0, "", shown)


def test_bytes_that_are_no_text_are_read_as_windows_letters() -> None:
    told: list[str] = []
    assert readable("Grüße → 4711", "the question", told.append) == "Grüße → 4711"
    assert told == []
    given = "Grüße — 4711".encode("cp1252").decode("utf-8", "surrogateescape")
    assert readable(given, "the question", told.append) == "Grüße — 4711"
    assert len(told) == 1
    assert "the question is no UTF-8 (byte 0xfc at 3)" in told[0]
    assert "iconv" in told[0]
    assert readable("\ud800", "x", told.append) == "?"
    late = "Grüße".encode().decode("ascii", "surrogateescape")  # an ASCII stream of UTF-8
    assert readable(late, "x", told.append) == "Grüße"


def test_a_line_of_a_run_is_never_its_end() -> None:
    def breaks(text: str) -> None:
        raise BrokenPipeError

    sure(breaks)("a")
    latin = io.TextIOWrapper(io.BytesIO(), "ascii")
    tell: Callable[..., None] = sure(lambda text: print(text, file=latin))
    tell("ä → b")
    latin.flush()
    assert latin.buffer.getvalue() == b"\\xe4 \\u2192 b\n"  # type: ignore[attr-defined]


def test_standard_input_that_was_read_from_stays_as_it_is() -> None:
    """By a program that calls ours."""
    code = "import sys; sys.stdin.readline(); from topwork.common.streams import SureStreams; SureStreams(ends=False)"
    done = subprocess.run([sys.executable, "-c", code], input="a line\n", text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
