"""Parquet, arrow and save_to_disk: what was written comes back, without what Arrow and `datasets` put in its place."""

import datetime
import decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from topwork.common.errors import DataError
from topwork.data.config import SourceConfig
from topwork.data.files import rows
from topwork.data.files.rows import Reading, read_rows

datasets.disable_progress_bars()


def reading(path: Path, **source: Any) -> Reading:
    return read_rows(SourceConfig(path=str(path), **source))


def fields(path: Path, **source: Any) -> list[dict[str, Any]]:
    return [row.fields for row in reading(path, **source).rows]


def chat(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A row with one tool, one call of it and its answer."""
    properties = {key: {"type": "string"} for key in arguments}
    return {
        "messages": [
            {"role": "user", "content": "please"},
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}
                ],
            },
            {"role": "tool", "content": "clear"},
            {"role": "assistant", "content": "Clear."},
        ],
        "tools": [
            {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        ],
    }


ROWS = [chat("sky", {"city": "Orlen"}), chat("stock", {"sku": "B7"}), chat("time", {})]
"""The first message of a tool's call has no content, and the third call no arguments."""


def written(rows: list[dict[str, Any]], path: Path, how: str) -> Path:
    if how == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path / "a.parquet")
    elif how == "datasets parquet":
        datasets.Dataset.from_list(rows).to_parquet(path / "a.parquet")
    elif how == "arrow file":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(path / "a.arrow"), table.schema) as file:
            file.write_table(table)
    elif how == "arrow stream":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as file:
            file.write_table(table)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path / "saved")
    return next(path.iterdir())


@pytest.mark.parametrize("how", ["parquet", "datasets parquet", "arrow file", "arrow stream", "save_to_disk"])
def test_calls_and_tools_come_back_as_they_were_written(tmp_path: Path, how: str) -> None:
    found = reading(written(ROWS, tmp_path, how))
    assert [row.fields for row in found.rows] == ROWS
    assert found.rows[1].source in ("a.parquet[1]", "a.arrow[1]", "saved[1]")


def test_objects_that_an_older_writer_filled_up_are_no_value(tmp_path: Path) -> None:
    """As writers that know no null object leave it: an object of nulls."""
    kind = pa.struct({"role": pa.string(), "extra": pa.struct({"a": pa.string(), "b": pa.struct({"c": pa.int64()})})})
    messages = [
        [{"role": "user", "extra": {"a": None, "b": {"c": None}}}, {"role": "tool", "extra": {"a": "x", "b": {"c": 1}}}]
    ]
    pq.write_table(pa.table({"messages": pa.array(messages, pa.list_(kind))}), tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet") == [
        {"messages": [{"role": "user"}, {"role": "tool", "extra": {"a": "x", "b": {"c": 1}}}]}
    ]


def test_a_null_in_a_list_stays(tmp_path: Path) -> None:
    rows = [
        {"enum": ["a", None], "deep": [{"x": [None, {"y": 1, "z": None}]}], "top": None},
        {"enum": [], "deep": [], "top": "t"},
    ]
    found = fields(written(rows, tmp_path, "parquet"))
    assert found[0] == {"enum": ["a", None], "deep": [{"x": [None, {"y": 1}]}], "top": None}
    assert found[1] == rows[1]


@pytest.mark.parametrize("how", ["parquet", "save_to_disk"])
def test_classes_are_their_names(tmp_path: Path, how: str) -> None:
    label = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": label, "tags": datasets.List(label), "inner": {"label": label}}
    )
    rows = {"text": ["good", "bad", "?"], "label": [1, 0, -1], "tags": [[0, 1], [], [1]], "inner": [{"label": 0}] * 3}
    table = datasets.Dataset.from_dict(rows, features=features)
    path = tmp_path / "a.parquet" if how == "parquet" else tmp_path / "saved"
    if how == "parquet":
        table.to_parquet(path)
    else:
        table.select([2, 0, 1]).select([1, 2, 0]).save_to_disk(path)
    inner = {"label": "negative"}
    assert fields(path) == [
        {"text": "good", "label": "positive", "tags": ["negative", "positive"], "inner": inner},
        {"text": "bad", "label": "negative", "tags": [], "inner": inner},
        {"text": "?", "label": None, "tags": ["positive"], "inner": inner},
    ]


def test_values_of_other_kinds(tmp_path: Path) -> None:
    table = pa.table(
        {
            "category": pa.array(["a", "b", "a"]).dictionary_encode(),
            "date": pa.array([datetime.date(2024, 2, 29), None, datetime.date(1999, 12, 31)]),
            "time": pa.array([datetime.datetime(2024, 2, 29, 13, 5), None, None], pa.timestamp("us")),
            "price": pa.array([decimal.Decimal("12.50"), decimal.Decimal("0.10"), None], pa.decimal128(6, 2)),
            "count": pa.array([decimal.Decimal("12"), None, None], pa.decimal128(6, 0)),
            "raw": pa.array([b"caf\xc3\xa9", b"", None], pa.binary()),
            "score": pa.array([0.5, float("nan"), float("inf")]),
            "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet") == [
        {
            "category": "a", "date": "2024-02-29", "time": "2024-02-29T13:05:00", "price": "12.50", "count": 12,
            "raw": "café", "score": 0.5, "map": {"k": 1},
        },
        {
            "category": "b", "date": None, "time": None, "price": "0.10", "count": None,
            "raw": "", "score": None, "map": {},
        },
        {
            "category": "a", "date": "1999-12-31", "time": None, "price": None, "count": None,
            "raw": None, "score": None, "map": None,
        },
    ]  # fmt: skip


def test_bytes_and_pictures_are_refused_unless_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    picture = {"bytes": b"\x89PNG\xff", "path": "a.png"}
    pq.write_table(pa.table({"text": ["a"], "picture": [picture]}), path)
    with pytest.raises(DataError, match=r"the column picture holds images or audio, .*data.columns: \{prompt: COLUMN"):
        fields(path)
    named = reading(path, columns={"text": "text"})
    assert [row.fields for row in named.rows] == [{"text": "a"}]
    assert named.notes == ("a.parquet: its column picture, which holds images or audio, is not read",)
    nested = [{"messages": [{"role": "user", "content": [{"type": "image", "image": picture}]}]}]
    with pytest.raises(DataError, match="the column messages holds images or audio"):
        fields(written(nested, (tmp_path / "b").mkdir() or tmp_path / "b", "parquet"))  # type: ignore[func-returns-value]
    pq.write_table(pa.table({"text": [b"caf\xe9"]}), path)
    with pytest.raises(DataError, match=r"the column text holds bytes that are no text \(row 0\)"):
        fields(path)


def test_broken_tables(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_text("not a table at all")
        with pytest.raises(DataError, match=rf"{name} cannot be read as {name[2:]} \("):
            fields(tmp_path / name)
    pq.write_table(pa.table({"text": ["a"] * 1000}), tmp_path / "b.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"b.parquet cannot be read as parquet"):
        fields(tmp_path / "b.parquet")


def test_a_table_whose_text_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """Other writers than Arrow's do not look."""
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ab\xe9c"))
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet cannot be read as parquet \(.*UTF8"):
        fields(tmp_path / "a.parquet")


def test_rows_are_read_in_batches_and_no_further_than_asked(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [str(n) for n in range(2500)]}), tmp_path / "a.parquet")
    found = reading(tmp_path / "a.parquet").rows
    assert (len(found), found[2499].fields, found[2499].source) == (2500, {"text": "2499"}, "a.parquet[2499]")
    assert len(read_rows(SourceConfig(path=str(tmp_path / "a.parquet")), max_rows=1001).rows) == 1001


def test_a_saved_dict_is_a_folder_of_splits(tmp_path: Path) -> None:
    splits = {
        "train": datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]),
        "test": datasets.Dataset.from_list([{"text": "c"}]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = reading(tmp_path / "saved")
    assert [(row.fields, row.source) for row in found.rows] == [
        ({"text": "a"}, "train[0]"),
        ({"text": "b"}, "train[1]"),
    ]
    assert found.notes == ("saved: its training split is read (train); not learned: test",)
    assert fields(tmp_path / "saved", split="test") == [{"text": "c"}]
    assert fields(tmp_path / "saved" / "test") == [{"text": "c"}]
    with pytest.raises(DataError, match=r"has no split 'tests'; did you mean 'test'\?; its splits are train, test"):
        fields(tmp_path / "saved", split="tests")


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((*args, kwargs["split"]))
        if kwargs["split"] == "validation":
            raise ValueError("Unknown split \"validation\". Should be one of ['train', 'test'].")
        return table

    monkeypatch.setattr(rows, "ask_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    first = read_rows(SourceConfig(path="owner/name:main:test"), max_rows=5)
    assert [(row.fields, row.source) for row in first.rows] == [
        ({"text": "a", "label": "yes"}, "owner/name:main:test[0]")
    ]
    assert first.notes == ("owner/name:main:test: its test split is read",)
    read_rows(SourceConfig(path="owner/name"))
    read_rows(SourceConfig(path="owner/name", split="test"))
    read_rows(SourceConfig(path="owner/name", split="validation|test|"))
    assert asked == [
        ("owner/name", "main", "test[:5]"),
        ("owner/name", None, "train"),
        ("owner/name", None, "test"),
        ("owner/name", None, "validation"),
        ("owner/name", None, "test"),
    ]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"no local file .*ConnectionError: no route.*owner/name\[:config\[:split\]\]"):
        read_rows(SourceConfig(path="owner/name"))


@pytest.mark.parametrize(("kind", "values"), [("float", [0.1, 3.0, 1e-05]), ("halffloat", [0.1, 3.0, 1e-05])])
def test_a_number_of_little_precision_is_its_shortest_text(tmp_path: Path, kind: str, values: list[float]) -> None:
    numbers = pa.array(values, pa.float32() if kind == "float" else pa.float16())
    lists = pa.array([[value] for value in values], pa.list_(pa.float32()))
    pq.write_table(pa.table({"number": numbers, "list": lists}), tmp_path / "a.parquet")
    assert [row["number"] for row in fields(tmp_path / "a.parquet")] == values
    assert [row["list"] for row in fields(tmp_path / "a.parquet")] == [[value] for value in values]
