"""RUN/provenance.json holds the hash of every file that rows were read from, and of no other."""

from hashlib import sha256
from pathlib import Path

import numpy as np

from topwork.data.config import DataConfig, SourceConfig
from topwork.data.examples import Example
from topwork.data.files.sources import with_held_out
from topwork.run.provenance import _rows

EXAMPLES = [Example(np.array([1, 2], np.int32), np.array([0.0, 1.0], np.float32), "a.jsonl:1")]


def test_hashes_of_all_files_of_all_sources(tmp_path: Path) -> None:
    for name in ("set/train.jsonl", "set/validation.jsonl", "set/test.jsonl", "more/a.jsonl", "more/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    train: list[str | SourceConfig] = [str(tmp_path / "set"), SourceConfig(path=str(tmp_path / "more" / "*.jsonl"))]
    config = with_held_out(DataConfig(train=train))

    def hashes(*names: str) -> dict[str, str]:
        return {str(tmp_path / name): sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}

    found = _rows(config, config.train, EXAMPLES)
    assert found["files"] == hashes("set/train.jsonl", "more/a.jsonl", "more/b.jsonl")
    assert found["rows"] == 1
    held = _rows(config, config.eval, EXAMPLES)
    assert held["sha256"] == next(iter(hashes("set/validation.jsonl").values()))
    assert "sha256" not in _rows(config, None, [])
    assert "files" not in _rows(config, "owner/name", EXAMPLES)
