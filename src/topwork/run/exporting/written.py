"""What a writer of `topwork export` tells of what it wrote."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.export.read_back import ReadBack

OUT = "OUT"
"""Where a line of use tells the folder, which stands aside while it is written."""


@dataclass(frozen=True)
class Written:
    """Figures for export.json, how it is used (lines with OUT in them), and what its reader made of it, where it was
    read."""

    figures: dict[str, Any] = field(default_factory=dict)
    use: Sequence[str] = ()
    read_back: Sequence[ReadBack] = ()
