"""The rows and the page of `benchmarks/streaming_memory.py`; its figures are not for a test."""

import json
from pathlib import Path

import pytest


def test_rows_are_all_different_and_the_page_tells_peak_and_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from streaming_memory import text, write_rows

    from common import surroundings

    write_rows(tmp_path / "rows.jsonl", 60_000)
    lines = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()
    assert 60_000 <= (tmp_path / "rows.jsonl").stat().st_size < 61_500
    assert 450 < sum(map(len, lines)) / len(lines) < 750
    assert len(set(lines)) == len(lines)
    assert [message["role"] for message in json.loads(lines[0])["messages"]] == ["user", "assistant"]
    record = dict.fromkeys(("before_bytes", "index_bytes", "peak_bytes", "file_bytes", "rows"), 7_000_000)
    record |= {"index_seconds": 1.0, "rows_per_second": 2.0, "step_milliseconds": 3.0, "batch_size": 4}
    page = text({**record, "resumed_alike": True, "surroundings": surroundings()})
    assert "| peak of the process, MB | 7 (limit 500) |" in page
