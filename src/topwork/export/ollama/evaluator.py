"""What Ollama makes of a conversation and a TEMPLATE: an evaluator of the part of Go's text/template that is written
here, as strict as Go's (tests hold it to Go's own results).

Text, `{{ VALUE }}`, `if`, `else if`, `else`, `end`, `range $i, $message := LIST`, `$name := VALUE`, fields, variables,
strings, numbers, parentheses, and the functions eq, ne, gt, not, len, slice and index. No trim marks, no pipes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.data.conversations import Message
from topwork.export.ollama.form import TemplateForm
from topwork.export.ollama.go_template import go_template

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\$?\w*(?:\.\w+)+|\$\w*|:=|[\w.]+|[(),])')
_ESCAPE = re.compile(r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|(.))")
_PLAIN = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


class GoError(ValueError):
    """What Go would refuse, or what this evaluator does not know."""


def ollama_text(template: str, messages: Sequence[Message]) -> str:
    """The prompt that Ollama makes of a conversation. Raises GoError."""
    told = _collated(messages)
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    given = {"Messages": told, "System": system, "Response": "", "Prompt": "", "Tools": []}
    nodes, rest = _parsed(list(_pieces(template)), 0)
    if rest != len(list(_pieces(template))):
        raise GoError("an {{ end }} too many")
    return "".join(_run(nodes, given, {"$": given}))


def form_text(form: TemplateForm, messages: Sequence[Message]) -> str:
    """How a form renders as an Ollama TEMPLATE; what Go would refuse, as a text that no template writes."""
    try:
        return ollama_text(go_template(form), messages)
    except GoError as error:
        return f"\0{error}"


def _collated(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Ollama joins neighbours of one role."""
    found: list[dict[str, str]] = []
    for message in messages:
        if found and found[-1]["Role"] == message.role != "tool":
            found[-1]["Content"] += "\n\n" + message.content
        else:
            found.append({"Role": message.role, "Content": message.content})
    return found


@dataclass
class _Block:
    """`if` or `range`: its branches, each a condition (None for `else`) and what it holds."""

    kind: str
    branches: list[tuple[list[str] | None, list[Any]]] = field(default_factory=list)


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    at = 0
    while (start := template.find("{{", at)) >= 0:
        if start > at:
            yield "text", template[at:start]
        end = _end_of_action(template, start + 2)
        yield "action", template[start + 2 : end]
        at = end + 2
    if at < len(template):
        yield "text", template[at:]


def _end_of_action(template: str, at: int) -> int:
    """Strings in an action may hold braces."""
    quoted = False
    while at < len(template):
        if quoted and template[at] == "\\":
            at += 1
        elif template[at] == '"':
            quoted = not quoted
        elif not quoted and template.startswith("}}", at):
            return at
        at += 1
    raise GoError("an action does not end")


def _tokens(action: str) -> list[str]:
    if action[:1] == "-" or action[-1:] == "-":
        raise GoError("trim marks are not known here")
    found, at, action = [], 0, action.strip()
    while at < len(action):
        match = _TOKEN.match(action, at)
        if match is None:
            raise GoError(f"{action[at:]!r} is not known here")
        found.append(match.group(1))
        at = match.end()
    return found


def _parsed(pieces: Sequence[tuple[str, str]], at: int, inside: bool = False) -> tuple[list[Any], int]:
    """Nodes up to the `else` or `end` that belongs to the block around them, whose place is returned."""
    nodes: list[Any] = []
    while at < len(pieces):
        kind, text = pieces[at]
        tokens = [] if kind == "text" else _tokens(text)
        word = tokens[0] if tokens else ""
        if word in ("else", "end"):
            if not inside:
                raise GoError(f"{{{{ {word} }}}} without a block")
            return nodes, at
        if word in ("if", "range"):
            block, at = _block(pieces, at, tokens)
            nodes.append(block)
            continue
        nodes.append(text if kind == "text" else tokens)
        at += 1
    if inside:
        raise GoError("a block without {{ end }}")
    return nodes, at


def _block(pieces: Sequence[tuple[str, str]], at: int, tokens: list[str]) -> tuple[_Block, int]:
    block, condition = _Block(tokens[0]), tokens[1:]
    while True:
        nodes, at = _parsed(pieces, at + 1, inside=True)
        block.branches.append((condition, nodes))
        tokens = _tokens(pieces[at][1])
        if tokens == ["end"]:
            return block, at + 1
        if block.kind == "range" or block.branches[-1][0] is None:
            raise GoError("an {{ else }} that is not known here")
        condition = tokens[2:] if tokens[1:2] == ["if"] else None  # type: ignore[assignment]


def _run(nodes: Sequence[Any], dot: Any, names: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _Block):
            yield from (_ranged if node.kind == "range" else _chosen)(node, dot, names)
        elif len(node) > 2 and node[1] == ":=":
            names[node[0]] = _value(node[2:], dot, names)
        else:
            yield str(_value(node, dot, names))


def _chosen(block: _Block, dot: Any, names: dict[str, Any]) -> Iterator[str]:
    for condition, nodes in block.branches:
        if condition is None or _value(condition, dot, names):
            yield from _run(nodes, dot, dict(names))
            return


def _ranged(block: _Block, dot: Any, names: dict[str, Any]) -> Iterator[str]:
    ((condition, nodes),) = block.branches
    if condition is None or condition[1:2] != [","] or condition[3:4] != [":="]:
        raise GoError("a range that is not known here")
    index, element = condition[0], condition[2]
    for number, value in enumerate(_value(condition[4:], dot, names)):
        yield from _run(nodes, value, {**names, index: number, element: value})


def _value(tokens: Sequence[str], dot: Any, names: Mapping[str, Any]) -> Any:
    """A function with its arguments, or one operand."""
    operands, at = [], 0
    while at < len(tokens):
        if tokens[at] == "(":
            end = _closing(tokens, at)
            value, at = _value(tokens[at + 1 : end], dot, names), end + 1
            while at < len(tokens) and tokens[at].startswith("."):  # a field of what stands in the parentheses
                value, at = _field(value, tokens[at][1:]), at + 1
            operands.append(value)
        else:
            operands.append(_operand(tokens[at], dot, names))
            at += 1
    if operands and isinstance(operands[0], _Function):
        return operands[0].call(operands[1:])
    if len(operands) != 1:
        raise GoError(f"{' '.join(tokens)!r} is no value")
    return operands[0]


def _closing(tokens: Sequence[str], at: int) -> int:
    depth = 0
    for place in range(at, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[place], 0)
        if depth == 0:
            return place
    raise GoError("a parenthesis that is not closed")


def _operand(token: str, dot: Any, names: Mapping[str, Any]) -> Any:
    if token.startswith('"'):
        return _ESCAPE.sub(_unescaped, token[1:-1])
    if token.isdigit():
        return int(token)
    if token in FUNCTIONS:
        return _Function(token)
    name, *path = token.split(".")
    if name and name not in names:
        raise GoError(f"undefined: {token}")
    value = names[name] if name else dot
    for key in path:
        value = _field(value, key)
    return value


def _unescaped(match: re.Match[str]) -> str:
    short, long, plain = match.groups()
    if plain is None:
        return chr(int(short or long, 16))
    if plain not in _PLAIN:
        raise GoError(f"the escape \\{plain} is not known here")
    return _PLAIN[plain]


def _field(value: Any, key: str) -> Any:
    if not isinstance(value, Mapping) or key not in value:
        raise GoError(f"can't evaluate field {key}")
    return value[key]


@dataclass(frozen=True)
class _Function:
    name: str

    def call(self, arguments: list[Any]) -> Any:
        try:
            return FUNCTIONS[self.name](*arguments)
        except TypeError as error:
            raise GoError(f"error calling {self.name}: {error}") from error


def _slice(value: Any, start: int) -> Any:
    if start > len(value):
        raise GoError(f"error calling slice of {value!r}: index out of range: {start}")
    return value[start:]


def _index(value: Any, at: int) -> Any:
    if not at < len(value):
        raise GoError(f"error calling index: index out of range: {at}")
    return value[at]


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        raise GoError("error calling eq: incompatible types for comparison")
    return bool(one == other)


FUNCTIONS: dict[str, Any] = {
    "eq": _equal,
    "ne": lambda one, other: not _equal(one, other),
    "gt": lambda one, other: one > other,
    "not": lambda value: not value,
    "len": len,
    "slice": _slice,
    "index": _index,
}
