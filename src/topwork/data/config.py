"""What a recipe may say about data."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from topwork.common.options import Options

FormatName = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "kto", "prompts"
]  # fmt: skip


class SourceConfig(Options):
    """One of several places that rows come from, with what is its own; what is left out is as in `data`."""

    path: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .xlsx, .txt; also .gz, .zst, .bz2, .xz), a sheet
    (`book.xlsx:Sheet2`), a glob (`part-*.jsonl`), a folder of such files or of `save_to_disk`, or a Hub data set:
    `owner/name`, `owner/name:config:split`."""
    split: str | None = None
    """Which split of a folder or a Hub data set is read, or which sheet of a .xlsx; left out, its training split, as
    `data.eval` its validation split, as `evaluation.data` its test split. Of several with | between them, the first
    that it has."""
    format: FormatName | None = None
    """How a row is read, where it is not as in `data.format`."""
    columns: dict[str, str] | None = None
    """What the file calls the fields, where it is not as in `data.columns`."""
    system: str | None = None
    """A system message for its conversations that have none, where it is not `data.system`."""
    weight: float = Field(1.0, gt=0.0)
    """How often an epoch sees each of its rows: 2 is twice; 0.5 is a half of them, drawn by the seed."""
    max_rows: int | None = Field(None, ge=1)
    """Only its first so many rows."""
    encoding: str | None = None
    """The encoding of its text files, where it is not as in `data.encoding`."""

    def at_most(self, left: int | None) -> int | None:
        """How many of its rows are read where `left` rows of all sources are still wanted; None is all."""
        return min((count for count in (self.max_rows, left) if count is not None), default=None)


def _kind(value: object) -> str:
    """By what a source is given, so that an error speaks of that alone."""
    return "list" if isinstance(value, list) else "source" if isinstance(value, dict | SourceConfig) else "text"


SOURCE_TAGS = ("text", "source", "list")
_Text: TypeAlias = Annotated[str, Tag("text")]
_Source: TypeAlias = Annotated[SourceConfig, Tag("source")]
_One: TypeAlias = Annotated[_Text | _Source, Discriminator(_kind)]
_Several: TypeAlias = Annotated[list[_One], Field(min_length=1), Tag("list")]
Sources: TypeAlias = Annotated[_Text | _Source | _Several, Discriminator(_kind)]


class DataConfig(Options):
    train: Sources
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .xlsx, .txt; also .gz, .zst, .bz2, .xz), a sheet
    (`book.xlsx:Sheet2`), a glob (`part-*.jsonl`), a folder of such files or of `save_to_disk`, a Hub data set id,
    optionally with its configuration and split (`owner/name`, `owner/name:config`, `owner/name:config:split`), or a
    list of these, each alone or as {path, split, format, columns, system, weight, max_rows, encoding}."""
    eval: Sources | None = None
    """The same, held out. Left out, the validation split of `train` where it is a folder that has one; else
    `eval_fraction` of the training rows, held out by `seed`."""
    eval_fraction: float = Field(0.02, ge=0.0, lt=1.0)
    """The share of rows held out when there is no `eval`; 0 trains on everything and validates nothing."""
    hold_out_by: str = "prompt"
    """What is never on both sides when rows are held out: `prompt` (all rows with the same prompt), `row`, or a
    column's name (all rows with the same value there)."""
    format: FormatName = "auto"
    """How a row is read. `auto` recognises it from the rows and prints what it recognised."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What the file calls the fields of `format`, as field: column; say {prompt: text, completion: category}. A
    template over columns in braces makes a field of several: {prompt: "{Body} {Question}", completion: "{Answer}"}."""
    message_keys: dict[str, str] = Field(default_factory=dict)
    """What the file calls a message's keys, as theirs: ours; say {speaker: role, utterance: content}."""
    roles: dict[str, str] = Field(default_factory=dict)
    """What the file calls the roles, as theirs: ours; say {bard: assistant, client: user}."""
    system: str | None = None
    """A system message put before every conversation that has none."""
    fold_system: bool = False
    """Put the system message at the head of the first user turn, for templates that reject a system role."""
    merge_turns: bool = False
    """Make one turn of several of one role in a row, an empty line between them, for templates that take turns."""
    chat_template: str | None = None
    """A Jinja file, or `chatml`, `plain` or `raw`, in place of the model's own chat template. `raw` is prompt and
    completion one after the other as they are, which is also how they are read where the model has no template."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables that the template reads, in training and whenever the adapter is asked: {enable_thinking: false}."""
    separator: str = ""
    """What stands between prompt and completion where they are read `raw`; say "\\n"."""
    thinking: Literal["learn", "inline", "drop"] = "learn"
    """Thinking in answers. `learn`: the way the template writes it, or as it stands in the answer where the template
    would strip it. `inline`: a field of its own (reasoning_content, thinking) goes into <think> tags before the answer.
    `drop`: left out."""
    lost_text: Literal["refuse", "allow"] = "refuse"
    """What happens to answers of which the template leaves something out (text beside a tool call); `allow` learns the
    rest. They are counted and named in both cases."""
    split_special_tokens: bool | None = None
    """Whether special tokens that a row's own text spells (`</s>`) are its letters (true) or markup (false). Left out,
    they are letters in messages, and markup in plain text of which every row begins or ends with one."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens are learned: every assistant turn, only the last, or everything."""
    response_part: str | None = None
    """In plain text that holds conversations: learn only what follows this, say "### Assistant:" ..."""
    instruction_part: str | None = None
    """... until this, say "### Human:"."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What is one document in a .txt: the whole file, what stands between blank lines, or a line."""
    encoding: str | None = None
    """The encoding of text files that are not UTF-8: gb18030, shift_jis, cp1251, cp1252 ..."""
    max_length: int = Field(1024, ge=2)
    """The longest sequence in tokens; the model's context bounds it too."""
    too_long: Literal["refuse", "truncate", "drop", "split", "oldest_turns", "middle"] = "refuse"
    """What happens to longer sequences; they are counted in every case. `truncate` cuts off the end. `split` (plain
    text only) cuts them up. `oldest_turns` leaves out the oldest turns (their answers become sequences of their own),
    and `middle` takes out the middle of the longest messages that are not learned: both keep answers whole, and leave
    out a row of which one exchange, or the answers alone, are too long."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """What happens to rows that cannot be used (no answer, empty text, wrong type); they are counted and named."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Rows that are the same, token for token: kept and told, or the first alone is kept, before any is held out."""
    streaming: bool = False
    """Rows are read from disk as they are needed, for files larger than memory; in the order that the seed decides."""
    max_rows: int | None = Field(None, ge=1)
    """Only the first so many training rows; for a trial run."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.instruction_part is not None and self.response_part is None:
            raise ValueError("instruction_part ends what response_part begins; give response_part too")
        return self

    def reading(self, rows: Sources) -> "DataConfig":
        """All of other rows, read the same way, each once and none held out; of a folder with splits its test split."""
        several = [
            source.model_copy(update={"split": source.split or "test|validation|", "weight": 1.0})
            for source in self.sources(rows)
        ]
        return self.model_copy(
            update={"train": several, "eval": None, "eval_fraction": 0.0, "max_rows": None, "streaming": False}
        )

    def sources(self, named: Sources) -> list[SourceConfig]:
        """`train` or `eval` as a list; what a source leaves out is filled in from here."""
        several = named if isinstance(named, list) else [named]
        found = [each if isinstance(each, SourceConfig) else SourceConfig(path=each) for each in several]
        return [
            source.model_copy(
                update={
                    "format": source.format or self.format,
                    "columns": self.columns if source.columns is None else source.columns,
                    "system": self.system if source.system is None else source.system,
                    "encoding": source.encoding or self.encoding,
                }
            )
            for source in found
        ]

    @property
    def seed_decides(self) -> bool:
        """Whether the seed decides which rows are learned, or how often: by holding some out, or by a weight."""
        return self.eval is None or any(source.weight != 1.0 for source in self.sources(self.train))

    def of_source(self, source: SourceConfig) -> "DataConfig":
        """These options with a (filled in) source's own in their place."""
        return self.model_copy(
            update={
                "format": source.format or self.format,
                "columns": self.columns if source.columns is None else source.columns,
                "system": source.system,
                "encoding": source.encoding,
            }
        )


def told(named: Sources) -> str:
    """Sources as people call them."""
    return ", ".join(map(called, paths_of(named)))


def paths_of(named: Sources) -> list[str]:
    """The path of each source."""
    several = named if isinstance(named, list) else [named]
    return [each if isinstance(each, str) else each.path for each in several]


def called(path: str) -> str:
    """A path as people write it: from the working directory on, where it lies there."""
    own = Path(path)
    return str(own.relative_to(Path.cwd())) if own.is_absolute() and own.is_relative_to(Path.cwd()) else path
