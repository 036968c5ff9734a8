"""What a writer of `topwork export` tells of what it wrote."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topwork.export.read_back import ReadBack

OUT = "OUT"
"""Where a line of use tells the folder, which stands aside while it is written."""


def line_with(line: str, out: Path) -> str:
    """A line of use with the folder in it: between quotation marks as it is, else as a shell takes it."""

    def named(match: re.Match[str]) -> str:
        return str(out).replace("\\", "\\\\").replace('"', '\\"') if match[1] else shlex.quote(str(out))

    return re.sub(rf'(?<![\w/-])(?:(?<=(")))?{OUT}(?![\w-])', named, line)


@dataclass(frozen=True)
class Written:
    """Figures for export.json, how it is used (lines with OUT in them), and what its reader made of it, where it was
    read."""

    figures: dict[str, Any] = field(default_factory=dict)
    use: Sequence[str] = ()
    read_back: Sequence[ReadBack] = ()
