"""Write the table of docs/delivery.md: what is done about each feature of an adapter, by format.

    python tools/delivery_table.py

Made of `export/readers.py`; tests/docs/test_delivery_page.py holds the page to it.
"""

from pathlib import Path

from topwork.export.readers import FEATURES, READERS

PAGE = Path(__file__).parents[1] / "docs" / "delivery.md"
START = "<!-- what is done about each feature, by format: python tools/delivery_table.py -->\n"
END = "<!-- end -->\n"


def table() -> str:
    """A row for each feature, a column for each format; formats that do the same share one."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for reader in READERS.values():
        columns.setdefault(tuple(reader.verdicts[name].action for name in FEATURES), []).append(f"`{reader.format}`")
    lines = [
        f"| | {' | '.join(', '.join(names) for names in columns.values())} |",
        f"| --- |{' --- |' * len(columns)}",
    ]
    for at, told in enumerate(FEATURES.values()):
        lines.append(f"| {told} | {' | '.join(actions[at] for actions in columns)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table as it has to stand there."""
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    return f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
