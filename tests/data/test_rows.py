"""Files as rows; and every way in which a file can be wrong, with the message that says what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from topwork.common.errors import DataError
from topwork.data.config import SourceConfig
from topwork.data.files.rows import Reading, read_rows

Write = Callable[[str, str | bytes], str]


def reading(path: str, documents: str = "file", max_rows: int | None = None, **source: Any) -> Reading:
    return read_rows(SourceConfig(path=path, **source), documents, max_rows)


def fields(path: str, **source: Any) -> list[dict[str, Any]]:
    return [row.fields for row in reading(path, **source).rows]


def refused(path: str, *words: str, **source: Any) -> str:
    with pytest.raises(DataError) as error:
        reading(path, **source)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_jsonl_names_lines_and_passes_over_blank_ones(write: Write) -> None:
    path = write("a.jsonl", '\ufeff{"text": "é\u2028x"}\r\n\n{"text": "b"}\n')
    rows = reading(path).rows
    assert [(row.fields["text"], row.source) for row in rows] == [("é\u2028x", "a.jsonl:1"), ("b", "a.jsonl:3")]
    assert len(reading(path, max_rows=1).rows) == 1
    joined = write("b.jsonl", '\ufeff\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n')
    assert fields(joined) == [{"text": "a"}, {"text": "b"}]


def test_text_is_one_document_unless_asked_otherwise(write: Write) -> None:
    path = write("notes.txt", "\r\none\r\ntwo\r\n \r\n\r\nthree\r\n")
    assert [(row.fields, row.source) for row in reading(path).rows] == [({"text": "one\ntwo\n \n\nthree"}, "notes.txt")]
    paragraphs = reading(path, "paragraph").rows
    assert [(row.fields["text"], row.source) for row in paragraphs] == [
        ("one\ntwo", "notes.txt:2"),
        ("three", "notes.txt:6"),
    ]
    lines = reading(path, "line").rows
    assert [(row.fields["text"], row.source) for row in lines] == [
        ("one", "notes.txt:2"),
        ("two", "notes.txt:3"),
        ("three", "notes.txt:6"),
    ]
    last = reading(write("b.txt", "one\n\ntwo\nthree"), "paragraph").rows
    assert [(row.fields["text"], row.source) for row in last] == [("one", "b.txt:1"), ("two\nthree", "b.txt:3")]


def test_missing_files_and_near_names(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", "{}")
    refused(str(tmp_path / "trian.jsonl"), "does not exist", f"did you mean '{tmp_path / 'train.jsonl'}'")
    refused(str(tmp_path / "no" / "train.jsonl"), "nor does its folder")
    for name in ("a.xls", "a.XLSB", "a.ods", "a.numbers"):
        refused(write(name, "x"), "ends in '.", "save its sheet as CSV", ".jsonl")
    for name, told in (
        ("a.docx", "save it as .txt in UTF-8"),
        ("a.rtf", "save it as .txt"),
        ("a.pdf", "take its text"),
    ):
        refused(write(name, "x"), told)
    for address in ("https://docs.google.com/spreadsheets/d/1/edit#gid=0", "s3://bucket/rows.jsonl"):
        refused(address, "is an address on the web", "download it, a sheet as CSV")
    refused("data/rows.ods", "does not exist")  # and is not looked for on the Hub
    refused(write("a.parquet.gz", "x"), "packed inside already")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "holds no data file")


def test_empty_files(write: Write) -> None:
    refused(write("a.jsonl", ""), "is empty", "at least one row")
    refused(write("b.jsonl", " \n\n"), "is empty")
    refused(write("c.json", "[]"), "holds no rows")
    refused(write("d.csv", "prompt,completion\n"), "holds no rows")
    refused(write("e.csv", b"\xef\xbb\xbf"), "is empty")
    refused(write("f.txt", "\n\n"), "is empty")
    refused(write("g.csv", "sep=;\n"), "names no column")


# JSON


def test_json_list_object_with_one_list_and_lines(write: Write) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    assert [row.source for row in reading(write("a.json", json.dumps(rows, indent=1))).rows] == [
        "a.json[0]",
        "a.json[1]",
    ]
    assert fields(write("b.json", json.dumps({"version": 1, "notes": ["x"], "data": rows}))) == rows
    assert fields(write("c.json", json.dumps({"notes": ["x", "y"], "version": 1, "data": rows}))) == rows
    assert [row.source for row in reading(write("d.json", "\n".join(map(json.dumps, rows)))).rows] == [
        "d.json:1",
        "d.json:2",
    ]
    assert fields(write("e.json", '{"text": "a"}')) == [{"text": "a"}]
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert fields(write("f.json", json.dumps(chat))) == [chat]


PAIRS = [{"prompt": "hi", "completion": "hello"}, {"prompt": "bye", "completion": "ciao"}]


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": {"0": "hi", "1": "bye"}, "completion": {"0": "hello", "1": "ciao"}},  # pandas' to_json()
        {"0": PAIRS[0], "1": PAIRS[1]},  # orient="index"
        {"prompt": ["hi", "bye"], "completion": ["hello", "ciao"]},  # orient="list"
        {"columns": ["prompt", "completion"], "index": [0, 1], "data": [["hi", "hello"], ["bye", "ciao"]]},  # "split"
        {"schema": {"fields": []}, "data": PAIRS},  # "table"
        {"data": PAIRS},
    ],
)
def test_json_as_pandas_writes_it(write: Write, value: Any) -> None:
    assert fields(write("a.json", json.dumps(value))) == PAIRS


def test_json_columns_of_lists_are_rows(write: Write) -> None:
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    assert fields(write("a.json", json.dumps({"messages": chats, "id": [1, 2]}))) == [
        {"messages": chats[0], "id": 1},
        {"messages": chats[1], "id": 2},
    ]


def test_json_that_could_be_rows_or_columns_is_refused(write: Write) -> None:
    refused(write("a.json", json.dumps({"x1": PAIRS[0], "x2": PAIRS[1]})), "by their ids or columns", "list of objects")


def test_nan_is_no_value(write: Write) -> None:
    assert fields(write("a.json", '[{"instruction": "x", "input": NaN, "output": -Infinity}]')) == [
        {"instruction": "x", "input": None, "output": None}
    ]
    assert fields(write("c.jsonl", '{"a": 1e999, "b": 1e3}')) == [{"a": None, "b": 1000.0}]
    assert fields(write("b.jsonl", '{"a": NaN, "b": [1, NaN], "c": "NaN"}')) == [
        {"a": None, "b": [1, None], "c": "NaN"}
    ]


def test_a_json_of_several_splits(write: Write) -> None:
    path = write("a.json", json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}]}))
    refused(path, "2 lists of rows (train, test)", "split: train")
    assert fields(path, split="train") == [{"text": "a"}]
    refused(path, "has no list 'tran'; did you mean 'train'?", split="tran")
    only = reading(write("b.json", json.dumps({"test": [{"text": "b"}]})))
    assert only.notes == ("b.json: its list 'test' is read",)


def test_objects_over_several_lines_and_lists_in_jsonl(write: Write) -> None:
    several = reading(
        write("g.jsonl", '{"prompt": "hi",\n "completion": "hello"}\n{"prompt": "bye",\n "completion": "ciao"}\n')
    )
    assert [(row.fields, row.source) for row in several.rows] == [(PAIRS[0], "g.jsonl:1"), (PAIRS[1], "g.jsonl:3")]
    pretty = "\n\n".join(json.dumps(row, indent=2) for row in PAIRS)
    assert fields(write("h.jsonl", pretty)) == PAIRS
    assert fields(write("i.jsonl", json.dumps(PAIRS[0]) + "\n" + pretty)) == [PAIRS[0], *PAIRS]
    assert fields(write("j.jsonl", json.dumps(PAIRS))) == PAIRS
    assert [row.source for row in reading(write("k.jsonl", json.dumps(PAIRS, indent=1))).rows] == [
        "k.jsonl[0]",
        "k.jsonl[1]",
    ]
    assert fields(write("l.jsonl", '{"prompt": "hi", "completion":\n"hello"}')) == PAIRS[:1]


def test_malformed_json_names_line_column_and_text(write: Write) -> None:
    good = '{"text": "a"}'
    refused(write("a.jsonl", f'{good}\n{good}\n{{"text": "b" "c"}}\n'), "line 3, column 14", "malformed JSON", '"c"')
    refused(write("b.jsonl", f"{good}\n[1, 2]\n"), "line 2", "expected one JSON object per line", "list")
    refused(write("c.jsonl", f'{good}\n{{"text": "a"\n{good}\n'), "line 2, column 13", "malformed JSON")
    refused(write("d.json", '[\n {"text": "a"},\n {"text": }\n]'), "line 3, column 11", "malformed JSON")
    refused(write("e.json", '["a"]'), "expected an object, found str")
    refused(write("f.json", '{"a": [{}], "b": [{}]}'), "2 lists of rows")
    refused(write("g.json", "3"), "found int")
    refused(write("h.jsonl", '[{"role": "user"}]\n[{"role": "user"}]\n'), "found list", '{"messages": [...]}')


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("{'prompt': 'hi'}", "write rows with json.dumps"),
        ('{"prompt": None}', "None is Python's"),
        ('{"prompt": "hi", "ok": True}', "True is Python's"),
        ('{"prompt": "hi",}', "no comma before }"),
        ('{"prompt": "hi"},', "no comma after it"),
        ('{"prompt": "hi"} // said', "no comments"),
        ('# rows\n{"prompt": "hi"}', "no comments"),
        ('{"prompt": "hi"}{"prompt": "bye"}', "on a line of its own"),
        ('{"prompt": "h\ni"}', r"a line break in a text is written \n"),
        ('{"prompt": "h\ti"}', r"is written \t"),
        ("{“prompt”: “hi”}", "straight quotes"),
    ],
)
def test_what_people_write_in_place_of_json(write: Write, text: str, hint: str) -> None:
    refused(write("a.jsonl", text), "line 1", "malformed JSON", hint)


def test_trailing_commas_in_a_json_list(write: Write) -> None:
    refused(write("a.json", '[{"a": 1},\n{"a": 2},\n]'), "line 3, column 1", "no comma before ]")
    refused(write("c.json", '[{"a": 1}\n{"a": 2}]'), "line 2, column 1", "a comma is missing before it")
    refused(write("b.json", '[{"a": 1},\n // more\n{"a": 2}]'), "line 2", "no comments")


def test_json_nested_three_thousand_deep_is_one_line(write: Write) -> None:
    deep = '{"a": ' * 3000 + "1" + "}" * 3000
    refused(write("a.jsonl", f'{{"text": "a"}}\n{deep}\n'), "a.jsonl, line 2", "nested deeper")
    refused(write("b.json", f"[{deep}]"), "nested deeper")
    refused(write("c.jsonl", '{"x": 1,\n "y": ' + "[" * 3000 + "]" * 3000 + "}\n"), "line 1", "nested deeper")


# CSV


def test_csv_with_bom_semicolons_quotes_and_line_breaks(write: Write) -> None:
    path = write("a.csv", '\ufeffprompt;completion\r\n"Hi; there";"two\nlines, ""quoted"""\r\n\r\nb;c\r\n')
    rows = reading(path).rows
    assert rows[0].fields == {"prompt": "Hi; there", "completion": 'two\nlines, "quoted"'}
    assert [row.source for row in rows] == ["a.csv:2", "a.csv:5"]
    assert fields(write("a.tsv", "prompt\tcompletion\na, b\tc\n")) == [{"prompt": "a, b", "completion": "c"}]
    assert fields(write("b.csv", 'prompt,completion\n"a;b","c;d;e"\n')) == [{"prompt": "a;b", "completion": "c;d;e"}]
    quotes = 'prompt\tcompletion\n"Hello," he said\tfoo "bar"\nx\t"y"\n'
    assert fields(write("b.tsv", quotes)) == [
        {"prompt": '"Hello," he said', "completion": 'foo "bar"'},
        {"prompt": "x", "completion": '"y"'},
    ]
    assert fields(write("c.tsv", 'prompt\tcompletion\n"a\nb"\t"c\td"\n')) == [{"prompt": "a\nb", "completion": "c\td"}]
    assert fields(write("c.csv", "prompt,completion\rhi,hello\rbye,ciao\r")) == PAIRS


def test_blank_cells_stay_empty_text(write: Write) -> None:
    path = write("a.csv", "instruction;input;output\r\nSay hi;;hi\r\nSay NA;;NA\r\nSay null;;null\r\n")
    assert fields(path) == [
        {"instruction": "Say hi", "input": "", "output": "hi"},
        {"instruction": "Say NA", "input": "", "output": "NA"},
        {"instruction": "Say null", "input": "", "output": "null"},
    ]


@pytest.mark.parametrize("comma", "，；、؛،")
def test_a_comma_of_another_script_separates_nothing(write: Write, comma: str) -> None:
    said = f"'问题{comma}答案', is one name; if {comma!r} parts several, write , or ; or a tab in its place"
    refused(write("a.csv", f"问题{comma}答案\n你好{comma}再见\n"), said)
    named = fields(write("b.csv", f"text,label{comma}x\na{comma}b,c\n"))
    assert named == [{"text": f"a{comma}b", f"label{comma}x": "c"}]


def test_a_csv_cell_may_be_as_long_as_it_likes(write: Write) -> None:
    long = "long words, " * 20_000
    assert fields(write("b.csv", f'prompt,completion\nshort,yes\n"{long}",no\n')) == [
        {"prompt": "short", "completion": "yes"},
        {"prompt": long, "completion": "no"},
    ]


def test_spaces_after_separators_are_no_part_of_names_and_cells(write: Write) -> None:
    spaced = reading(write("f.csv", 'prompt, completion\nhi, hello\nbye, "ciao, bella"\n'))
    assert [row.fields for row in spaced.rows] == [PAIRS[0], {"prompt": "bye", "completion": "ciao, bella"}]
    assert spaced.notes == ("f.csv: the spaces after its separators are left out",)
    names = fields(write("g.csv", "prompt ; completion\nhi;hello\nbye; ciao\n"))
    assert names == [PAIRS[0], {"prompt": "bye", "completion": " ciao"}]
    wanted = fields(write("h.csv", "prompt,completion\nhi, hello\nbye, ciao\n"))  # the space is the answer's
    assert wanted == [{"prompt": "hi", "completion": " hello"}, {"prompt": "bye", "completion": " ciao"}]


def test_what_spreadsheets_leave_behind(write: Write) -> None:
    text = "prompt,completion,,\nhi,hello,,\n,,,\nbye,ciao,,\n,,,\n"
    assert fields(write("a.csv", text)) == PAIRS
    assert fields(write("b.csv", "prompt,completion\nhi,hello,,\nbye,ciao,,\n")) == PAIRS
    refused(write("c.csv", "prompt,completion,,\nhi,hello,,\nbye,ciao,really,\n"), "line 3", "'really'", "no name")
    assert fields(write("e.csv", "sep=;\r\nprompt;completion\r\nhi;hello\r\n")) == PAIRS[:1]
    refused(write("f.csv", ",prompt,,completion\n0,hi,odd,hello\n"), "line 2", "'odd' stands in column 3")
    index = reading(write("d.csv", ",prompt,completion\n0,hi,hello\n1,bye,ciao\n"))  # pandas' to_csv
    assert [row.fields for row in index.rows] == PAIRS
    assert index.notes == ("d.csv: its first column, which has no name, is not read",)


@pytest.mark.parametrize(
    "first", ["Say hi to me please now,hi", "What is 2+2?,four", "12,13", f"hi,{'long ' * 20}", '"two\nlines",x']
)
def test_a_first_line_that_looks_like_a_row_is_told(write: Write, first: str) -> None:
    found = reading(write("a.csv", f"{first}\na,b\n"))
    assert any("taken for the names of the columns" in note for note in found.notes)
    assert not reading(write("b.csv", "prompt_text,model answer\na,b\n")).notes


def test_csv_rows_of_another_width(write: Write) -> None:
    refused(write("a.csv", "prompt,completion\na,b\nc,d,e\n"), "line 3", "3 cells where the header has 2", "quotes")
    refused(write("b.csv", "prompt,completion\na,b\nc\n"), "line 3", "1 cells where the header has 2")
    refused(write("c.csv", 'prompt,completion\na,b\n"c,d\n'), "line 3", "malformed CSV", "never closed")
    refused(write("d.csv", "prompt,prompt\na,b\n"), "names 'prompt' twice")
    refused(write("e.csv", 'prompt,completion\n"say \\"hi\\"",b\n'), "line 2", "twice", "not with a backslash")


# Encodings


def test_wrong_encoding_names_byte_and_line(write: Write) -> None:
    latin = '{"text": "a"}\n{"text": "café"}\n'.encode("cp1252")
    refused(write("a.jsonl", latin), "not UTF-8", "byte 0xe9 at offset 27", "line 2", "café", "data.encoding: cp1252")
    assert fields(write("b.jsonl", latin), encoding="cp1252") == [{"text": "a"}, {"text": "café"}]


LANGUAGES = [
    ("gb18030", "prompt,completion\n你好,您好\n", "你好,您好"),
    ("gb18030", "prompt,completion\n苹果是什么,一种水果\n", "苹果是什么,一种水果"),
    ("shift_jis", "prompt,completion\nこんにちは,元気ですか\n", "こんにちは,元気ですか"),
    ("euc_jp", "prompt,completion\n私は学生です,はい\n", "私は学生です,はい"),
    ("big5", "prompt,completion\n你好嗎,我很好\n", "你好嗎,我很好"),
    ("euc_kr", "prompt,completion\n안녕하세요,감사합니다\n", "안녕하세요,감사합니다"),
    ("cp1251", "prompt,completion\nда,нет\n", "да,нет"),
    ("koi8-r", "prompt,completion\nПривет,Пока\n", "Привет,Пока"),
    ("cp866", "prompt,completion\nПривет,Пока\n", "Привет,Пока"),
    ("cp1252", "prompt,completion\nGrüße,à bientôt\n", "Grüße,à bientôt"),
    ("cp1252", "prompt,completion\nhow much?,5 € – it’s cheap\n", "how much?,5 € – it’s cheap"),
    ("cp1252", "prompt,completion\nhow much?,€5\n", "how much?,€5"),
    ("cp1250", "prompt,completion\ndzień dobry,cześć świecie\n", "dzień dobry,cześć świecie"),
    ("cp1253", "prompt,completion\nκαλημέρα,γεια σου\n", "καλημέρα,γεια σου"),
    ("cp1254", "prompt,completion\nşimdi,ağır ışık\n", "şimdi,ağır ışık"),
    ("cp1256", "prompt,completion\nمرحبا,شكرا\n", "مرحبا,شكرا"),
    ("cp874", "prompt,completion\nสวัสดีครับ,ขอบคุณ\n", "สวัสดีครับ,ขอบคุณ"),
]


@pytest.mark.parametrize(("encoding", "text", "line"), LANGUAGES)
def test_the_advice_on_an_encoding_is_right_when_followed(write: Write, encoding: str, text: str, line: str) -> None:
    path = write("a.csv", text.encode(encoding))
    told = refused(path, "not UTF-8", "line 2", f"In {encoding} it reads {line!r}", f"data.encoding: {encoding}")
    assert "iconv" not in told
    prompt, completion = line.split(",")
    assert fields(path, encoding=encoding) == [{"prompt": prompt, "completion": completion}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_byte_order_marks(write: Write, encoding: str) -> None:
    found = reading(write("c.csv", "prompt,completion\nhi,hello\n".encode(encoding)))
    assert [row.fields for row in found.rows] == PAIRS[:1]
    marked = (f"c.csv: read as {encoding.upper()}, as its byte order mark says",)
    assert found.notes == (() if encoding == "utf-8-sig" else marked)
    assert fields(write("d.jsonl", '{"text": "é"}\n'.encode(encoding))) == [{"text": "é"}]
    assert fields(write("e.txt", "é\n".encode(encoding))) == [{"text": "é"}]


def test_wide_text_without_a_mark_and_cut_off(write: Write) -> None:
    wide = "prompt,completion\nhi,hello\n".encode("utf-16-le")
    path = write("a.csv", wide)
    refused(path, "NUL byte at offset 1, line 1", "data.encoding: utf-16-le")
    assert fields(path, encoding="utf-16-le") == PAIRS[:1]
    refused(write("b.csv", "prompt,completion\nhi,hello\n".encode("utf-16")[:-1]), "ends in the middle of a character")


def test_nul_bytes_halves_of_surrogates_and_cut_off_files(write: Write) -> None:
    refused(write("a.jsonl", b'{"text": "a"}\n{"text": "b\0"}\n'), "NUL byte at offset 25, line 2", "damaged")
    refused(
        write("b.jsonl", b'{"text": "a"}\n{"text": "\xed\xa0\xbd"}\n'), "byte 0xed at offset 24, line 2", "surrogate"
    )
    cut = ('{"text": "café"}\n' * 3).encode()[:-4]
    refused(write("c.jsonl", cut), "ends in the middle of a character", "line 3", "cut off")
    mixed = "".join(f'{{"text": "né {n}"}}\n' for n in range(5)).encode() + '{"text": "café"}\n'.encode("cp1252")
    told = refused(write("d.jsonl", mixed), "UTF-8 but for 1 line", "line 6", "café", "would damage the others")
    assert "Say data.encoding" not in told


def test_data_encoding_is_for_files_that_are_not_utf8(write: Write) -> None:
    path = write("a.jsonl", '{"text": "привет"}\n')
    found = reading(path, encoding="cp1251")
    assert [row.fields for row in found.rows] == [{"text": "привет"}]
    assert found.notes == ("a.jsonl: it is UTF-8 and read so; data.encoding (cp1251) is for files that are not",)
    assert not reading(write("b.jsonl", '{"text": "plain"}\n'), encoding="cp1251").notes
    refused(path, "'gb1830', which is no encoding; did you mean 'gb18030'", encoding="gb1830")
    refused(path, "'shift-jiss', which is no encoding; did you mean 'shift_jis'", encoding="shift-jiss")
    refused(path, "no encoding of text", encoding="base64")
    gbk = write("c.jsonl", '{"text": "今天天气很好"}\n'.encode("gb18030"))
    refused(
        gbk,
        "is not shift_jis, as data.encoding says",
        "line 1",
        "In gb18030 it reads",
        "今天天气很好",
        encoding="shift_jis",
    )


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html></html>", "a web page"),
        (b"PK\x03\x04 ", "Excel sheet"),
        (b"PAR1 ", "a parquet file"),
        (b"\x1f\x8b\x08 ", "packed with gzip; name it so: a.jsonl.gz"),
    ],
)
def test_a_file_of_another_kind_under_this_name(write: Write, head: bytes, word: str) -> None:
    refused(write("a.jsonl", head), word)


def test_japanese_mail_encoding_is_not_read_as_ascii(write: Write) -> None:
    path = write("a.jsonl", '{"text": "東京"}\n'.encode("iso2022_jp"))
    refused(path, "data.encoding: iso2022_jp")
    assert fields(path, encoding="iso2022_jp") == [{"text": "東京"}]


def test_a_key_that_stands_twice_with_two_values_is_refused(write: Write) -> None:
    twice = '{"prompt": "q", "completion": "a", "completion": "b"}'
    said = "an object has the key 'completion' twice, with different values"
    refused(write("a.jsonl", '{"prompt": "q", "completion": "a"}\n' + twice + "\n"), "a.jsonl, line 2: ", said)
    refused(write("b.json", f"[{twice}]"), "b.json: ", said)
    refused(write("c.jsonl", twice.replace(", ", ",\n")), said)
    assert fields(write("d.jsonl", '{"text": "a", "text": "a"}\n')) == [{"text": "a"}]
