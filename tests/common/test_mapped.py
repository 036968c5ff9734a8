"""A file's pages are given back, and nothing else is touched."""

import re
import sys
from pathlib import Path

import pytest
import torch

from topwork.common.heap import trim_heap
from topwork.common.mapped import let_go

SIZE = 16 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")


def file_bytes() -> int:
    """Resident pages of files."""
    told = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text("ascii"))
    assert told is not None
    return int(told[1]) * 1024


def test_pages_of_a_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * (SIZE // 256))
    there = torch.from_file(str(tmp_path / "file"), shared=False, size=SIZE, dtype=torch.uint8)
    total, before = int(there.sum()), file_bytes()
    let_go([(there.data_ptr(), there.data_ptr() + SIZE)])
    assert before - file_bytes() > SIZE // 2
    assert int(there.sum()) == total


def test_memory_that_is_no_files_is_left_alone() -> None:
    own = torch.ones(SIZE, dtype=torch.uint8)
    let_go([(own.data_ptr(), own.data_ptr() + SIZE)])
    trim_heap()
    assert bool((own == 1).all())
