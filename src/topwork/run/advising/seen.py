"""A recipe's rows at a glance: which task they are for, how many they are, how long."""

from collections.abc import Callable
from dataclasses import dataclass

from topwork.common.errors import DataError, RequestError
from topwork.data.config import DataConfig, paths_of
from topwork.data.parts import read_parts
from topwork.models.light_tokenizer import LightTokenizer, tokenizer_folder
from topwork.models.structure import Structure
from topwork.plan.advice.looked import Looked, look
from topwork.plan.tokens import Tokens, counted
from topwork.recipe.recipe import Recipe

Log = Callable[[str], None]
MOST_LOOKED_AT = 20_000
"""Rows by which the task is recognised."""
TOOL_CALLS = "tool-calls"


@dataclass(frozen=True)
class Seen:
    """A recipe's rows at a glance, and counted where that could be done."""

    looked: Looked
    tokens: Tokens | None
    writes_calls: bool | None

    @property
    def rows(self) -> int:
        """All of them."""
        return self.looked.rows if self.tokens is None else self.tokens.rows

    @property
    def tokens_per_row(self) -> float:
        """On average."""
        return self.looked.tokens_per_row if self.tokens is None else self.tokens.tokens / max(1, self.tokens.rows)

    @property
    def longest(self) -> int:
        """Of the longest row, as far as it was seen."""
        return self.looked.longest if self.tokens is None else self.tokens.longest

    @property
    def learned_share(self) -> float:
        """Of all tokens."""
        return self.looked.learned_share if self.tokens is None else self.tokens.learned_share

    @property
    def how(self) -> str:
        """How tokens were counted, for people."""
        return "estimated from letters" if self.tokens is None else self.tokens.how()


def see(recipe: Recipe, task: str | None, structure: Structure, log: Log) -> Seen:
    """What a recipe's rows look like, and how many tokens they are. Raises RequestError where none can be used."""
    data = recipe.data
    parts = read_parts(data, data.train, min(data.max_rows or MOST_LOOKED_AT, MOST_LOOKED_AT))
    rows = [row for part in parts for row in part.conversations]
    bad = [row for part in parts for row in part.bad]
    if not rows:
        first = f": {bad[0].source}: {bad[0].reason}" if bad else ""
        raise RequestError(f"none of {len(bad):,} rows can be used{first}; topwork lint RECIPE shows why")
    if bad:
        log(f"warning: {len(bad):,} of {len(bad) + len(rows):,} rows cannot be used; topwork lint RECIPE shows why")
    looked = look(rows)
    writes = _writes_calls(recipe) if (task or looked.task) == TOOL_CALLS else None
    return Seen(looked, _counted(recipe, structure, writes is False), writes)


def _writes_calls(recipe: Recipe) -> bool | None:
    """Whether the base's own template writes tool calls; None where it is not at hand, or the recipe has another."""
    folder = None if recipe.data.chat_template is not None else tokenizer_folder(recipe.model)
    if folder is None:
        return None
    try:
        template = LightTokenizer(folder).chat_template
    except Exception:  # `tokenizers` raises Exception itself; training will tell what is wrong with the files
        return None
    return "tool_calls" in str(template)


def _counted(recipe: Recipe, structure: Structure, chatml: bool) -> Tokens | None:
    """All rows as they are, none held out or cut; None where no row can be put into tokens."""
    whole = {
        "max_length": structure.context_length, "too_long": "drop", "on_bad_row": "drop", "eval": None,
        "eval_fraction": 0.0, **({"chat_template": "chatml"} if chatml else {}),
    }  # fmt: skip
    data = recipe.data.model_copy(update=whole)
    try:
        return counted(recipe.model_copy(update={"data": data}), structure.context_length)
    except DataError:
        return None


def are_documents(data: DataConfig) -> bool:
    """Whether all rows are from .txt files."""
    return all(path.lower().partition(".txt")[1] == ".txt" for path in paths_of(data.train))
