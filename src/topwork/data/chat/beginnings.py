"""All beginnings of a conversation by one rendering, for templates that write each message for itself.

A template whose one loop over the messages looks neither ahead nor at their number writes a beginning of a
conversation as a beginning of the whole. Whether it is such a one is read off its syntax; what it writes for each
message is found by a mark that its loop is made to leave. Others are rendered once for every beginning.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from secrets import token_hex
from typing import Any

_BEHIND = frozenset({"first", "index", "index0"})
"""What a loop may ask of its place: the same whatever follows."""


class Beginnings:
    """Renders one compiled template of transformers. `possible` says whether it can be done."""

    def __init__(self, compiled: Any, jinja: str) -> None:
        environment = compiled.environment
        parsed = environment.parse(jinja)
        self._mark = f"<{token_hex(12)}>"
        self.possible = _looks_back(parsed)
        if not self.possible:
            return
        from jinja2 import nodes

        at, loop = _loop(parsed)
        mark = nodes.Output([nodes.TemplateData(self._mark)]).set_lineno(loop.lineno)
        loop.body.append(mark)
        parsed.body.insert(at, mark)
        code = environment.compile(parsed)
        self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))

    def parts(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[str] | None:
        """What is written before the messages, for each of them, and after them; None where a mark is amiss.

        Raises what the template does.
        """
        found = str(self._template.render(messages=messages, **variables)).split(self._mark)
        return found if len(found) == len(messages) + 2 else None


class Whole:
    """A conversation that was rendered once.

    parts   before the messages, each of them, after them
    opened  after messages that an opened turn of the assistant follows
    """

    def __init__(self, parts: Sequence[str], opened: str) -> None:
        self._closed, self._opened = parts[-1], opened
        self._before = list(accumulate(map(len, parts[:-1])))
        self._text = "".join(parts[:-1])

    def beginning(self, count: int, prompt: bool) -> str:
        """The first so many messages; `prompt` opens the assistant's turn behind them."""
        return self._text[: self._before[count]] + (self._opened if prompt else self._closed)


def _loop(parsed: Any) -> tuple[int, Any]:
    from jinja2 import nodes

    found = [(at, node) for at, node in enumerate(parsed.body) if isinstance(node, nodes.For)]
    return found[0] if len(found) == 1 else (-1, None)


def _looks_back(parsed: Any) -> bool:
    """Whether what is written for a message, and after all of them, depends on no later one and not on how many."""
    from jinja2 import nodes

    at, loop = _loop(parsed)
    aliases = {"messages"} | {
        node.target.name
        for node in parsed.body[: max(at, 0)]
        if isinstance(node, nodes.Assign) and _is_name(node.node, {"messages"}) and isinstance(node.target, nodes.Name)
    }
    if loop is None or not _is_name(loop.iter, aliases) or loop.test or loop.else_ or loop.recursive:
        return False
    strange = (nodes.Macro, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    if any(True for _ in parsed.find_all(strange)):
        return False
    stored = [node.name for node in parsed.find_all(nodes.Name) if node.ctx == "store"]
    stored += [node.name for node in parsed.find_all(nodes.NSRef)]
    if any(stored.count(name) > (name != "messages") for name in aliases) or "loop" in stored:
        return False
    uses = _uses(parsed, aliases)  # the loop is one, and each assignment of another name
    after, through = (
        {node.name for each in some for node in each.find_all(nodes.Name)}
        for some in (parsed.body[at + 1 :], parsed.body[: at + 1])
    )
    if "add_generation_prompt" in through:
        return False
    return uses == len(aliases) and _asks_behind(loop) and not after & (set(stored) | {"loop"})


def _uses(parsed: Any, aliases: set[str]) -> int:
    """How often the messages are named, other than for the first of them."""
    from jinja2 import nodes

    named = sum(node.name in aliases and node.ctx == "load" for node in parsed.find_all(nodes.Name))
    firsts = sum(
        _is_name(node.node, aliases) and isinstance(node.arg, nodes.Const) and node.arg.value == 0
        for node in parsed.find_all(nodes.Getitem)
    )
    return named - firsts


def _asks_behind(loop: Any) -> bool:
    from jinja2 import nodes

    asked = list(_asked(loop))
    named = sum(node.name == "loop" for node in loop.find_all(nodes.Name))
    return named == len(asked) and set(asked) <= _BEHIND


def _asked(loop: Any) -> Iterator[str]:
    from jinja2 import nodes

    for node in loop.find_all(nodes.Getattr):
        if _is_name(node.node, {"loop"}):
            yield node.attr
    for node in loop.find_all(nodes.Getitem):
        if _is_name(node.node, {"loop"}) and isinstance(node.arg, nodes.Const):
            yield str(node.arg.value)


def _is_name(node: Any, names: set[str]) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.name in names
