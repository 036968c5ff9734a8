"""YAML and JSON with the number of the line that each value stands in."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from topwork.common.errors import RequestError
from topwork.run.importing.records import Given

MOST_VALUES = 20_000
"""More than any training config has: a file with more is another thing, or was made to fill the memory."""
_VARIABLE = re.compile(r"\$\{([\w.]+)\}")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def parsed(text: str, source: str) -> yaml.MappingNode:
    """A YAML or JSON mapping. Raises RequestError for what is none."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise RequestError(f"{source} is not YAML: {str(error)[:400]}") from error
    if root is None:
        raise RequestError(f"{source} is empty; give a training config of another tool")
    if not isinstance(root, yaml.MappingNode):
        raise RequestError(f"{source} holds no keys; give a training config, with keys such as learning_rate")
    return root


def given_in(root: yaml.MappingNode, source: str, inside: Callable[[str], bool]) -> list[Given]:
    """What it gives, in its order, by dotted keys. `inside` tells which mappings, and lists of mappings, are read key
    by key; others are one value. Raises RequestError."""
    try:
        return _with_variables(list(_walk(root, "", source, inside, [0])))
    except RecursionError as error:
        raise RequestError(f"{source} is nested too deep to be a training config") from error


def number(value: Any) -> Any:
    """A number that YAML 1.1 reads as text: 1e-4 has no dot."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        found = float(value)
        return int(found) if found.is_integer() and not re.search("[.eE]", value) else found
    return value


def _walk(
    node: yaml.MappingNode, prefix: str, source: str, inside: Callable[[str], bool], count: list[int]
) -> Iterator[Given]:
    seen: set[str] = set()
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise RequestError(f"{source}, line {name.start_mark.line + 1}: a key is no text")
        key = f"{prefix}{name.value}"
        if key in seen:
            raise RequestError(f"{source}, line {name.start_mark.line + 1}: {key!r} is given twice; keep one")
        seen.add(key)
        yield from _entry(key, name.start_mark.line + 1, value, source, inside, count)


def _entry(
    key: str, line: int, node: yaml.Node, source: str, inside: Callable[[str], bool], count: list[int]
) -> Iterator[Given]:
    if isinstance(node, yaml.MappingNode) and node.value and inside(key):
        yield from _walk(node, f"{key}.", source, inside, count)
    elif isinstance(node, yaml.SequenceNode) and node.value and inside(key):
        for index, each in enumerate(node.value):
            yield from _entry(f"{key}[{index}]", each.start_mark.line + 1, each, source, inside, count)
    else:
        yield Given(key, _plain(node, source, count), line)


def _plain(node: yaml.Node, source: str, count: list[int]) -> Any:
    """A node's value. Aliases are walked each time they stand, so what they blow up is counted."""
    count[0] += 1
    if count[0] > MOST_VALUES:
        raise RequestError(f"{source} holds more than {MOST_VALUES:,} values; that is no training config")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each, source, count) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(_plain(key, source, count)): _plain(value, source, count) for key, value in node.value}
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError):  # a tag of their own, or a date that is none
        return node.value
    return number(value) if getattr(node, "style", None) is None else value


def _with_variables(given: list[Given]) -> list[Given]:
    """`${output_dir}` with what the key of that name gives."""
    known = {each.key: each.value for each in given}

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return _VARIABLE.sub(lambda match: str(known.get(match[1], match[0])), value)
        return [filled(each) for each in value] if isinstance(value, list) else value

    return [Given(each.key, filled(each.value), each.line, each.code) for each in given]
