"""Files as rows; and every way in which a file can be wrong, with the message that says what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from topwork.common.errors import DataError
from topwork.data.rows import read_rows

Write = Callable[[str, str | bytes], str]


def refused(name: str, *words: str) -> None:
    with pytest.raises(DataError) as error:
        read_rows(name)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_jsonl_names_lines_and_passes_over_blank_ones(write: Write) -> None:
    path = write("a.jsonl", '\ufeff{"text": "é\u2028x"}\r\n\n{"text": "b"}\n')
    rows = read_rows(path)
    assert [(row.fields["text"], row.source) for row in rows] == [("é\u2028x", "a.jsonl:1"), ("b", "a.jsonl:3")]
    assert len(read_rows(path, max_rows=1)) == 1


def test_json_list_object_with_one_list_and_lines(write: Write) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    assert [row.source for row in read_rows(write("a.json", json.dumps(rows, indent=1)))] == ["a.json[0]", "a.json[1]"]
    assert len(read_rows(write("b.json", json.dumps({"version": 1, "notes": ["x"], "data": rows})))) == 2
    assert len(read_rows(write("c.json", "\n".join(map(json.dumps, rows))))) == 2


def test_csv_with_bom_semicolons_quotes_and_line_breaks(write: Write) -> None:
    path = write("a.csv", '\ufeffprompt;completion\r\n"Hi; there";"two\nlines, ""quoted"""\r\n\r\nb;c\r\n')
    rows = read_rows(path)
    assert rows[0].fields == {"prompt": "Hi; there", "completion": 'two\nlines, "quoted"'}
    assert [row.source for row in rows] == ["a.csv:2", "a.csv:5"]
    tabs = read_rows(write("a.tsv", "prompt\tcompletion\na, b\tc\n"))
    assert tabs[0].fields == {"prompt": "a, b", "completion": "c"}
    commas = read_rows(write("b.csv", 'prompt,completion\n"a;b","c;d;e"\n'))
    assert commas[0].fields == {"prompt": "a;b", "completion": "c;d;e"}


def test_text_parquet_and_folder(write: Write, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = read_rows(write("notes.txt", "one\ntwo\n \n\nthree\n"))
    assert [(row.fields["text"], row.source) for row in text] == [("one\ntwo", "notes.txt:1"), ("three", "notes.txt:5")]
    fields = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]
    pq.write_table(pa.Table.from_pylist(fields), tmp_path / "a.parquet")
    assert [row.fields for row in read_rows(str(tmp_path / "a.parquet"))] == fields
    write("b.jsonl", '{"text": "a"}\n')
    assert [row.source for row in read_rows(str(tmp_path))] == ["a.parquet[0]", "a.parquet[1]", "b.jsonl:1"]


def test_missing_files_and_near_names(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", "{}")
    refused(str(tmp_path / "trian.jsonl"), "does not exist", "did you mean 'train.jsonl'")
    refused(str(tmp_path / "no" / "train.jsonl"), "nor does its folder")
    refused(write("a.xlsx", "x"), "ends in '.xlsx'", ".jsonl")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "holds no data file")


def test_empty_files(write: Write) -> None:
    refused(write("a.jsonl", ""), "is empty", "at least one row")
    refused(write("c.json", "[]"), "holds no rows")
    refused(write("d.csv", "prompt,completion\n"), "holds no rows")
    refused(write("e.csv", b"\xef\xbb\xbf"), "is empty")


def test_malformed_json_names_line_column_and_text(write: Write) -> None:
    good = '{"text": "a"}'
    refused(write("a.jsonl", f'{good}\n{good}\n{{"text": "b" "c"}}\n'), "line 3, column 14", "malformed JSON", '"c"')
    refused(write("b.jsonl", f"{good}\n[1, 2]\n"), "line 2", "expected one JSON object per line", "list")
    refused(write("c.jsonl", '[\n {"text": "a"}\n]'), "line 1", "ends in .json")
    refused(write("d.json", '[\n {"text": "a"},\n {"text": }\n]'), "line 3, column 11", "malformed JSON")
    refused(write("e.json", '["a"]'), "expected an object, found str")
    refused(write("f.json", '{"a": [{}], "b": [{}]}'), "2 lists of rows")
    refused(write("g.json", "3"), "found int")


def test_wrong_encoding_names_byte_line_and_likely_encoding(write: Write) -> None:
    latin = '{"text": "a"}\n{"text": "café"}\n'.encode("cp1252")
    refused(write("a.jsonl", latin), "not UTF-8", "byte 0xe9 at offset 27", "line 2", "cp1252", "iconv -f cp1252")
    refused(write("b.csv", "prompt,completion\na,b\n".encode("utf-16")), "offset 0, line 1", "utf-16")
    refused(write("c.csv", "prompt,completion\na,b\n".encode("utf-16-le")), "utf-16")


def test_csv_rows_of_another_width(write: Write) -> None:
    refused(write("a.csv", "prompt,completion\na,b\nc,d,e\n"), "line 3", "3 cells where the header has 2", "quotes")
    refused(write("b.csv", "prompt,completion\na,b\nc\n"), "line 3", "1 cells where the header has 2")
    refused(write("c.csv", 'prompt,completion\na,b\n"c,d\n'), "line 3", "malformed CSV")
    refused(write("d.csv", "prompt,prompt\na,b\n"), "names 'prompt' twice")


def test_broken_parquet(write: Write) -> None:
    refused(write("a.parquet", "not parquet at all"), "cannot be read as parquet")


def test_hub_id_is_split_and_a_failure_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("owner/name:main:test", max_rows=5)[0].source == "owner/name:main:test[0]"
    read_rows("owner/name")
    assert asked == [(("owner/name", "main"), {"split": "test[:5]"}), (("owner/name", None), {"split": "train"})]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    refused("owner/name", "no local file", "ConnectionError: no route", "owner/name[:config[:split]]")
