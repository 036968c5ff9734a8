"""Tools a model may call: put to it by its chat template, and its calls read back out of what it says.

For one request, whatever its tools (none included):

    specs = read_specs(body["tools"])                          # OpenAI's list; () for none
    choice = read_choice(body.get("tool_choice"), specs)       # "none" | "auto" | "required" | {"function": {"name": …}}
    use = ToolUse(template, specs, choice, parallel=True)
    prompt = use.prompt_ids(messages, template_kwargs={"enable_thinking": False}, continue_final=False)
    constraint = use.constraint(grammars, stop_ids)            # None where the answer is free
    stream = TextStream(tokenizer, stop_strings, shown=use.shown)
    parser = use.parser()
    for each token:  deltas = parser.add(stream.add(token))    # list[Delta]
    at the end:      deltas = parser.add(stream.finish()) + parser.finish()
    whole = together(all_deltas)                               # Said(text, calls)

An answer in one piece is the sum of its deltas, so what streams and what does not are the same.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from topwork.data.conversations import Message
from topwork.data.template import ChatTemplate
from topwork.generation.grammar import Grammars
from topwork.generation.requests import Constraint


@dataclass(frozen=True)
class ToolSpec:
    """A function that may be called. `parameters` is the JSON schema of its arguments, an object's; `strict` asks that
    they obey it where the model is free to call."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class ToolChoice:
    """Whether a tool is called; `name` is the one that must be, where the mode is "named"."""

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """A finished call; `arguments` is JSON text as the model wrote it (cut off where its answer was)."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: text, or a piece of the call number `call` (from 0). A call's first piece has its id and
    name and no arguments; the others have a piece of its arguments alone."""

    text: str = ""
    call: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Said:
    """An answer: its text, "" where it is calls alone, and the calls."""

    text: str
    calls: tuple[ToolCall, ...]


def read_specs(tools: object) -> tuple[ToolSpec, ...]:
    """OpenAI's `tools`. Raises RequestError for what is no list of functions, for names that are given twice or are not
    1 to 64 of a-z A-Z 0-9 _ -, and for parameters that are no object's schema."""
    raise NotImplementedError


def read_choice(choice: object, specs: Sequence[ToolSpec]) -> ToolChoice:
    """OpenAI's `tool_choice`; None is "auto" where there are tools, else "none". Raises RequestError."""
    raise NotImplementedError


class ToolUse:
    """How one request's tools are put to a model, and its calls read back."""

    shown: frozenset[int]
    """Special tokens that TextStream is to show, since calls are recognised by them."""

    def __init__(
        self, template: ChatTemplate, specs: Sequence[ToolSpec] = (), choice: ToolChoice | None = None,
        parallel: bool = True,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def prompt_ids(
        self,
        messages: Sequence[Message],
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> list[int]:
        """What generation is prompted with. Raises DataError (a RequestError)."""
        raise NotImplementedError

    def constraint(self, grammars: Grammars, stop_ids: Collection[int]) -> Constraint | None:
        """What the answer has to obey: a call where one is required or named, arguments by their schema where a tool is
        strict; None where it is free. Raises RequestError for a schema that cannot be held."""
        raise NotImplementedError

    def parser(self) -> "CallParser":
        """Reads one answer."""
        raise NotImplementedError


class CallParser:
    """Text of an answer, as it comes, to its pieces."""

    called: bool
    """Whether a call has begun: finish_reason is then "tool_calls" where it would be "stop"."""

    def add(self, text: str) -> list[Delta]:
        """What this text brings; what may still become a call is held back."""
        raise NotImplementedError

    def finish(self) -> list[Delta]:
        """The answer is at its end: what was held back."""
        raise NotImplementedError


def together(deltas: Iterable[Delta]) -> Said:
    """The sum of an answer's deltas."""
    raise NotImplementedError
