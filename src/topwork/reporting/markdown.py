"""Values of a run as they stand in Markdown: escaped, so that none of them is read as markup."""

import re

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$])")
_FIRST = re.compile(r"^([-+=]|\d+[.)](?=\s|$))")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def one_line(value: object) -> str:
    """A value's text without line ends and control characters."""
    return " ".join(_CONTROL.sub(" ", str(value)).split())


def text(value: object) -> str:
    """As prose, in a table too."""
    escaped = _SPECIAL.sub(r"\\\1", one_line(value))
    return _FIRST.sub(lambda found: f"{found[1][:-1]}\\{found[1][-1]}", escaped)


def code(value: object) -> str:
    """As a code span, in a table too, where GitHub's dialect reads `\\|` as a bar."""
    line = one_line(value).replace("|", "\\|")
    fence = "`" * (1 + _longest_run(line))
    room = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{room}{line}{room}{fence}"


def fenced(value: str, language: str = "text") -> str:
    """As a block of code."""
    clean = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", value.replace("\r\n", "\n")).strip("\n")
    fence = "`" * max(3, 1 + _longest_run(clean))
    return f"{fence}{language}\n{clean}\n{fence}"


def _longest_run(value: str) -> int:
    return max((len(run) for run in re.findall("`+", value)), default=0)
