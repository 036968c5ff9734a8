"""What a recipe may say about evaluation."""

from typing import Literal

from pydantic import Field

from topwork.common.options import Options


class EvaluationConfig(Options):
    data: str | None = None
    """Rows to answer and to score: a file, folder or Hub id as in `data.train`. Left out, `data.eval` or the rows held
    out of training."""
    grader: Literal["auto", "exact_match", "json"] = "auto"
    """`exact_match` compares the answer's text; `json` also asks whether it parses and compares it field by field.
    `auto` takes `json` where every reference is a JSON object."""
    max_rows: int | None = Field(None, ge=1)
    """Score only so many rows, drawn by the seed."""
    max_new_tokens: int = Field(256, ge=1)
    """The longest answer in tokens."""
    batch_size: int = Field(64, ge=1)
    """Answers written at once."""
    samples: int = Field(12, ge=0)
    """Answers shown in full in the report."""
