"""What `topwork lint` found, for terminals and for pipes. It reads the object that `--json` prints.

Rows are strangers' text: nothing of them is markup, and control characters are shown, not sent to the terminal.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

Found = Mapping[str, Any]
_STYLES = {"error": "bold red", "warning": "bold yellow", "notice": "bold cyan"}
_NAMED = 5
"""Rows that are named of a finding; `--json` and `--html` have all."""
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_TAGS = re.compile("[\U000e0000-\U000e007f]")


def visible(text: str) -> str:
    """The text with everything that a terminal would obey, or nobody would see, put as a sign: ␛, ⟨U+202E⟩."""
    return _TAGS.sub(_sign, _UNSEEN.sub(_sign, text))


def _sign(found: re.Match[str]) -> str:
    number = ord(found.group())
    if number < 0x20:
        return chr(0x2400 + number)
    return "␡" if number == 0x7F else f"⟨U+{number:04X}⟩"


def print_lint(found: Found, console: Console) -> None:
    """Rows, findings and the last line. Learned tokens are coloured on a terminal, and stand in ⟦ ⟧ elsewhere."""
    coloured = console.is_terminal and not console.no_color
    for told in counts(found):
        _print(console, Text(told))
    for row in found["shown"]:
        _print(console, Text(""))
        _print(console, Text(_heading(row), style="dim" if coloured else ""))
        _print(console, _coloured(row) if coloured else Text(visible(row["marked"])))
    if found["shown"]:
        _print(console, Text(""))
        key = Text("learned", style="green") if coloured else Text("⟦learned⟧")
        _print(console, Text.assemble(key, ", the rest is not"))
    for finding in found["findings"]:
        _print(console, Text(""))
        for line in finding_lines(finding):
            _print(console, line)
    _print(console, Text(""))
    _print(console, Text(last_line(found), style="bold"))


def _print(console: Console, text: Text) -> None:
    """As it is: a pipe gets no line that is broken where a terminal would end."""
    console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)


def counts(found: Found) -> list[str]:
    """What was read, in a line for each part."""
    lines = [visible(told) for told in (*found["files"], *found["formats"])]
    for name, side in found["sides"].items():
        told = f"{name}: {side['rows']:,} rows of {side['named']}"
        if side["bad_rows"]:
            told += f", {side['bad_rows']:,} cannot be used"
        if side["sequences"]:
            told += (
                f"; {side['sequences']:,} sequences, {side['tokens']:,} tokens, {side['learned_tokens']:,} learned; "
                f"median {side['median']:,}, longest {side['longest']:,} of {found['limit']:,}"
            )
        lines.append(visible(told))
    return lines


def _heading(row: Found) -> str:
    return visible(f"── {row['source']} ({row['side']}): {row['length']:,} tokens, {row['learned']:,} learned")


def _coloured(row: Found) -> Text:
    text = Text()
    for number, piece in enumerate(row["pieces"]):
        if row["left_out"] and number == row["head"]:
            text.append(f" … {row['left_out']:,} tokens … ", style="dim italic")
        text.append(visible(piece["text"]), style=_style(piece))
    return text


def _style(piece: Found) -> str:
    style = "green" if piece["weight"] > 0 and not piece["cut"] else "default"
    if piece["cut"]:
        style += " strike dim"
    return style + (" bold" if piece["special"] else "")


def finding_lines(finding: Found) -> list[Text]:
    """Severity and rule with the message, the rows, the remedy."""
    head = Text.assemble((finding["severity"], _STYLES[finding["severity"]]), f" {finding['rule']}: ")
    head.append(visible(finding["message"]))
    lines = [head]
    rows: Sequence[str] = finding["rows"]
    if rows:
        more = f" and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else ""
        lines.append(Text(f"  rows: {visible(', '.join(rows[:_NAMED]))}{more}"))
    lines.append(Text(f"  do: {visible(finding['remedy'])}"))
    return lines


def last_line(found: Found) -> str:
    """ "2 errors, 1 warning, 3 notices"."""
    return ", ".join(
        f"{found[name]} {name if found[name] != 1 else name.removesuffix('s')}"
        for name in ("errors", "warnings", "notices")
    )
