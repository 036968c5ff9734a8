"""Text that was damaged before it came here: read in a wrong encoding, escaped twice, with letters that nobody sees."""

import re
import unicodedata
from collections.abc import Callable, Iterator

from topwork.plan.lint.examined import Examined
from topwork.plan.lint.finding import Finding, Severity, graded, of_rows

_CHECKED = "convert the file anew from its source (data.encoding says how a text file is read)"

_CP1252 = "\u0080-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122"
_LATIN_RUN = re.compile(
    f"[ÂÃ][{_CP1252}]|[âï][{_CP1252}]{{2}}|ð[{_CP1252}]{{3}}|(?:[ÐÑ][{_CP1252}]){{3,}}|(?:[å-é][{_CP1252}]{{2}}){{2,}}"
)
_CYRILLIC_RUN = re.compile("(?:[РС][^\x00-\x7f]){3,}")
"""UTF-8 that was read as cp1252 or cp1251: a lead byte's letter and those of as many bytes as follow one."""
_OTHER = ("锟斤拷", "烫烫烫", "ï»¿")
"""U+FFFD read as GBK, memory that was never written, a byte order mark read as cp1252."""


def is_mojibake(text: str) -> bool:
    """Whether some of it is UTF-8 that was read as something else: written back, it must read as UTF-8."""
    if any(piece in text for piece in _OTHER):
        return True
    return any(_reads(found.group(), "cp1252") for found in _LATIN_RUN.finditer(text)) or any(
        _reads(found.group(), "cp1251") for found in _CYRILLIC_RUN.finditer(text)
    )


def _reads(text: str, encoding: str) -> bool:
    data = bytearray()
    for letter in text:
        try:
            data += letter.encode(encoding)
        except UnicodeEncodeError:
            if ord(letter) > 0xFF:
                return False
            data.append(ord(letter))  # a byte that the encoding leaves open
    try:
        return not any(unicodedata.category(letter) == "Cc" for letter in data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


_REPLACED = re.compile("\ufffd")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")
_HTML = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|rsquo|lsquo|rdquo|ldquo|mdash|ndash|hellip|#\d{2,6}|#x[0-9a-fA-F]{2,5});"
)
_ESCAPED = re.compile(r"\\[nt](?![a-z]*\\)|\\u[0-9a-fA-F]{4}")


def _escaped(text: str) -> bool:
    """A backslash and an n where a line should end, in a text that has no line end; code has both."""
    return "\\" in text and "\n" not in text and _ESCAPED.search(text) is not None


_CHECKS: tuple[tuple[str, Callable[[str], object], str, str, bool], ...] = (
    # rule, whether a text has it, what is told, what to do, whether many of them are a warning
    (
        "encoding-mojibake", is_mojibake,
        "hold text that was read in a wrong encoding (as 'Ã¼' for 'ü', 'â€™' for an apostrophe)", _CHECKED, True,
    ),
    (
        "encoding-replaced", _REPLACED.search,
        "hold U+FFFD, which stands where a letter could not be read and is lost", _CHECKED, True,
    ),
    (
        "control-characters", _CONTROL.search,
        "hold control characters (NUL, escape sequences of a terminal, C1)",
        "take them out; what colours a terminal is no text", True,
    ),
    (
        "invisible-characters", _INVISIBLE.search,
        "hold letters that nobody sees (zero width, marks of direction, tags)",
        "take them out where they carry no meaning: they make other tokens of the same words, and can hide text", True,
    ),
    (
        "html-leftovers", _HTML.search, "hold HTML entities (&amp; &quot; &#39;)",
        "unescape them (html.unescape) unless the model is to write HTML", False,
    ),
    (
        "escaped-newlines", _escaped, "hold \\n, \\t or \\u00e9 as letters and no line end: escaped twice",
        "unescape them unless they are meant", False,
    ),
)  # fmt: skip


def damage(examined: Examined) -> Iterator[Finding]:
    """All of the above, in one pass over the texts."""
    found: list[list[str]] = [[] for _ in _CHECKS]
    for side in examined.sides:
        for row, _, text in side.texts():
            ascii_only = text.isascii()
            for (rule, has, *_), rows in zip(_CHECKS, found):
                if ascii_only and rule in _NEVER_ASCII:
                    continue
                if has(text):
                    rows.append(row.source)
    for (rule, _, told, remedy, grave), rows in zip(_CHECKS, found):
        if rows:
            severity: Severity = graded(len(set(rows)), examined.total, 0.005) if grave else "notice"
            yield of_rows(rule, severity, rows, examined.total, told, remedy)


_NEVER_ASCII = frozenset({"encoding-mojibake", "encoding-replaced", "invisible-characters"})
