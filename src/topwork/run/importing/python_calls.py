"""The calls of a Python script or a notebook with the values of their arguments. The code is parsed and never run: what
a name or a number stands for is read, anything that has to be computed is told as code."""

import ast
import json
from dataclasses import dataclass, field
from typing import Any

from topwork.common.errors import RequestError
from topwork.run.importing.records import Given

MOST_VALUES = 100_000
"""More than any training script has: names that stand for lists of names may blow up."""
_CODE = 80
_UNREAD = object()


@dataclass
class Call:
    """One call: its function's dotted name, its arguments (`0`, `1` … for those without a name))."""

    name: str
    line: int
    arguments: list[Given] = field(default_factory=list)

    def value(self, name: str) -> Any:
        """An argument's value, None where it is not given or not read."""
        return next((each.value for each in self.arguments if each.key == name), None)


def notebook_source(text: str, source: str) -> tuple[str, list[tuple[int, int]]]:
    """A notebook's code, and of each of its lines the number of the cell and of the line in it. Raises RequestError."""
    try:
        cells = json.loads(text)["cells"]
        codes = [cell["source"] if cell["cell_type"] == "code" else "" for cell in cells]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"{source} is no notebook: it holds no JSON with cells; save it again in Jupyter") from error
    lines: list[str] = []
    places: list[tuple[int, int]] = []
    for number, code in enumerate(codes, 1):
        body = "".join(code) if isinstance(code, list) else str(code)
        shell = body.lstrip().startswith("%%")
        for at, line in enumerate(body.splitlines(), 1):
            magic = line.lstrip().startswith(("%", "!"))
            lines.append(f"{line[: len(line) - len(line.lstrip())]}pass" if magic or shell else line)
            places.append((number, at))
    return "\n".join(lines), places


def calls_in(text: str, source: str) -> list[Call]:
    """The calls of a script, in its order. Raises RequestError for code that is not Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise RequestError(f"{source}{line} is not Python: {getattr(error, 'msg', error)}") from error
    reader = _Reader(text)
    try:
        reader.visit(tree)
        return reader.calls()
    except RecursionError as error:
        raise RequestError(f"{source} is nested too deep to be a training script") from error


class _Reader(ast.NodeVisitor):
    """Collects names that are bound to one value, and calls."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.bound: dict[str, list[ast.expr | None]] = {}
        self.found: list[ast.Call] = []
        self.left = MOST_VALUES

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, node.value)
        self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, node.value)
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        self.bound.setdefault(node.arg, []).append(None)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.bound.setdefault(node.id, []).append(None)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Constant):  # `if False:` shows what else could be done
            for each in node.body if node.test.value else node.orelse:
                self.visit(each)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.found.append(node)
        self.generic_visit(node)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.bound.setdefault(target.id, []).append(value)
        else:
            self.visit(target)

    def calls(self) -> list[Call]:
        found = [self._call(node) for node in self.found]
        return sorted(found, key=lambda call: call.line)

    def _call(self, node: ast.Call) -> Call:
        named = [(keyword.arg or "**", keyword.value) for keyword in node.keywords]
        placed = [(str(at), each) for at, each in enumerate(node.args)]
        return Call(_dotted(node.func), node.lineno, [self._given(name, value) for name, value in (*placed, *named)])

    def _given(self, name: str, node: ast.expr) -> Given:
        value = self._value(node, ())
        if value is _UNREAD:
            return Given(name, None, node.lineno, (ast.get_source_segment(self.text, node) or "")[:_CODE])
        return Given(name, value, node.lineno)

    def _value(self, node: ast.expr, names: tuple[str, ...]) -> Any:
        self.left -= 1
        if self.left < 0:
            return _UNREAD
        match node:
            case ast.Constant(value=value) if not isinstance(value, bytes | complex) and value is not ...:
                return value
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                value = self._value(inner, names)
                return -value if isinstance(value, int | float) else _UNREAD
            case ast.List(elts=entries) | ast.Tuple(elts=entries) | ast.Set(elts=entries):
                values = [self._value(each, names) for each in entries]
                return _UNREAD if _UNREAD in values else values
            case ast.Dict(keys=keys, values=entries):
                pairs = [
                    (_UNREAD if k is None else self._value(k, names), self._value(v, names))
                    for k, v in zip(keys, entries)
                ]
                return _UNREAD if any(_UNREAD in pair for pair in pairs) else {str(k): v for k, v in pairs}
            case ast.Name(id=name) if name not in names:
                return self._named(name, names)
            case ast.Attribute(value=ast.Name(id="torch"), attr=name):
                return name
        return _UNREAD

    def _named(self, name: str, names: tuple[str, ...]) -> Any:
        """What a name stands for, where it is bound to one value alone."""
        nodes = self.bound.get(name, [])
        values = [_UNREAD if node is None else self._value(node, (*names, name)) for node in nodes]
        return values[0] if values and all(value == values[0] for value in values) else _UNREAD


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"
