"""The config that a `.gguf` file's header stands for, read without torch: the sizes of the families that most are of.
What transformers makes of a header is the truth; a test holds this to it."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
"""As headers call sizes, behind the architecture's name -> as configs do."""
HEAD_DIM = {
    "llama": "rope.dimension_count", "qwen2": None, "qwen3": None, "gemma2": "attention.key_length",
    "gemma3": "attention.key_length", "phi3": None, "starcoder2": None,
}  # fmt: skip
"""Architectures that are known here -> where their heads' width stands, if it does."""
TYPES = {"gemma3": "gemma3_text"}
"""Where a `model_type` is called otherwise than the architecture."""
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LONGEST = 1 << 24
"""No string of a header, and no array, is longer."""


def gguf_values(path: Path) -> dict[str, Any] | None:
    """As its config.json would say; None for another architecture, and for a file that cannot be read so: what is wrong
    with that is for its conversion to tell (`gguf.py`)."""
    try:
        with path.open("rb") as file:
            header, tensors = _read(file)
    except (OSError, ValueError, struct.error, UnicodeDecodeError, KeyError):
        return None
    architecture = header.get("general.architecture")
    if architecture not in HEAD_DIM:
        return None
    width = HEAD_DIM[architecture]
    keys = KEYS if width is None else {**KEYS, width: "head_dim"}
    found = {name: header[f"{architecture}.{key}"] for key, name in keys.items() if f"{architecture}.{key}" in header}
    return {
        "vocab_size": header.get("tokenizer.ggml.tokens"),
        **found,
        "model_type": TYPES.get(architecture, architecture),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "bfloat16",  # what it is converted to
    }


def _read(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """The header's values (of an array its length alone), and the names of the tensors."""
    magic, version, tensors, values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"no GGUF file of version 2 or 3: {magic!r} {version}")
    header = {_string(file): _value(file, _number(file, "I")) for _ in range(values)}
    return header, set(_names(file, tensors))


def _names(file: BinaryIO, count: int) -> Iterator[str]:
    for _ in range(count):
        yield _string(file)
        dimensions = _number(file, "I")
        file.seek(8 * dimensions + 4 + 8, 1)  # sizes, type, place


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _number(file, FORMATS[kind])
    inner, length = _number(file, "I"), _length(file)
    if inner == STRING:
        for _ in range(length):
            file.seek(_length(file), 1)
    elif inner == ARRAY:
        raise ValueError("arrays in arrays are not read here")
    else:
        file.seek(length * struct.calcsize(FORMATS[inner]), 1)
    return length


def _string(file: BinaryIO) -> str:
    return file.read(_length(file)).decode("utf-8")


def _length(file: BinaryIO) -> int:
    length = _number(file, "Q")
    if length > LONGEST:
        raise ValueError(f"a length of {length}")
    return length


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]
