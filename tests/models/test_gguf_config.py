"""The sizes that a GGUF header tells without torch, against the config that transformers makes of the same file."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from models.test_structures import assert_same
from models.tiny_gguf import byte_level_vocabulary, tiny_llama, write_gguf
from topwork.models.config import ModelConfig
from topwork.models.gguf_config import HEAD_DIM, gguf_values
from topwork.models.skeleton import skeleton
from topwork.models.structure_of import structure_of
from topwork.models.structures.build import structure_from
from topwork.plan.base import structure_named
from topwork.plan.built import config_of


def header(path: Path, architecture: str, head: bool = True, heads: int = 4, **left_out: None) -> Path:
    """A header of one family, with a token list and two tensors, and no weights that anybody reads."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    sizes = {
        "context_length": 512, "block_count": 2, "feed_forward_length": 96, "embedding_length": 64,
        "attention.head_count": heads, "attention.head_count_kv": 2, "attention.key_length": 24,
        "rope.dimension_count": 16, "attention.sliding_window": 32,
    }  # fmt: skip
    for name, value in sizes.items():
        if name.replace(".", "_") not in left_out:
            writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    writer.add_token_list([f"token {number}" for number in range(131)])
    writer.add_token_types([1] * 131)
    writer.add_pad_token_id(0)
    writer.add_array("tokenizer.ggml.scores", [0.5] * 131)
    for name in ("token_embd.weight", *(["output.weight"] if head else [])):
        writer.add_tensor(name, np.zeros((131, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("architecture", HEAD_DIM)
def test_a_header_tells_what_transformers_reads_of_it(architecture: str, head: bool, tmp_path: Path) -> None:
    path = header(tmp_path / "tiny.gguf", architecture, head)
    found, config = structure_from(gguf_values(path) or {}), config_of(str(path))
    config.dtype = "bfloat16"  # what the file is converted to
    assert found is not None
    assert_same(found, structure_of(skeleton(config), found.fast))
    assert found.tied is not head


@pytest.mark.parametrize("left_out", ["attention_head_count_kv", "attention_key_length", "rope_dimension_count"])
def test_what_a_header_leaves_out_is_the_classs(left_out: str, tmp_path: Path) -> None:
    for architecture in HEAD_DIM:
        heads = 32 if left_out == "attention_head_count_kv" else 4  # each class's default divides it
        path = header(tmp_path / f"{architecture}.gguf", architecture, heads=heads, **{left_out: None})
        found, config = structure_from(gguf_values(path) or {}), config_of(str(path))
        assert found is not None
        assert (found.key_value_heads, found.head_dim) == (
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )


def test_a_whole_file(tmp_path: Path) -> None:
    model = tiny_llama()
    path = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    told: list[str] = []
    found = structure_named(ModelConfig(model_name_or_path=str(path)), told.append)
    assert not told
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("change", [lambda data: data[:40], lambda data: b"GGML" + data[4:], lambda _: b"", None])
def test_what_is_not_read_so_is_left_to_the_conversion(change: Any, tmp_path: Path) -> None:
    path = header(tmp_path / "tiny.gguf", "mamba" if change is None else "llama")
    if change is not None:
        path.write_bytes(change(path.read_bytes()))
    assert gguf_values(path) is None


def test_lengths_that_cannot_be(tmp_path: Path) -> None:
    path = header(tmp_path / "tiny.gguf", "llama")
    data = bytearray(path.read_bytes())
    data[24:32] = b"\xff" * 8  # the first key's length
    path.write_bytes(data)
    assert gguf_values(path) is None
