"""Write the tables of docs/importing.md: what becomes of each key of each tool.

    python tools/importing_page.py

Made of `run/importing/tools/`; tests/docs/test_importing_page.py holds the page to them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from topwork.run.importing.draft import Draft
from topwork.run.importing.records import Key, Lacking, Needless, Refused, Tool
from topwork.run.importing.tools.table import TOOLS

PAGE = Path(__file__).parents[1] / "docs" / "importing.md"
START = "<!-- what becomes of each key: python tools/importing_page.py -->\n"
END = "<!-- end -->\n"
TWINS = ("test_datasets[]", "pretraining_dataset[]", "hf_dataset[]", "dataset[]")
"""Lists whose entries are read as those of `datasets[]`, `hf_dataset` and `dataset`."""


def tables() -> str:
    """A heading for each tool: keys that go somewhere in a table, the others by the reason."""
    return "\n".join(line for tool in TOOLS.values() for line in _tool(tool)) + "\n"


def _tool(tool: Tool) -> Iterator[str]:
    yield from (f"### {tool.name}", "", f"As in {tool.source}.", "", "| theirs | here | how |", "| --- | --- | --- |")
    keys = [key for key in tool.keys if not key.theirs.startswith(TWINS)]
    placed = [key for key in keys if key.ours]
    for (ours, how), names in _grouped((key, (key.ours, _how(key))) for key in placed).items():
        yield f"| {', '.join(names)} | {_code(ours)} | {how} |"
    for title, kind in (("Nothing to set here", Needless), ("No equal here", Lacking), ("No recipe is made", Refused)):
        rest = [(key, (why,)) for key in keys if not key.ours if (why := _why(key, tool, kind))]
        if rest:
            yield from ("", f"{title}:", "")
            yield from (f"- {', '.join(names)}: {why}" for (why,), names in _grouped(rest).items())
    yield ""


def _grouped(entries: Iterable[tuple[Key, tuple[str, ...]]]) -> dict[tuple[str, ...], list[str]]:
    """Keys that are told the same, together."""
    found: dict[tuple[str, ...], list[str]] = {}
    for key, told in entries:
        found.setdefault(told, []).append(_code(key.theirs))
    return found


def _how(key: Key) -> str:
    told = key.how or (getattr(key.convert, "__doc__", None) or "").split("\n")[0].rstrip(".")
    default = f"left out: {_plain(key.default)}" if key.has_default else ""
    return "; ".join(filter(None, (told, default)))


def _plain(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value).lower()


def _why(key: Key, tool: Tool, kind: type[Needless | Lacking | Refused]) -> str:
    """Why a key that goes nowhere does so, where that is of this kind; as its value `true` tells."""
    if key.convert is None:
        return key.how if kind is Needless and key.fate == "needless" else ""
    try:
        result = key.convert(True, Draft(tool, []))
    except (TypeError, ValueError):
        return ""
    return result.why if isinstance(result, kind) else ""


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def page() -> str:
    """The page with the tables as they have to stand there."""
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    return f"{before}{START}\n{tables()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
