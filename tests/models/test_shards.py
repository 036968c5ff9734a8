"""Which files a model is read from, when there is a choice."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from topwork.models.shards import weight_files


def write(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path)


def sharded(folder: Path) -> list[str]:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        write(folder / name)
    index = {"metadata": {}, "weight_map": dict(zip("ab", names))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [str(folder / name) for name in names]


def test_shards_as_their_index_lists_them(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    assert weight_files(str(tmp_path)) == files


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    sharded(tmp_path)
    write(tmp_path / "model.safetensors")
    assert weight_files(str(tmp_path)) == [str(tmp_path / "model.safetensors")]


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError):
        weight_files(str(tmp_path))
