"""Sheets of Excel, as the rows of a CSV."""

import builtins
import zipfile
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pytest

from topwork.common.errors import DataError
from topwork.data.config import DataConfig, SourceConfig
from topwork.data.examples import load_data
from topwork.data.files.rows import read_rows
from topwork.recipe.recipe import load_recipe

openpyxl = pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
PAIRS = [["Question", "Answer"], ["q 1", "a 1"], ["q 2", "a 2"]]
Sheets = dict[str, list[list[Any]]]


@pytest.fixture
def book(tmp_path: Path) -> Callable[..., Path]:
    """book(rows or {sheet: rows}) -> a workbook's path."""

    def made(sheets: list[list[Any]] | Sheets, name: str = "rows.xlsx") -> Path:
        workbook = openpyxl.Workbook()
        workbook.remove(workbook.active)
        for title, rows in (sheets if isinstance(sheets, dict) else {"Sheet1": sheets}).items():
            sheet = workbook.create_sheet(title)
            for row in rows:
                sheet.append(row)
        workbook.save(tmp_path / name)
        return tmp_path / name

    return made


def rows_of(path: Path | str, **options: Any) -> list[tuple[dict[str, Any], str]]:
    return [(row.fields, row.source) for row in read_rows(SourceConfig(path=str(path), **options)).rows]


def refused(path: Path | str, *told: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(path, **options)
    assert all(part in str(caught.value) for part in told), caught.value
    assert "\n" not in str(caught.value)


def test_a_header_and_rows_under_it(book: Callable[..., Path]) -> None:
    path = book([[None], ["\ufeff Question ", None, "Answer", None], ["q 1", None, "a 1"], [], [" ", None], ["q 2"]])
    assert rows_of(path) == [
        ({"\ufeff Question": "q 1", "Answer": "a 1"}, "rows.xlsx:3"),
        ({"\ufeff Question": "q 2", "Answer": ""}, "rows.xlsx:6"),
    ]


def test_what_cells_hold_is_text(book: Callable[..., Path]) -> None:
    cells: list[tuple[Any, str]] = [
        (3, "3"), (3.0, "3"), (0.1, "0.1"), (1e20, "1e+20"), (True, "TRUE"), (False, "FALSE"), ("007", "007"),
        ("two\nlines", "two\nlines"), (date(2026, 1, 2), "2026-01-02"), (time(9, 30), "09:30:00"),
        (datetime(2026, 1, 2, 9, 30), "2026-01-02T09:30:00"), (timedelta(hours=26, minutes=5), "26:05:00"),
        ("NA", "NA"), (None, ""), ("=", "="),
    ]  # fmt: skip
    path = book([["prompt", *(f"c{at}" for at in range(len(cells)))], ["p", *(value for value, _ in cells)]])
    ((fields, _),) = rows_of(path)
    assert list(fields.values()) == ["p", *(told for _, told in cells)]


def computed(path: Path, value: str) -> None:
    """As Excel saves it: the formula, and what it came to."""
    with zipfile.ZipFile(path) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    files[sheet] = files[sheet].replace(b"<v />", value.encode()).replace(b"<v></v>", value.encode())
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)


def test_a_formula_is_what_it_came_to(book: Callable[..., Path]) -> None:
    path = book([["prompt", "completion"], ["2 + 5", "=2+5"]])
    refused(path, "the cell Sheet1!B2 holds a formula whose value was never computed; open the file")
    computed(path, "<v>7</v>")
    assert rows_of(path) == [({"prompt": "2 + 5", "completion": "7"}, "rows.xlsx:2")]


def test_which_sheet(book: Callable[..., Path], tmp_path: Path) -> None:
    path = book({"Tickets": PAIRS, "My notes": [["text"], ["t"]], "More": [PAIRS[0], ["q", "a"]]})
    reading = read_rows(SourceConfig(path=str(path)))
    assert len(reading.rows) == 2
    assert reading.notes == (
        f"rows.xlsx: its sheet Tickets is read; not read: My notes, More (name one as {path}:My notes)",
    )
    for way in ({"path": f"{path}:my notes"}, {"path": str(path), "split": "My notes"}):
        assert rows_of(**way) == [({"text": "t"}, "rows.xlsx:2")]
    refused(f"{path}:Mroe", "has no sheet 'Mroe'; did you mean 'More'", "its sheets are Tickets, My notes, More")
    (tmp_path / "recipe.yaml").write_text(
        "model: {model_name_or_path: a/b}\ndata: {train: 'rows.xlsx:More', eval: rows.xlsx}\n", "utf-8"
    )
    data = load_recipe(tmp_path / "recipe.yaml").data
    assert (data.train, data.eval) == (f"{path}:More", str(path))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "holds no rows"),
        ([["prompt", "completion"]], "holds no rows"),
        ([["prompt", "prompt"], ["a", "b"]], "names 'prompt' twice"),
        ([["prompt", "completion"], ["a", "b", "c"]], "row 2: 'c' stands in column 3, which has no name"),
        ([["prompt", None, "completion"], ["a", "b", "c"]], "'b' stands in column 2, which has no name"),
    ],
)
def test_what_is_wrong_is_named(rows: list[list[Any]], told: str, book: Callable[..., Path]) -> None:
    refused(book(rows), told)


def test_an_error_in_a_cell_is_not_learned(book: Callable[..., Path]) -> None:
    refused(book([["prompt", "completion"], ["a", "#REF!"]]), "the cell Sheet1!B2 holds the error #REF!")


def test_what_is_no_sheet_of_this_kind(tmp_path: Path, book: Callable[..., Path]) -> None:
    for content in (b"\xd0\xcf\x11\xe0 an older one", b"", book(PAIRS).read_bytes()[:300]):
        (tmp_path / "old.xlsx").write_bytes(content)
        refused(tmp_path / "old.xlsx", "cannot be read as .xlsx", "save its sheet as CSV in UTF-8")
    refused(book(PAIRS).rename(tmp_path / "rows.csv"), "name it .xlsx")


def test_without_the_package_it_is_said_how(book: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, imported = book(PAIRS), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("openpyxl"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(path, "save its sheet as CSV in UTF-8, or pip install 'topwork[xlsx]'")


def test_a_folder_with_rows_beside_it(book: Callable[..., Path], tmp_path: Path) -> None:
    path = book(PAIRS)
    assert len(rows_of(tmp_path)) == 2
    (tmp_path / "about.txt").write_text("about the sheet")
    assert len(rows_of(tmp_path)) == 2
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    reading = read_rows(SourceConfig(path=str(tmp_path)))
    assert [row.source for row in reading.rows] == ["rows.csv:2"]
    assert f"not learned: about.txt, {path.name}" in reading.notes[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_training_rows(streaming: bool, book: Callable[..., Path], make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("smollm2")
    config = DataConfig(
        train=str(book(PAIRS)), eval_fraction=0, chat_template="chatml", streaming=streaming, max_length=512
    )
    told: list[str] = []
    data = load_data(config, tokenizer, 512, 0, told.append)
    assert len(data.train) == 2
    assert any("Question -> Answer" in line for line in told)
    learned = [tokenizer.decode(row.tokens[row.weights > 0]) for row in (data.train[0], data.train[1])]
    assert learned == ["a 1<|im_end|>", "a 2<|im_end|>"]
