"""Tokens to text piece by piece against the tokenizer's own decoding of the whole, and stop strings split anywhere."""

import gc
import weakref
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from data.family_tokenizers import build_tokenizer, sentencepiece_tokenizer
from topwork.common.errors import RequestError
from topwork.generation import text
from topwork.generation.text import TextStream, token_bytes, token_text

KINDS = ["bytes", "bytes with added", "sentencepiece", "metaspace", "bare"]


@cache
def tokenizer(kind: str) -> Any:
    """Byte-level (as gpt2, llama 3, qwen), with tokens added to it, llama 2's, T5's, and one without a decoder."""
    if kind.startswith("bytes"):
        made = build_tokenizer("qwen3")
        added = ["<tool_call>", "  two  ", "naïve", "日本", AddedToken("[CALL]", special=True)]
        made.add_tokens(added if kind == "bytes with added" else [])
        return made
    if kind == "sentencepiece":
        return sentencepiece_tokenizer()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "</s>", "▁", "▁a", "▁the", "a", "b", "ing", ".", "▁<0x41>", "é", "�"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=False))
    if kind == "metaspace":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def told(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.add(token) for token in tokens), stream.finish()]


@st.composite
def token_lists(draw: st.DrawFn) -> tuple[str, list[int]]:
    """Any tokens, ids that are not there included, and those of a text."""
    kind = draw(st.sampled_from(KINDS))
    anything = st.lists(st.integers(0, len(tokenizer(kind)) + 2), max_size=20)
    written = st.text(st.sampled_from("ab the.\n é日本👩‍👩‍👧🇩🇪\u0301"), max_size=12).map(
        lambda letters: tokenizer(kind)(letters, add_special_tokens=False)["input_ids"]
    )
    return kind, [token for part in draw(st.lists(anything | written, max_size=5)) for token in part]


@settings(max_examples=400, deadline=None)
@given(token_lists())
def test_the_pieces_are_the_tokenizers_decoding(case: tuple[str, list[int]]) -> None:
    kind, tokens = case
    pieces = told(TextStream(tokenizer(kind)), tokens)
    assert "".join(pieces) == tokenizer(kind).decode(tokens, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.sampled_from(["bytes", "bytes with added", "sentencepiece"]))
def test_no_half_character_is_shown(written: str, kind: str) -> None:
    tokens = tokenizer(kind)(written, add_special_tokens=False)["input_ids"]
    pieces, whole = told(TextStream(tokenizer(kind)), tokens), tokenizer(kind).decode(tokens, skip_special_tokens=True)
    shown = ""
    for piece in pieces:
        shown += piece
        assert whole.startswith(shown)
        assert piece.count("\ufffd") <= whole.count("\ufffd")


def test_a_character_is_shown_with_its_last_token() -> None:
    kind = tokenizer("bytes")
    tokens = kind("a👍b")["input_ids"]
    assert told(TextStream(kind), tokens) == ["a", "", "", "", "👍", "b", ""]
    assert told(TextStream(kind), tokens[:3]) == ["a", "", "", "\ufffd"]
    # a row of byte tokens is text or none as a whole, which the token after it decides
    kind = tokenizer("sentencepiece")
    byte = {number: kind.convert_tokens_to_ids(f"<0x{number:02X}>") for number in range(256)}
    tokens = [byte[each] for each in "👍".encode()] + kind(" the", add_special_tokens=False)["input_ids"][-1:]
    assert told(TextStream(kind), tokens)[-3:] == ["", "👍" + token_text(kind, tokens[-1]), ""]


def test_spaces_at_the_head() -> None:
    kind = tokenizer("sentencepiece")
    prompt, answer = kind("Once upon", add_special_tokens=False)["input_ids"], kind(" a dog")["input_ids"]
    whole = kind.decode([*prompt, *answer], skip_special_tokens=True)
    assert "".join(told(TextStream(kind, after=prompt), answer)) == whole.removeprefix("Once upon")
    assert whole.removeprefix("Once upon").startswith(" ")
    assert "".join(told(TextStream(kind), answer)) == kind.decode(answer, skip_special_tokens=True)


def test_special_tokens_that_are_text_all_the_same() -> None:
    kind = tokenizer("bytes with added")
    call, end = kind.convert_tokens_to_ids("[CALL]"), kind.eos_token_id
    tokens = [*kind("a")["input_ids"], call, *kind("[]")["input_ids"], end]
    assert "".join(told(TextStream(kind), tokens)) == "a[]"
    assert "".join(told(TextStream(kind, shown={call}), tokens)) == "a[CALL][]"
    kind = tokenizer("sentencepiece")
    tokens = [*kind("dog")["input_ids"], kind.eos_token_id, *kind(" the", add_special_tokens=False)["input_ids"]]
    shown = "".join(told(TextStream(kind, shown=kind.all_special_ids), tokens))
    assert shown == kind.decode(tokens, skip_special_tokens=False)


LETTERS = st.text(st.sampled_from("abé👍"), max_size=12)


def cut(whole: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Letter by letter: the first at which a stop string is complete, and the longest that is."""
    for end in range(1, len(whole) + 1):
        complete = [stop for stop in stops if whole[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return whole[: end if include else end - len(longest)], longest
    return whole, None


@settings(max_examples=300, deadline=None)
@given(
    LETTERS, st.lists(st.text(st.sampled_from("abé👍"), min_size=1, max_size=4), max_size=3), st.booleans(), st.data()
)
def test_stop_strings_split_anywhere(whole: str, stops: list[str], include: bool, data: st.DataObject) -> None:
    kind = tokenizer("bytes")
    tokens = kind(whole)["input_ids"]
    if data.draw(st.booleans()):  # one token a byte
        names = [name for byte in whole.encode() for name, value in text._byte_letters().items() if value == byte]
        tokens = kind.convert_tokens_to_ids(names)
    stream = TextStream(kind, stops, include)
    expected, stop = cut(whole, stops, include)
    shown = ""
    for token in tokens:
        shown += stream.add(token)
        assert expected.startswith(shown)  # nothing of the stop string, nor beyond
        if stream.stopped is not None:
            break
    assert stream.stopped == stop
    assert shown + stream.finish() == expected
    if stop is not None:
        assert stream.add(tokens[0]) == stream.finish() == ""


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    kind = tokenizer("bytes")
    stream = TextStream(kind, ["\n\nuser", "nix"])
    pieces = [stream.add(token) for letter in "one\n\nus n\n\nuser" for token in kind(letter)["input_ids"]]
    assert pieces == ["o", "", "ne", "", "", "", "", "\n\nus ", "", "n", "", "", "", "", ""]
    assert stream.stopped == "\n\nuser"


def test_of_two_in_one_token_the_one_that_is_complete_first() -> None:
    kind = tokenizer("bytes with added")
    stream = TextStream(kind, ["two ", "wo", "o"])
    assert stream.add(kind.convert_tokens_to_ids("  two  ")) == "  t"
    assert stream.stopped == "wo"


def test_a_stop_string_that_half_a_character_ends() -> None:
    kind = tokenizer("bytes")
    first = kind("👍")["input_ids"][0]
    stream = TextStream(kind, ["\ufffd"])
    assert stream.add(first) == ""
    assert stream.finish() == ""
    assert stream.stopped == "\ufffd"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="a stop string is empty"):
        TextStream(tokenizer("bytes"), ["x", ""])


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_at_any_length(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are decoded for each of 400: a few, not all before it; invalid bytes are the worst case."""
    decoded: list[int] = []
    real = text.Pieces.decode
    monkeypatch.setattr(text.Pieces, "decode", lambda self, tokens: decoded.append(len(tokens)) or real(self, tokens))
    for tokens in (list(range(3, 10)) * 60, [9] * 400):
        stream = TextStream(tokenizer(kind))
        decoded.clear()
        told(stream, tokens)
        assert sum(decoded) <= 4 * len(tokens) + 40


def test_tokens_on_their_own() -> None:
    kind = tokenizer("bytes with added")
    there = kind.convert_tokens_to_ids("Ġthere")
    assert (token_text(kind, there), token_bytes(kind, there)) == (" there", b" there")
    half = kind("👍")["input_ids"][0]
    assert (token_text(kind, half), token_bytes(kind, half)) == ("\ufffd", b"\xf0")
    assert token_text(kind, kind.eos_token_id) == kind.eos_token
    assert token_text(kind, kind.convert_tokens_to_ids("  two  ")) == "  two  "
    assert token_bytes(kind, 10**6) == token_bytes(kind, -1) == b""
    kind = tokenizer("sentencepiece")
    the = kind.convert_tokens_to_ids("▁the")
    assert (token_text(kind, the), token_bytes(kind, the)) == (" the", b" the")
    assert token_bytes(kind, kind.convert_tokens_to_ids("<0xF0>")) == b"\xf0"
    assert token_text(kind, kind.eos_token_id) == "</s>"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_the_bytes_of_tokens_are_the_texts(written: str) -> None:
    kind = tokenizer("bytes")
    assert b"".join(token_bytes(kind, token) for token in kind(written)["input_ids"]) == written.encode()


def test_a_tokenizer_is_let_go() -> None:
    kind = build_tokenizer("qwen3")
    TextStream(kind).add(5)
    seen = weakref.ref(kind)
    del kind
    gc.collect()
    assert seen() is None
