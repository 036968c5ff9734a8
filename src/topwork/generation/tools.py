"""Tools a model may call: put to it by its chat template, and its calls read back out of what it says.

For one request, whatever its tools (none included):

    specs = read_specs(body["tools"])                      # OpenAI's list; () for none
    choice = read_choice(body.get("tool_choice"), specs)   # none, auto, required, or a function by its name
    use = ToolUse(template, specs, choice, parallel=True)
    prompt = use.prompt_ids(messages, template_kwargs={"enable_thinking": False}, continue_final=False)
    constraint = use.constraint(grammars, stop_ids)        # None where the answer is free
    stream = TextStream(tokenizer, stop_strings, shown=use.shown)
    parser = use.parser()
    for each token:  deltas = parser.add(stream.add(token))    # list[Delta], generation/calls.py
    at the end:      deltas = parser.add(stream.finish()) + parser.finish()
    whole = together(all_deltas)                               # Said(text, calls)

An answer in one piece is the sum of its deltas, so what streams and what does not are the same.

Tools, calls and their results are put to a model as its own chat template does it, where it does (Qwen, Hermes, llama
3.1, mistral: `data/chat/calls.py` asks the template). Where it leaves any of them out (SmolLM2, gemma), the tools are
told of in the system message in Qwen's words, calls are asked for as
`<tool_call>{"name": …, "arguments": …}</tool_call>`, and results come from the user. A model may never have learned
that, but held to a grammar (required, named) it calls all the same. An answer that is held to one has no thinking
before it.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from topwork.common.errors import RequestError, did_you_mean
from topwork.data.chat.calls import HERMES, in_text
from topwork.data.chat.rendering import folded
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Message
from topwork.generation.calls import CallParser
from topwork.generation.grammar import Grammar, Grammars

_ANY: dict[str, Any] = {"type": "object"}
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True)
class ToolSpec:
    """A function that may be called. `parameters` is the JSON schema of its arguments, an object's; `strict` asks that
    they obey it where the model is free to call, which can be held where the format marks calls."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False

    def as_openai(self) -> dict[str, Any]:
        """As chat templates read it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolChoice:
    """Whether a tool is called; `name` is the one that must be, where the mode is "named"."""

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


def read_specs(tools: object) -> tuple[ToolSpec, ...]:
    """OpenAI's `tools`. Raises RequestError for what is no list of functions, for names that are given twice or are not
    1 to 64 of a-z A-Z 0-9 _ -, and for parameters that are no object's schema."""
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RequestError(f"tools is of type {type(tools).__name__}; give a list of functions")
    specs = tuple(_read_spec(tool, number) for number, tool in enumerate(tools, 1))
    names = [spec.name for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"two tools are called {twice!r}; give each a name of its own")
    return specs


def _read_spec(tool: object, number: int) -> ToolSpec:
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if kind != "function" or not isinstance(function, Mapping):
        raise RequestError(f"tool {number} is no {{type: function, function: {{name, description, parameters}}}}")
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        told = repr(name)[:80].encode("ascii", "backslashreplace").decode()
        raise RequestError(f"tool {number} is called {told}; a name is 1 to 64 of a-z, A-Z, 0-9, _ and -")
    if not isinstance(description, str | None):
        raise RequestError(f"the description of the tool {name} is of type {type(description).__name__}; give text")
    schema = _NOTHING if not parameters and parameters in (None, {}) else parameters
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise RequestError(f"the parameters of the tool {name} are no schema of an object; give {{type: object, …}}")
    spec = ToolSpec(name, description or "", {"type": "object", **schema}, function.get("strict") is True)
    try:
        json.dumps(spec.as_openai(), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        told = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise RequestError(f"the tool {name} cannot be written as JSON: {told}") from error
    return spec


def read_choice(choice: object, specs: Sequence[ToolSpec]) -> ToolChoice:
    """OpenAI's `tool_choice`; None is "auto" where there are tools, else "none". Raises RequestError."""
    if choice is None:
        return ToolChoice("auto" if specs else "none")
    if choice == "none" or choice == "auto" or choice == "required":
        if choice == "required" and not specs:
            raise RequestError("tool_choice is 'required', and there are no tools; give some, or leave it out")
        return ToolChoice(choice if specs else "none")
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            f"tool_choice is {_brief(choice)}; give none, auto, required, or {{type: function, function: {{name}}}}"
        )
    names = [spec.name for spec in specs]
    if name not in names:
        raise RequestError(
            f"tool_choice names {_brief(name)}, which is none of the tools{did_you_mean(name[:64], names)}"
        )
    return ToolChoice("named", name)


def _brief(value: object) -> str:
    return ascii(value)[:80]


class ToolUse:
    """How one request's tools are put to a model, and its calls read back.

    template   the model's
    parallel   whether an answer may have several calls; else all after the first is left out
    choice     None is "auto" where there are tools; with "none" the model is not told of them
    """

    shown: frozenset[int]
    """Special tokens that TextStream is to show, since calls are recognised by them."""

    def __init__(
        self, template: ChatTemplate, specs: Sequence[ToolSpec] = (), choice: ToolChoice | None = None,
        parallel: bool = True,
    ) -> None:  # fmt: skip
        self.template, self.choice = template, choice or read_choice(None, specs)
        self.specs = tuple(specs) if self.choice.mode != "none" else ()
        self._form = template.calls if specs or template.jinja is not None else None
        self.form = self._form or HERMES
        self.several = parallel and self.choice.mode != "named" and self.form.between is not None
        special = template.renderer.special.items() if self.specs else ()
        marks = {number for text, number in special if text in self.form.opens + self.form.closes}
        self.shown = frozenset(marks)

    def prompt_ids(
        self,
        messages: Sequence[Message],
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> list[int]:
        """What generation is prompted with. Raises DataError (a RequestError)."""
        tools = [spec.as_openai() for spec in self.specs] or None
        calls = any(message.role == "tool" or message.extra.get("tool_calls") for message in messages)
        if (tools or calls) and self._form is None:
            messages, tools = in_text(messages, tools), None
            messages = messages if self.template.takes_system else folded(messages)
        return self.template.prompt_ids(messages, tools, template_kwargs, continue_final)

    def constraint(self, grammars: Grammars, stop_ids: Collection[int]) -> Grammar | None:
        """What the answer has to obey: a call where one is required or named, arguments by their schema where a tool is
        strict; None where it is free. Raises RequestError for a schema that cannot be held."""
        if not self.specs:
            return None
        mode = self.choice.mode
        if mode == "auto":
            strict = any(spec.strict for spec in self.specs)
            if not strict or not self.form.opens.strip():
                return None
            schemas = {spec.name: spec.parameters if spec.strict else _ANY for spec in self.specs}
            return grammars.calls(self.form, schemas, stop_ids, several=self.several, free=True)
        schemas = {
            spec.name: spec.parameters for spec in self.specs if mode == "required" or spec.name == self.choice.name
        }
        return grammars.calls(self.form, schemas, stop_ids, several=self.several, free=False)

    def parser(self) -> CallParser:
        """Reads one answer."""
        return CallParser(self.form, [spec.name for spec in self.specs], None if self.several else 1)
