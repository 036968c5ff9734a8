"""Compressed files of every text format."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from topwork.common.errors import DataError
from topwork.data.config import SourceConfig
from topwork.data.files.rows import read_rows


def zst(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst}
ROWS = [{"prompt": "né?", "completion": "ja"}, {"prompt": "two", "completion": "zwei"}]
TEXTS = {
    "jsonl": "\n".join(map(json.dumps, ROWS)),
    "json": json.dumps(ROWS),
    "csv": "prompt,completion\nné?,ja\ntwo,zwei\n",
    "tsv": "prompt\tcompletion\nné?\tja\ntwo\tzwei\n",
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("format", TEXTS)
def test_packed_files_are_read(tmp_path: Path, format: str, packing: str) -> None:
    path = tmp_path / f"train.{format}.{packing}"
    path.write_bytes(PACK[packing](TEXTS[format].encode()))
    found = read_rows(SourceConfig(path=str(path))).rows
    assert [row.fields for row in found] == ROWS
    assert found[0].source.startswith(path.name)


@pytest.mark.parametrize("packing", PACK)
def test_packed_text_is_one_document(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"story.txt.{packing}"
    path.write_bytes(PACK[packing](b"one\n\ntwo\n"))
    assert [row.fields for row in read_rows(SourceConfig(path=str(path))).rows] == [{"text": "one\n\ntwo"}]


@pytest.mark.parametrize("packing", PACK)
def test_a_file_of_several_frames(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"train.jsonl.{packing}"
    path.write_bytes(b"".join(PACK[packing](f"{json.dumps(row)}\n".encode()) for row in ROWS))
    assert [row.fields for row in read_rows(SourceConfig(path=str(path))).rows] == ROWS


@pytest.mark.parametrize("packing", PACK)
def test_a_cut_off_or_broken_archive_is_one_line(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"train.jsonl.{packing}"
    rows = "".join(f'{{"text": "{n * 7919 % 10007}"}}\n' for n in range(20_000)).encode()
    for content in (PACK[packing](rows)[:-2000], b"no archive at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"train\.jsonl\.{packing} cannot be unpacked \(.*fetch it again") as error:
            read_rows(SourceConfig(path=str(path)))
        assert "\n" not in str(error.value)
