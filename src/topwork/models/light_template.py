"""Chat templates compiled as transformers compiles them, without importing it: the same sandbox, filters, functions and
block tags (`transformers.utils.chat_template_utils`), held to it by a test over all the templates that tests know."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import Template, ext, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class _Generation(ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`: written as it is, and its places remembered while somebody asks."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.tags = {"generation"}
        environment.extend(activate_tracker=self.activate_tracker)
        self._blocks: list[str] | None = None
        self._places: list[tuple[int, int]] | None = None

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Any) -> str:
        text = str(caller())
        if self._blocks is not None and self._places is not None:
            start = len("".join(self._blocks))
            self._places.append((start, start + len(text)))
        return text

    @contextmanager
    def activate_tracker(self, blocks: list[str], places: list[tuple[int, int]]) -> Iterator[None]:
        """`places` gets where in the joined `blocks` the marked parts are."""
        self._blocks, self._places = blocks, places
        try:
            yield
        finally:
            self._blocks = self._places = None


class _Namespace(Namespace):
    """jinja2's, which takes no name that begins with an underscore: those lead into Python."""

    def __init__(*given: Any, **named: Any) -> None:
        self, rest = given[0], given[1:]
        attributes = dict(*rest, **named)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
        return dict(*given, **named)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        return dict.fromkeys(*given)


def compile_template(jinja: str) -> Template:
    """A template of a tokenizer. Raises jinja2's TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {
        "raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    return environment.from_string(jinja)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} on a namespace; rename the attribute")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Letters stay as they are; jinja2's own writes them for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
