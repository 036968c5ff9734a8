"""Rows that stay on disk: the same steps as without streaming, read by their place, and nothing of them is held."""

import bz2
import csv
import gc
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topwork.common.errors import DataError, RunError
from topwork.data.config import DataConfig
from topwork.data.conversations import Conversation
from topwork.data.examples import Data, Example, load_data
from topwork.data.files import rows
from topwork.data.files.rows import Row
from topwork.data.source import StreamedRows, rows_of
from topwork.data.splitting import is_first, permuted, unit_numbers
from topwork.data.streaming import plain
from topwork.data.streaming.copies import copied_rows
from topwork.data.streaming.examples import StreamedExamples
from topwork.data.streaming.index import FileRows

Step = list[tuple[str, list[int], list[float]]]
COUNT = 45
PAIRS = [
    {"prompt": f'Nr. {n}: "ä, 日本\t"\n' + "more " * (n % 7) + "?", "completion": f"Answer;\r\n {n} 🦊"}
    for n in range(COUNT)
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """write(name, content): a file, whose name may have folders, and its path."""

    def to(name: str, made: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(made if isinstance(made, bytes) else made.encode("utf-8"))
        return str(path)

    return to


@pytest.fixture
def load(make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Data]:
    """load(path, family="smollm2", **options): the data; copies go to the test's folder."""
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "cache"))

    def read(train: Any, family: str = "smollm2", log: Callable[[str], None] = lambda _: None, **options: Any) -> Data:
        config = DataConfig.model_validate({"train": train, "eval_fraction": 0.1, **options})
        return load_data(config, make_tokenizer(family), 512, 5, log)

    return read


def content(rows: list[Example]) -> Step:
    return [(row.source, row.tokens.tolist(), row.weights.tolist()) for row in rows]


def steps(data: Data, first: int = 0) -> list[Step]:
    """The rows of all steps from `first` to the middle of the third epoch."""
    source = rows_of(data.train, 4, 5)
    last = 2 * source.steps_per_epoch + source.steps_per_epoch // 2
    return [content(list(source.examples(step))) for step in range(first, last)]


def jsonl(rows: list[dict[str, Any]], between: str = "\n") -> str:
    return between.join(json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows))


def table(rows: list[dict[str, Any]], **options: Any) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=20)
    return file.getvalue()


def zstd(text: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(text))


CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in PAIRS
]
FILES: dict[str, tuple[str, str | bytes]] = {
    "lines": ("rows.jsonl", jsonl(PAIRS) + "\n"),
    "lines with a mark, blank ones and no end": ("rows.ndjson", "\ufeff\n" + jsonl(PAIRS, "\r\n  \r\n")),
    "lines under .json": ("rows.json", jsonl(PAIRS)),
    "a list": ("rows.json", json.dumps(PAIRS)),
    "a list for people": ("rows.json", json.dumps(PAIRS, indent=2, ensure_ascii=False) + "\n"),
    "an object that holds a list": ("rows.json", json.dumps({"rows": PAIRS})),
    "columns": ("rows.json", json.dumps({name: [row[name] for row in PAIRS] for name in PAIRS[0]})),
    "messages": ("rows.jsonl", jsonl(CHATS)),
    "cells": ("rows.csv", table(PAIRS)),
    "cells all quoted, with a mark": ("rows.csv", "\ufeff" + table(PAIRS, quoting=csv.QUOTE_ALL, lineterminator="\n")),
    "semicolons": ("rows.csv", table(PAIRS, delimiter=";") + "\r\n\r\n"),
    "tabs": ("rows.tsv", table(PAIRS, delimiter="\t")),
    "parquet": ("rows.parquet", parquet(PAIRS)),
    "paragraphs": ("rows.txt", "\n\n\n".join(f"Text {n} ä  \n\tof two lines " for n in range(COUNT)) + "\n \n"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_streamed_file_gives_the_steps_that_it_gives_without(
    name: str, load: Callable[..., Data], write: Callable[[str, str | bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "_PIECE", 61)  # rows and letters lie across the pieces that are read
    path = write(*FILES[name])
    options = {"documents": "paragraph"} if name == "paragraphs" else {}
    held, streamed = load(path, **options), load(path, streaming=True, **options)
    assert isinstance(streamed.train, StreamedExamples)
    assert isinstance(rows_of(streamed.train, 4, 5), StreamedRows)
    assert steps(streamed) == steps(held)
    assert steps(streamed, first=7) == steps(held)[7:]  # where a run goes on
    assert content(list(streamed.eval)) == content(list(held.eval))
    assert streamed.eval_conversations == held.eval_conversations
    assert content(list(streamed.train)) == content(list(held.train))
    assert content(streamed.train[3:5]) == content(list(held.train[3:5]))
    assert content([streamed.train[-1]]) == content([held.train[-1]])
    assert len(streamed.train) == len(held.train) == COUNT - len(held.eval)
    assert streamed.summary.recognised == held.summary.recognised
    assert streamed.longest(3) == 512 + 3  # nobody has counted


@pytest.mark.parametrize("documents", ["file", "line"])
def test_documents_of_text_are_what_they_are_without(
    documents: str, load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    path = write("notes.txt", "One line.\r\n\r\n  Another, indented. \n\nThe last\n\n")
    options = {"documents": documents, "eval_fraction": 0}
    assert steps(load(path, streaming=True, **options)) == steps(load(path, **options))


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_rows_that_have_no_place_of_their_own_are_copied_once(
    suffix: str, pack: Callable[[bytes], bytes], load: Callable[..., Data], write: Callable[[str, str | bytes], str],
    tmp_path: Path,
) -> None:  # fmt: skip
    packed, said = write(f"rows.jsonl{suffix}", pack(jsonl(PAIRS).encode())), list[str]()
    assert steps(load(packed, streaming=True, log=said.append)) == steps(load(packed))
    (copy,) = (tmp_path / "cache").rglob("rows.jsonl")
    lines = copy.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [[f"rows.jsonl{suffix}:{n}", row] for n, row in enumerate(PAIRS, 1)]
    assert sum(str(copy) in line for line in said) == 1
    before = copy.stat()
    load(packed, streaming=True, log=said.append)
    assert copy.stat().st_mtime_ns == before.st_mtime_ns
    assert sum(str(copy) in line for line in said) == 1
    load(packed, streaming=True, max_rows=3)
    write(f"rows.jsonl{suffix}", pack(jsonl(PAIRS[:9]).encode()))
    load(packed, streaming=True)
    assert len(list((tmp_path / "cache").rglob("rows.jsonl"))) == 3


def test_data_sets_of_the_hub_and_saved_ones_are_copied_once(
    load: Callable[..., Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    made = datasets.Dataset.from_list(PAIRS)
    made.save_to_disk(tmp_path / "saved")
    asked: list[str] = []

    def from_hub(name: str, config: str | None, split: str) -> Any:
        asked.append(f"{name} {config} {split}")
        return made

    monkeypatch.setattr(rows, "ask_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    for name in (str(tmp_path / "saved"), "owner/name:config"):
        said: list[list[str]] = [[], []]
        held, streamed = load(name, log=said[0].append), load(name, streaming=True, log=said[1].append)
        assert steps(streamed) == steps(held)
        copied = [line for line in said[1] if "streamed from a copy" in line]
        assert len(copied) == 1
        assert [line for line in said[1] if line not in copied and not line.startswith("train")] == [
            line for line in said[0] if not line.startswith("train")
        ]
        load(name, streaming=True, log=said[1].append)
        assert len([line for line in said[1] if "streamed from a copy" in line]) == 1
    assert asked == ["owner/name config train"] * 3


def test_folders_lists_and_limits(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str], tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, name in enumerate(("a.jsonl", "b.csv", "c.parquet")):
        rows = PAIRS[number * 15 : number * 15 + 15]
        made: str | bytes = {"a.jsonl": jsonl, "b.csv": table, "c.parquet": parquet}[name](rows)
        (folder / name).write_bytes(made if isinstance(made, bytes) else made.encode())
    other = write("chats.jsonl", jsonl(CHATS))
    for train in (str(folder), [str(folder), {"path": other, "max_rows": 7}]):
        for limit in (None, 17, 30, 49):
            held, streamed = load(train, max_rows=limit), load(train, max_rows=limit, streaming=True)
            assert steps(streamed) == steps(held), (train, limit)
            assert content(list(streamed.eval)) == content(list(held.eval)), (train, limit)


def test_rows_held_apart_are_streamed_too(load: Callable[..., Data], write: Callable[[str, str | bytes], str]) -> None:
    train, apart = write("train.jsonl", jsonl(PAIRS[:30])), write("eval.csv", table(PAIRS[30:]))
    held, streamed = load(train, eval=apart), load(train, eval=apart, streaming=True)
    assert content(list(streamed.eval)) == content(list(held.eval))
    assert steps(streamed) == steps(held)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(0, 9))
def test_units_and_orders_take_little_memory_and_are_what_they_were(keys: list[int], seed: int) -> None:
    numbers: dict[int, int] = {}
    told = [numbers.setdefault(key, len(numbers)) for key in keys]
    assert unit_numbers(np.array(keys)).tolist() == told
    assert is_first(np.array(keys)).tolist() == [key not in keys[:at] for at, key in enumerate(keys)]
    assert permuted(len(keys), seed).tolist() == np.random.default_rng(seed).permutation(len(keys)).tolist()
    assert permuted(len(keys), seed).itemsize == 4


def test_no_more_than_so_many_rows_are_held_to_validate_on(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topwork.data.streaming.examples.EVAL_ROWS", 4)
    path, said = write("rows.jsonl", jsonl(PAIRS)), list[str]()
    held = load(path, eval_fraction=0.5)
    streamed = load(path, eval_fraction=0.5, streaming=True, log=said.append)
    assert len(streamed.eval) == 4
    apart = {row.source for row in held.eval}
    assert {row.source for row in streamed.eval} < apart
    assert not apart & {row.source for row in streamed.train}
    assert "4 of 22 rows that are held out are validated on, drawn by seed" in said, said


def test_only_a_steps_rows_are_read_and_none_is_held(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps(row) + "\n" for row in PAIRS]
    data = load(write("nowhere.jsonl", "".join(lines)), eval_fraction=0, streaming=True)
    source, read, pread = rows_of(data.train, 4, 5), list[tuple[int, int]](), os.pread

    def watched(handle: int, size: int, offset: int) -> bytes:
        read.append((size, offset))
        return pread(handle, size, offset)

    monkeypatch.setattr(os, "pread", watched)
    sources = [row.source for row in source.examples(3)]
    numbers = [int(source.rpartition(":")[2]) - 1 for source in sources]
    assert read == [(len(lines[n].encode()), sum(len(line.encode()) for line in lines[:n])) for n in numbers]
    del source
    gc.collect()
    alive = [each for each in gc.get_objects() if type(each) in (Row, Conversation, Example)]
    held = [type(each) for each in alive if each.source.startswith("nowhere.jsonl")]
    assert held == [Conversation]  # one, for the system message that all have, which is none
    (rows,) = data.train.read.parts[0].rows.parts  # type: ignore[attr-defined]
    assert rows.where.starts.itemsize == 8
    assert data.train.numbers.itemsize == 4  # type: ignore[attr-defined]


def test_what_can_only_be_found_by_rendering_makes_its_step_smaller_and_changes_no_other(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    rows = [dict(row) for row in PAIRS]
    for number in (3, 20, 21):
        rows[number]["prompt"] *= 40
    held = load(write("rows.jsonl", jsonl(PAIRS)), eval_fraction=0)
    streamed = load(write("rows.jsonl", jsonl(rows)), eval_fraction=0, streaming=True, too_long="drop")
    gone = {"rows.jsonl:4", "rows.jsonl:21", "rows.jsonl:22"}
    assert steps(streamed) == [[row for row in step if row[0] not in gone] for step in steps(held)]
    source = rows_of(streamed.train, 4, 5)
    assert isinstance(source, StreamedRows)
    for step in range(source.steps_per_epoch):
        source.examples(step)
    assert (source.read.counts.rows, source.read.counts.long_dropped, source.read.counts.sequences) == (45, 3, 42)
    told = source.read.told()
    assert told[0].startswith("train, as far as it was streamed: 45 rows -> 42 sequences, 3 too long and dropped; ")
    assert re.fullmatch(r"3 rows: longer than 512 tokens, and dropped \(rows.jsonl:\d+, .*\)", told[1])
    again = rows_of(streamed.train, 4, 5)
    again.restore(json.loads(json.dumps(source.state())))
    assert again.state() == source.state()


def test_a_step_of_which_nothing_is_left_takes_the_next(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    rows = [dict(row) for row in PAIRS[:6]]
    rows[2]["prompt"] *= 40
    streamed = load(write("rows.jsonl", jsonl(rows)), eval_fraction=0, streaming=True, too_long="drop")
    source = rows_of(streamed.train, 1, 5)
    seen = [[row.source for row in source.examples(step)] for step in range(7)]
    whole = rows_of(load(write("b/rows.jsonl", jsonl(PAIRS[:6])), eval_fraction=0).train, 1, 5)
    order = [[row.source for row in whole.examples(step)] for step in range(9)]
    assert seen == [next(step for step in order[at:] if step != ["rows.jsonl:3"]) for at in range(7)]


def test_a_row_that_is_refused_stops_the_step_that_needs_it(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    rows = [dict(row) for row in PAIRS]
    rows[20]["prompt"] *= 40
    streamed = load(write("rows.jsonl", jsonl(rows)), eval_fraction=0, streaming=True)
    source = rows_of(streamed.train, 4, 5)
    order = steps(load(write("plain.jsonl", jsonl(PAIRS)), eval_fraction=0))
    bad = next(number for number, step in enumerate(order) if "plain.jsonl:21" in [source for source, _, _ in step])
    for step in range(bad):
        source.examples(step)
    with pytest.raises(
        RunError, match=rf"step {bad + 1}: .*rows.jsonl:21(?s:.)*The checkpoints before it stay: go on with --resume"
    ):
        source.examples(bad)


def test_a_row_that_the_template_refuses_stops_or_is_dropped(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    template = write(
        "own.jinja",
        "{% for m in messages %}{% if 'Nr. 7:' in m.content %}{{ raise_exception('no seven') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    path, options = (
        write("rows.jsonl", jsonl(PAIRS)),
        {"chat_template": template, "eval_fraction": 0, "streaming": True},
    )
    refusing = rows_of(load(path, **options).train, 45, 5)
    with pytest.raises(
        RunError, match=r"(?s)step 1: 1 of 45 rows cannot be used:.*rows\.jsonl:8: .*no seven.*--resume"
    ):
        refusing.examples(0)
    dropping = rows_of(load(path, on_bad_row="drop", **options).train, 45, 5)
    assert sorted(row.source for row in dropping.examples(0)) == sorted(
        f"rows.jsonl:{n}" for n in range(1, 46) if n != 8
    )
    assert isinstance(dropping, StreamedRows)
    assert "45 rows -> 44 sequences, 1 bad rows dropped; " in dropping.read.told()[0]
    assert re.search(r"^1 row dropped: .*no seven.* \(rows\.jsonl:8\)$", dropping.read.told()[1])


def test_two_that_make_the_same_copy_at_once_both_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    others = []

    def made(by_another: bool) -> FileRows:
        def rows() -> Iterator[Row]:
            if by_another:
                others.append(made(False))
            yield from (Row(row, f"rows:{n}") for n, row in enumerate(PAIRS))

        return copied_rows("rows", rows, [], None, (), "key", lambda _: None)

    for copy in (made(True), *others):
        copy.check_unchanged()
        assert [row.fields for row in copy] == PAIRS
    assert len(others) == 1
    assert sorted(path.name for path in tmp_path.rglob("*.json*")) == ["notes.json", "rows.jsonl"]


def test_a_file_that_changes_is_an_error(load: Callable[..., Data], write: Callable[[str, str | bytes], str]) -> None:
    path = write("rows.jsonl", jsonl(PAIRS))
    source = rows_of(load(path, streaming=True).train, 4, 5)
    source.examples(0)
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(PAIRS[0]))
    with pytest.raises(RunError, match=r"rows\.jsonl changed while its rows were being streamed.*begin anew"):
        source.examples(1)
    os.unlink(path)
    with pytest.raises(RunError, match="changed while"):
        source.examples(1)


def test_answers_that_need_sequences_of_their_own_stay_in_one_step(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    turns = [("user", "a?"), ("assistant", "<think>\nhm\n</think>\n\none"), ("user", "b?"), ("assistant", "two")]
    rows = [{"messages": [{"role": role, "content": f"{said} {n}"} for role, said in turns]} for n in range(9)]
    path = write("rows.jsonl", jsonl(rows))
    held = load(path, "qwen3", eval_fraction=0)
    streamed = load(path, "qwen3", eval_fraction=0, streaming=True)
    assert (len(held.train), len(streamed.train)) == (18, 9)
    source = rows_of(streamed.train, 2, 5)
    told = [row.source for row in source.examples(0)]
    assert told == [told[0], told[0], told[2], told[2]]
    assert sorted(content(list(streamed.train))) == sorted(content(list(held.train)))


BAD = jsonl([*PAIRS[:4], {"prompt": "What?", "completion": ""}, *PAIRS[4:], {"prompt": "And?", "completion": None}])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("rows.jsonl", BAD, r"2 of 47 rows cannot be used:\n  rows\.jsonl:5: .*\n  rows\.jsonl:47: "),
        ("rows.jsonl", jsonl(PAIRS) + '\n{"prompt": "x}', r"rows\.jsonl, line 46, column \d+: malformed JSON"),
        ("rows.jsonl", jsonl(PAIRS) + "\n[1]", r"line 46: expected one JSON object per line, found list"),
        ("rows.json", json.dumps(PAIRS)[:-1], r"rows\.json, line 1, column \d+: malformed JSON"),
        ("rows.json", json.dumps([*PAIRS, "x"]), r"rows\.json\[45\]: expected an object, found str"),
        ("rows.json", json.dumps(PAIRS) + "x", r"rows\.json, line 1, column \d+: malformed JSON"),
        ("rows.csv", table(PAIRS) + "alone\r\n", r"rows\.csv, line \d+: 1 cell"),
        ("rows.csv", table(PAIRS) + '"a,b', r"malformed CSV"),
        ("rows.jsonl", "\n \n", "rows.jsonl is empty"),
        ("rows.jsonl", jsonl(PAIRS).replace("more", "m\0re"), "holds a NUL byte at offset"),
        ("rows.jsonl", jsonl(PAIRS).encode("cp1252", "replace"), r"is not UTF-8: byte 0xe4 .*data\.encoding: cp1252"),
        ("rows.jsonl", jsonl([{"x": 1}]), r"the columns? x"),
        ("rows.xls", "PK", r"'\.xls'"),
        ("rows.jsonl.gz", gzip.compress(jsonl(PAIRS).encode())[:-20], "cannot be unpacked"),
    ],
)
def test_what_is_wrong_is_said_as_without_streaming(
    name: str, text: str | bytes, told: str, load: Callable[..., Data], write: Callable[[str, str | bytes], str],
    tmp_path: Path,
) -> None:  # fmt: skip
    path = write(name, text)
    with pytest.raises(DataError, match=told) as streamed:
        load(path, streaming=True)
    with pytest.raises(DataError, match=told) as held:
        load(path)
    assert str(streamed.value) == str(held.value)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]  # no half of a copy


def test_what_does_not_go_with_streaming_is_refused(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("notes.txt", "a\n\nb" * 30)
    with pytest.raises(DataError, match=r"too_long is split, .*data\.documents: paragraph or line"):
        load(path, streaming=True, too_long="split")
    monkeypatch.setattr("topwork.data.streaming.sources._LARGEST_DOCUMENT", 100)
    with pytest.raises(
        DataError, match=r"notes\.txt has 120 bytes and is a single row, .*documents: paragraph or line"
    ):
        load(path, streaming=True)
    assert len(load(path, streaming=True, documents="line", eval_fraction=0).train) == 31


def test_bad_rows_are_dropped_where_the_recipe_says_so(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    path, said = write("rows.jsonl", BAD), list[str]()
    held = load(path, on_bad_row="drop")
    streamed = load(path, on_bad_row="drop", streaming=True, log=said.append)
    assert steps(streamed) == steps(held)
    assert any("2 bad rows dropped" in line for line in said), said
    apart = write("eval.jsonl", BAD)
    held, streamed = (load(path, eval=apart, on_bad_row="drop", streaming=streaming) for streaming in (False, True))
    assert streamed.summary.eval == held.summary.eval
    assert (held.summary.eval.bad_rows, held.summary.eval.rows - held.summary.eval.sequences) == (2, 2)


def test_rows_that_say_the_same_are_told_or_dropped(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    path = write("rows.jsonl", jsonl([*PAIRS[:20], PAIRS[3], *PAIRS[10:30], PAIRS[3]]))
    for way in ("keep", "drop"):
        said: list[list[str]] = [[], []]
        held = load(path, duplicates=way, log=said[0].append)
        streamed = load(path, duplicates=way, streaming=True, log=said[1].append)
        assert steps(streamed) == steps(held)
        assert content(list(streamed.eval)) == content(list(held.eval))
        notes = [[line for line in lines if line.startswith("12 rows")] for lines in said]
        assert [line.replace(", token for token,", "") for line in notes[0]] == notes[1]


@pytest.mark.parametrize("by", ["prompt", "row", "product"])
def test_rows_are_held_out_as_without_streaming(
    by: str, load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    rows = [
        {"prompt": f"How is {n % 17}?", "completion": f"Well {n}", "product": None if n % 9 == 0 else f"p{n % 13}"}
        for n in range(60)
    ]
    path = write("rows.jsonl", jsonl(rows))
    held = load(path, hold_out_by=by, eval_fraction=0.2)
    streamed = load(path, hold_out_by=by, eval_fraction=0.2, streaming=True)
    assert content(list(streamed.eval)) == content(list(held.eval))
    assert steps(streamed) == steps(held)
    told = r"hold_out_by is 'blank', and no row has a value"
    for read in (False, True):
        with pytest.raises(DataError, match=told):
            load(
                write("blank.jsonl", jsonl([{**row, "blank": None} for row in rows])),
                hold_out_by="blank",
                streaming=read,
            )


def test_weights_of_sources_are_kept(load: Callable[..., Data], write: Callable[[str, str | bytes], str]) -> None:
    files = [write(name, jsonl(PAIRS[at : at + 15])) for at, name in ((0, "a.jsonl"), (15, "b.jsonl"), (30, "c.jsonl"))]
    sources = [{"path": path, "weight": weight} for path, weight in zip(files, (2.5, 1, 0.3))]
    said: list[list[str]] = [[], []]
    held, streamed = load(sources, log=said[0].append), load(sources, streaming=True, log=said[1].append)
    assert steps(streamed) == steps(held)
    assert len(streamed.train) == len(held.train)
    assert [line for line in said[1] if "weight" in line] == [line for line in said[0] if "weight" in line]


def test_other_encodings_are_read(load: Callable[..., Data], write: Callable[[str, str | bytes], str]) -> None:
    rows = [{"prompt": f"Вопрос {n}?", "completion": f"Ответ {n}"} for n in range(20)]
    utf8 = write("a/rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    cp1251 = write("b/rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("cp1251"))
    utf16 = write("c/rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-16"))
    assert steps(load(cp1251, streaming=True, encoding="cp1251")) == steps(load(utf8))
    assert steps(load(utf16, streaming=True)) == steps(load(utf8))


def test_rows_are_told_from_others_by_their_files_and_how_they_are_read(
    load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    def digest(*given: Any, **options: Any) -> str:
        rows = load(*given, streaming=True, **options).train
        assert isinstance(rows, StreamedExamples)
        return rows.digest

    first, moved = write("a/rows.jsonl", jsonl(PAIRS)), write("b/moved.jsonl", jsonl(PAIRS))
    other = write("c/rows.jsonl", jsonl(PAIRS[:-1]))
    same = digest(first)
    assert digest(moved) == same
    assert digest(first, too_long="drop") == same  # what is left out had not been met
    packed = [write(f"{name}.jsonl.gz", gzip.compress(jsonl(PAIRS).encode(), mtime=0)) for name in ("a", "b")]
    assert digest(packed[0]) == digest(packed[1])  # though rows are named after their file
    changed = [
        digest(other), digest(first, "llama3"), digest(first, max_length=400), digest(first, system="Be brief."),
        digest([{"path": first, "max_rows": 44}]),
    ]  # fmt: skip
    assert len({same, *changed}) == 6


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_one_of_several_sources_has_are_told_alike(
    streaming: bool, load: Callable[..., Data], write: Callable[[str, str | bytes], str]
) -> None:
    first = write("first.jsonl", json.dumps({"Body": "2+2?", "Reply": "4"}) + "\n")
    second = write("second.jsonl", json.dumps(PAIRS[0]) + "\n")
    columns = {"prompt": "Body", "completion": "Reply"}
    with pytest.raises(DataError) as refused:
        load([first, second], streaming=streaming, columns=columns, eval_fraction=0.0)
    told = f"{second}: data.columns maps prompt to the column 'Body', which the data does not have"
    assert str(refused.value).startswith(told)
    own = f"give this one its own: {{path: {second}, columns: {{}}}}"
    assert own in str(refused.value)
    sources = [{"path": first, "columns": columns}, {"path": second, "columns": {}}]
    assert len(load(sources, streaming=streaming, eval_fraction=0.0).train) == 2
