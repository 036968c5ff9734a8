"""What a recipe may say about data."""

from typing import Literal

from pydantic import Field

from topwork.common.options import Options


class DataConfig(Options):
    train: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder of such files, or a Hub data set id, optionally
    with its configuration and split: `owner/name`, `owner/name:config`, `owner/name:config:split`."""
    eval: str | None = None
    """The same, held out. Left out, `eval_fraction` of the training rows are held out by `seed`."""
    eval_fraction: float = Field(0.02, ge=0.0, lt=1.0)
    """The share of rows held out when `eval` is not named; 0 trains on everything and validates nothing."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """How a row is read. `auto` recognises it from the first rows and prints what it recognised."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What the file calls the fields of `format`, as field: column; say {prompt: text, completion: category}."""
    system: str | None = None
    """A system message put before every conversation that has none."""
    fold_system: bool = False
    """Put the system message at the head of the first user turn, for templates that reject a system role."""
    chat_template: str | None = None
    """A Jinja file, or `chatml` or `plain`, in place of the model's own chat template."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens are learned: every assistant turn, only the last, or everything."""
    max_length: int = Field(1024, ge=2)
    """The longest sequence in tokens; the model's context bounds it too."""
    too_long: Literal["refuse", "truncate", "drop", "split"] = "refuse"
    """What happens to longer sequences; they are counted in every case. `split` (plain text only) cuts them up."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """What happens to rows that cannot be used (no answer, empty text, wrong type); they are counted and named."""
    max_rows: int | None = Field(None, ge=1)
    """Only the first so many training rows; for a trial run."""

    def reading(self, rows: str) -> "DataConfig":
        """All of other rows, read the same way and none held out."""
        return self.model_copy(update={"train": rows, "eval": None, "eval_fraction": 0.0, "max_rows": None})
