"""Write docs/options.md and docs/serving-options.md: every option of a recipe, and of a server, from the typed options
themselves.

    python tools/options_page.py

Free of torch, like the options. tests/docs/test_options_page.py holds the pages to them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from topwork.common.options import Options
from topwork.models.source import ALIASES
from topwork.recipe.recipe import BATCH_PARTS, PEERS_NAMES, Recipe
from topwork.recipe.sweep_config import Job, SweepConfig
from topwork.serving.config import ServeConfig

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
SERVING_PAGE = PAGE.with_name("serving-options.md")
SECTIONS: dict[str, FieldInfo] = {
    **Recipe.model_fields,
    "sweep": FieldInfo.from_annotation(SweepConfig),
    "jobs": FieldInfo.from_annotation(list[Job]),
}
MEANINGS = {
    "sweep": "Several runs that are compared (`topwork sweep`; [docs/sweeps.md](sweeps.md)).",
    "jobs": "Several runs with data of their own, as a list; each lies over the recipe's own sections.",
}
"""Of the sections that are no field of Recipe."""

HEAD = """# Every option of a recipe

Written by `python tools/options_page.py` (`make docs`) from the options' own types and docstrings, which stand in the
`config.py` of each part, in `recipe/recipe.py` and in `recipe/sweep_config.py`.

A recipe is a YAML file of the sections below. `model` and `data` are needed, and of them what has no default; an option
that is left out has its default. Any of them is set from the command line too: `--set training.learning_rate=1e-4`.
Unknown keys are refused with the nearest known one. `–` is nothing: what that means, the option says.
"""
SERVING_HEAD = """# Every option of a server

Written by `python tools/options_page.py` (`make docs`) from `serving/config.py`. What they do together:
[serving.md](serving.md), [arms.md](arms.md).

`topwork serve --config serve.yaml` reads a YAML file of the keys below. Of these `model` alone is needed, and may be
given by its name. Any of them is set from the command line too: `--set engine.batch_size=32`. Unknown keys are refused
with the nearest known one. `–` is nothing: what that means, the option says.
"""
COLUMNS = "| option | values | default | what it is |\n| --- | --- | --- | --- |"
WORDS: dict[Any, str] = {str: "text", bool: "`true` or `false`", int: "whole number", float: "number", Any: "any value"}
PLURALS: dict[Any, str] = {str: "texts", int: "whole numbers", list[int]: "lists of whole numbers"}
TAGS = ("method", "name")
"""The keys by which options of several kinds are told apart."""
BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "more than"), (Le, "le", "at most"), (Lt, "lt", "less than"))


def page() -> str:
    """docs/options.md."""
    sections = {name: field for name, field in SECTIONS.items() if models(field.annotation)}
    single = {name: field for name, field in SECTIONS.items() if name not in sections}
    parts = [HEAD, *(line for name, field in sections.items() for line in section(name, field))]
    parts += ["## Beside the sections\n", COLUMNS, *(row(name, field) for name, field in single.items()), ""]
    return "\n".join([*parts, *_names_from_elsewhere()]) + "\n"


def serving_page() -> str:
    """docs/serving-options.md."""
    fields = ServeConfig.model_fields
    sections = {name: field for name, field in fields.items() if models(field.annotation)}
    parts = [SERVING_HEAD, COLUMNS, *(row(name, field) for name, field in fields.items() if name not in sections), ""]
    return "\n".join([*parts, *(line for name, field in sections.items() for line in section(name, field))])


def models(annotation: Any) -> list[type[Options]]:
    """The classes of options that an annotation names, at any depth: of a section one, of a union several."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return [annotation]
    return list(dict.fromkeys(found for inner in get_args(annotation) for found in models(inner)))


def section(path: str, field: FieldInfo) -> list[str]:
    """A section's lines, and those of the sections in it. Where it is one of several, `path` is told with the key that
    tells them apart."""
    kinds = models(field.annotation)
    head = [f"{'#' * (2 + path.count('.'))} `{path}`\n", (field.description or MEANINGS[path]) + "\n"]
    fields = [(name, inner) for kind in kinds for name, inner in kind.model_fields.items()]
    by_kinds = {tuple(models(inner.annotation)): (name, inner) for name, inner in reversed(fields)}  # each told once
    inside = [(name, inner) for kinds, (name, inner) in reversed(by_kinds.items()) if kinds]
    lines = head + (_one_of(kinds) if _tag(kinds[0]) else [COLUMNS, *(row(name, inner) for name, inner in fields), ""])
    return lines + [line for name, inner in inside for line in section(f"{path}.{name}", inner)]


def row(name: str, field: FieldInfo, *more: str) -> str:
    """An option's line."""
    cells = [f"`{name}`", *more, values(field), default(field), _cell(field.description or "")]
    return "| " + " | ".join(cells) + " |"


def values(field: FieldInfo) -> str:
    """What an option may hold, in words."""
    if models(field.annotation):
        shorter = any(str in (inner, *get_args(inner)) for inner in get_args(field.annotation))
        return "text, options as below, or a list of both" if shorter else "a section, below"
    bounds = [
        f"{word} {getattr(m, key):g}" for m in field.metadata for kind, key, word in BOUNDS if isinstance(m, kind)
    ]
    bounds += ["not empty" for m in field.metadata if isinstance(m, MinLen)]
    return _cell(", ".join([words(field.annotation), *bounds]))


def words(annotation: Any) -> str:
    """A type, for people."""
    inner = [arg for arg in get_args(annotation) if arg is not NoneType]
    origin = get_origin(annotation)
    if origin is Annotated:
        return words(inner[0])
    if origin in (Union, UnionType):
        return ", or ".join(words(arg) for arg in inner)
    if origin is Literal:
        return " · ".join(_code(value) for value in inner)
    if origin is list:
        return f"a list of {PLURALS.get(inner[0]) or words(inner[0])}"
    if origin is dict:
        return f"keys with {'values' if inner[1] is Any else PLURALS.get(inner[1]) or words(inner[1]) + 's'}"
    return WORDS[annotation]


def default(field: FieldInfo) -> str:
    """What an option is where a recipe is silent."""
    if field.is_required():
        return "**needed**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Options):
        tag = _tag(type(value))
        return _code(getattr(value, tag)) if tag else "its defaults"
    return "–" if value is None or value in ({}, [], "") else _code(value)


def _one_of(kinds: Sequence[type[Options]]) -> list[str]:
    """Kinds told apart by a key: which there are, and their options, each with the kinds that know it."""
    tag = _tag(kinds[0])
    assert tag is not None
    lines = [f"| `{tag}` | what it is | its options |", "| --- | --- | --- |"]
    known: dict[str, list[str]] = {}
    for kind in kinds:
        field = kind.model_fields[tag]
        own = {name: inner for name, inner in kind.model_fields.items() if name != tag}
        names = ", ".join(f"`{name}`" for name in own) or "–"
        lines.append(f"| {values(field)} | {_cell(field.description or '')} | {names} |")
        for name, inner in own.items():
            known.setdefault(row(name, inner, "{}"), []).append(field.default)
    if not known:
        return [*lines, ""]
    head, line = COLUMNS.split("\n")
    table = [head.replace("| values", f"| {tag} | values"), "| --- " + line]
    return [
        *lines,
        "",
        *table,
        *(text.replace("| {} |", f"| {', '.join(own)} |", 1) for text, own in known.items()),
        "",
    ]


def _tag(kind: type[Options]) -> str | None:
    """The key that says which of several kinds these options are."""
    fields = kind.model_fields
    return next((name for name in TAGS if name in fields and get_origin(fields[name].annotation) is Literal), None)


def _names_from_elsewhere() -> Iterator[str]:
    """What else people write."""
    yield "## Names from elsewhere\n"
    parts = " and ".join(f"`training.{name}`" for name in BATCH_PARTS)
    yield f"- {parts} are read; their product is `training.batch_size`."
    yield from (f"- `model.model_name_or_path: {short}` is `{full}`." for short, full in ALIASES.items())
    yield ""
    yield "Whoever writes another tool's name is told where it lives here:\n"
    yield "| there | here |\n| --- | --- |"
    yield from (f"| `{theirs}` | {ours} |" for theirs, ours in sorted(PEERS_NAMES.items()))


def _code(value: Any) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SERVING_PAGE.write_text(serving_page(), encoding="utf-8")
