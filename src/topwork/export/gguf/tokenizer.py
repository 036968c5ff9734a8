"""A fast tokenizer as the keys of a GGUF file: byte-level BPE (`gpt2`), or BPE with byte fallback (`llama`).

Special tokens are control tokens, which llama.cpp neither prints nor reads out of a user's text; other added tokens
are "user defined" and are read wherever they stand, as transformers does.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topwork.common.errors import ModelError
from topwork.export.gguf.pre_tokenizers import APPROXIMATE, pre_tokenizer_name
from topwork.export.gguf.sentencepiece import scores_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}
"""Special tokens of Phi-3 that leave the white space after them."""


@dataclass(frozen=True)
class Vocabulary:
    """`tokenizer.…` keys, without the chat template and the ids that end an answer; what is to be told; and whether
    llama.cpp's way with Phi-3's special tokens, which it takes by the model's name, is this tokenizer's."""

    keys: dict[str, Any]
    notes: tuple[str, ...] = ()
    phi3: bool = False


def vocabulary_of(tokenizer: Any, rows: int, control: Collection[int]) -> Vocabulary:
    """Of a fast tokenizer, padded to the embedding's `rows`; the ids in `control` are control tokens whatever the
    tokenizer says.

    Raises ModelError for a tokenizer that llama.cpp has no form for, and for one with more tokens than rows.
    """
    described = _described(tokenizer)
    model = described["model"]
    by_bytes = not model.get("byte_fallback")
    if model["type"] != "BPE" or model.get("dropout") or (by_bytes and not _is_byte_level(described)):
        raise ModelError(
            f"a tokenizer of the kind {model['type']} (pre-tokenizer {described.get('pre_tokenizer')}) is not written "
            "as GGUF; byte-level BPE and BPE with byte fallback are. Export the model as hf or vllm instead"
        )
    added = {int(token["id"]): token for token in described["added_tokens"]}
    tokens = _tokens(model["vocab"], added, rows)
    types = _types(tokens, added, model, control, by_bytes)
    keys: dict[str, Any] = {"tokenizer.ggml.model": "gpt2" if by_bytes else "llama"}
    if by_bytes:
        keys["tokenizer.ggml.pre"] = pre_tokenizer_name(tokenizer, described)
        keys["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(model)]
    else:
        keys["tokenizer.ggml.pre"] = "default"
        keys["tokenizer.ggml.scores"] = scores_of(model["vocab"], _merges(model), rows)
        keys["tokenizer.ggml.add_space_prefix"] = _prefixes_space(described)
    written = [
        token.replace(_SPACE, " ") if kind == USER_DEFINED and not by_bytes else token
        for token, kind in zip(tokens, types)
    ]
    keys |= {"tokenizer.ggml.tokens": written, "tokenizer.ggml.token_type": types, **_ids(tokenizer)}
    phi3 = _reads_as_phi3(tokens, types, added)
    return Vocabulary(keys, _notes(described, {} if phi3 else added, keys["tokenizer.ggml.pre"]), phi3)


def _reads_as_phi3(tokens: Sequence[str], types: Sequence[int], added: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether every special token but PHI3_KEEPS swallows the white space after it, as llama.cpp has it for Phi-3."""
    special = {token for token, kind in zip(tokens, types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
    greedy = {token["content"] for token in added.values() if token["rstrip"]}
    plain = not any(token["lstrip"] for token in added.values())
    return plain and greedy == special - PHI3_KEEPS and PHI3_KEEPS | {"</s>"} <= set(tokens)


def _described(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "the tokenizer has no fast form (tokenizer.json), from which GGUF's is made; open it with transformers and "
            "save it again, or export the model as hf"
        )
    described: dict[str, Any] = json.loads(backend.to_str())
    return described


def _is_byte_level(described: Mapping[str, Any]) -> bool:
    whole = described.get("pre_tokenizer") or {}
    return any(part.get("type") == "ByteLevel" for part in [whole, *whole.get("pretokenizers", [])])


def _tokens(vocabulary: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], rows: int) -> list[str]:
    known = {number: token for token, number in vocabulary.items()} | {n: str(t["content"]) for n, t in added.items()}
    if known and max(known) >= rows:
        raise ModelError(
            f"the tokenizer has tokens up to id {max(known)} and the model's embedding {rows} rows; is it this "
            "model's? llama.cpp would not read the file"
        )
    return [known.get(number, f"[PAD{number}]") for number in range(rows)]


def _types(
    tokens: list[str],
    added: Mapping[int, Mapping[str, Any]],
    model: Mapping[str, Any],
    control: Collection[int],
    by_bytes: bool,
) -> list[int]:
    vocabulary, unknown = model["vocab"], model.get("unk_token")

    def kind(number: int, token: str) -> int:
        if not by_bytes and token == unknown:
            return UNKNOWN
        if number in control:
            return CONTROL
        if number in added:
            return CONTROL if added[number]["special"] else USER_DEFINED
        if vocabulary.get(token) != number:
            return UNUSED
        return BYTE if not by_bytes and _BYTE.fullmatch(token) else NORMAL

    return [kind(number, token) for number, token in enumerate(tokens)]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs, from either of tokenizer.json's two spellings."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(str(left), str(right)) for left, right in pairs]


def _prefixes_space(described: Mapping[str, Any]) -> bool:
    """Whether a text's first word is read as if a space stood before it."""
    normalizer, whole = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    if any(part.get("type") == "Prepend" for part in [normalizer, *normalizer.get("normalizers", [])]):
        return True
    spaces = [part for part in [whole, *whole.get("pretokenizers", [])] if part.get("type") == "Metaspace"]
    return any(part.get("prepend_scheme", "always") != "never" for part in spaces)


def _ids(tokenizer: Any) -> dict[str, Any]:
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    ends = tokenizer.eos_token_id is not None and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    named = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    ids = {f"tokenizer.ggml.{name}_token_id": int(number) for name, number in named.items() if number is not None}
    return {**ids, "tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}


def _notes(described: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], pre: str) -> tuple[str, ...]:
    """Where llama.cpp reads a text otherwise, and no key says so."""
    notes = []
    normalizer = described.get("normalizer") or {}
    kinds = {part.get("type") for part in [normalizer, *normalizer.get("normalizers", [])]} - {None, "Sequence"}
    composed = sorted(kinds - {"Prepend", "Replace"})
    if composed:
        notes.append(f"llama.cpp does not normalize texts ({', '.join(map(str, composed))}) before it cuts them")
    if pre in APPROXIMATE:
        notes.append(f"llama.cpp's rule {pre!r} cuts words with combining marks (Devanagari's) otherwise")
    greedy = [token["content"] for token in added.values() if token["lstrip"] or token["rstrip"]]
    if greedy:
        notes.append(f"llama.cpp keeps the white space beside {', '.join(greedy[:3])}, which the tokenizer swallows")
    return tuple(notes)
