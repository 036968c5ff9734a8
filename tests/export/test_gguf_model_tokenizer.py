"""Tokens, their types, pre-tokenizers by proof, and that llama.cpp cuts texts as transformers does."""

import hashlib
import json
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from export.gguf_models import as_lazy, byte_level, tiny, with_byte_fallback, with_runs, written
from topwork.common.errors import ModelError
from topwork.export.gguf import pre_tokenizers as names
from topwork.export.gguf.llama_cpp import LlamaCpp
from topwork.export.gguf.model import write_gguf_model
from topwork.export.gguf.pre_tokenizers import BY_HASH, pre_tokenizer_name
from topwork.export.gguf.sentencepiece import scores_of
from topwork.export.gguf.tokenizer import vocabulary_of
from topwork.models.config import ModelConfig
from topwork.models.tokenizer import open_tokenizer

TEXTS = [
    "", " ", "\n", "a", " a", "Hello, world!", "hello there 12345 6", "3.14 1,000,000 ½ ² 12³ ٣٤ 一二三",
    "\t\ttabs\n\n\nlines \r\n  spaces   end  ", "def f(x: int) -> str:\n    return f'{x!r}'  # done\n",
    "İstanbul'da ΑΒΓ привет नमस्ते こんにちは 你好，世界！ 안녕하세요 مرحبا שלום",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 é é ﬁ Å", "I've you'RE we'll 'tis 'D", "a" * 70,
    "▁▁ under ▁score <0x0A>", "\u200b\ufeff\u00a0x\u2028y",
    "<|im_start|>user\nhi<|im_end|>\n", "x<|endoftext|>y", "<unk><s> hi </s>", "the there here 1212  the",
]  # fmt: skip


def _texts(count: int) -> list[str]:
    """The texts above, and others that are drawn from their letters and from pieces of them."""
    rng = random.Random(0)
    letters = [*"".join(TEXTS), *" \n\t 0123456789'", *(word for text in TEXTS for word in text.split(" "))]
    return [*TEXTS, *("".join(rng.choices(letters, k=rng.randint(1, 24))) for _ in range(count - len(TEXTS)))]


def _cut_alike(file: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    """The texts that llama.cpp cuts otherwise."""
    reader = LlamaCpp(file.path, 64)
    return [text for text in texts if reader.tokens(text) != tokenizer(text)["input_ids"]]


def test_texts_are_cut_as_smollm2s_own_tokenizer_cuts_them(tmp_path):
    tokenizer, _ = open_tokenizer(ModelConfig(model_name_or_path="smollm2-135m"))
    file = written(tmp_path, tiny("llama", vocab_size=49152, hidden_size=32, intermediate_size=32), "q8_0", tokenizer)
    assert _cut_alike(file, tokenizer, _texts(300)) == []


def test_texts_are_cut_as_a_byte_level_tokenizer_cuts_them(tmp_path):
    tokenizer = byte_level()
    assert _cut_alike(written(tmp_path, tiny("llama"), tokenizer=tokenizer), tokenizer, _texts(300)) == []


def test_texts_are_cut_as_a_tokenizer_with_byte_fallback_cuts_them(tmp_path):
    tokenizer = with_byte_fallback()
    file = written(tmp_path, tiny("llama", vocab_size=416), tokenizer=tokenizer)
    assert _cut_alike(file, tokenizer, _texts(300)) == []


def test_runs_in_turns_are_cut_as_gemmas_are(tmp_path):
    tokenizer, rng = with_runs(), random.Random(1)
    texts = ["".join(rng.choices(" \n\tath", weights=(8, 6, 4, 2, 1, 1), k=rng.randint(1, 40))) for _ in range(150)]
    file = written(tmp_path, tiny("llama", vocab_size=416), tokenizer=tokenizer)
    assert _cut_alike(file, tokenizer, texts) == []


def test_runs_of_which_a_shorter_one_comes_first_are_refused():
    vocabulary = {token: number for number, token in enumerate(["a", "b", "aa", "aaa", "bb"])}
    with pytest.raises(ModelError, match="'aaa' stand apart"):
        scores_of(vocabulary, [("a", "a"), ("aa", "a"), ("b", "b"), ("a", "aa")], 8)
    found = scores_of(vocabulary, [("aa", "a"), ("b", "b"), ("a", "aa"), ("a", "a")], 8)
    assert found == [0, 0, -3, -1, -2, 0, 0, 0]


def test_special_tokens_are_control_others_user_defined_and_rows_without_a_token_unused():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    keys = vocabulary_of(tokenizer, 300, {1}).keys
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 300
    assert types[:3] == [3, 3, 3]
    assert types[3] == 1
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert types[think] == 4
    assert tokens[think] == "<think>"
    assert tokens[299] == "[PAD299]"
    assert types[think + 1 :] == [5] * (300 - think - 1)
    assert vocabulary_of(tokenizer, 300, {think}).keys["tokenizer.ggml.token_type"][think] == 3
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "smollm"
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.ggml.merges"][0] == "1 2"


def test_byte_tokens_unknown_and_scores_are_sentencepieces():
    keys = vocabulary_of(with_byte_fallback(), 416, ()).keys
    types, scores, tokens = (keys[f"tokenizer.ggml.{name}"] for name in ("token_type", "scores", "tokens"))
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.pre"] == "default"
    assert types[:4] == [2, 3, 3, 6]
    assert types[tokens.index("▁the")] == 1
    assert 0 > scores[tokens.index("▁t")] > scores[tokens.index("▁th")] > scores[tokens.index("here")]
    assert keys["tokenizer.ggml.add_space_prefix"] is True


def test_a_tokenizer_whose_merges_are_no_sentencepiece_models_is_refused():
    described = with_byte_fallback(["▁the"]).backend_tokenizer.to_str()
    merges = [["▁", "t"], ["▁t", "h"], ["▁th", "e"], ["▁t", "he"]]
    with pytest.raises(ModelError, match="no SentencePiece model's"):
        vocabulary_of(_with_merges(described, merges), 416, ())
    with pytest.raises(ModelError, match="stand apart"):
        vocabulary_of(_with_merges(described, [["▁t", "he"], ["▁", "t"], ["▁th", "e"]]), 416, ())


def _with_merges(described: str, merges: list[list[str]]) -> Any:
    changed = json.loads(described)
    changed["model"]["merges"] = merges
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(changed)), eos_token="</s>")


def test_smollm2s_hash_is_llama_cpps_and_its_rule_says_the_same():
    tokenizer, _ = open_tokenizer(ModelConfig(model_name_or_path="smollm2-135m"))
    digest = hashlib.sha256(str(tokenizer.encode(names.CHECK_TEXT)).encode()).hexdigest()
    assert BY_HASH[digest] == "smollm"
    assert pre_tokenizer_name(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str())) == "smollm"


def test_what_llama_cpp_reads_otherwise_and_no_key_says_is_told(monkeypatch):
    assert vocabulary_of(byte_level(), 352, ()).notes == ()
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])
    monkeypatch.setitem(names.BY_RULE, ((("digits", "one"), ("bytes", "gpt2")), False), "gpt-4o")
    monkeypatch.setattr(names, "BY_HASH", {})
    normalized, marks, greedy = vocabulary_of(tokenizer, 352, ()).notes
    assert "NFC" in normalized
    assert "combining marks" in marks
    assert "<|end|>" in greedy


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def _with_regex(regex: str, **model: Any) -> Any:
    tokenizer = byte_level(**model)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    return tokenizer


def _gpt2() -> Any:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: _with_regex(LLAMA3, ignore_merges=True), "llama-bpe"),
        (lambda: _with_regex(QWEN2), "qwen2"),
        (_gpt2, "gpt-2"),
        (byte_level, "smollm"),
    ],
)
def test_a_rule_that_is_llama_cpps_letter_by_letter_has_its_name_and_cuts_texts_as_it(tmp_path, make, name):
    tokenizer = make()
    assert vocabulary_of(tokenizer, 352, ()).keys["tokenizer.ggml.pre"] == name
    file = written(tmp_path, tiny("llama"), tokenizer=tokenizer)
    assert _cut_alike(file, tokenizer, _texts(200)) == []


def test_an_unknown_pre_tokenizer_is_an_error_with_its_hash_and_never_a_guess(tmp_path):
    tokenizer = _with_regex(LLAMA3.replace("{1,3}", "{1,4}"))
    with pytest.raises(ModelError, match=r"\(hash [0-9a-f]{64}, rule .*1,4"):
        written(tmp_path, tiny("llama"), tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_hash_that_its_rule_contradicts_is_an_error(monkeypatch):
    tokenizer = _gpt2()
    digest = hashlib.sha256(str(tokenizer.encode(names.CHECK_TEXT)).encode()).hexdigest()
    monkeypatch.setitem(names.BY_HASH, digest, "qwen2")
    with pytest.raises(ModelError, match=r"'qwen2'.*'gpt-2'"):
        vocabulary_of(tokenizer, 352, ())


def test_tokenizers_of_another_kind_none_and_more_tokens_than_rows_are_refused(tmp_path):
    lazy = as_lazy(tiny("llama"))
    with pytest.raises(ModelError, match="has no tokenizer"):
        write_gguf_model(lazy, None, None, tmp_path / "x.gguf", "f32", lambda _: None)
    with pytest.raises(ModelError, match="up to id 266 and the model's embedding 200 rows"):
        vocabulary_of(byte_level(), 200, ())
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match=r"kind BPE.*Whitespace"):
        vocabulary_of(tokenizer, 352, ())
    with pytest.raises(ModelError, match="no fast form"):
        vocabulary_of(SimpleNamespace(), 352, ())


def test_llama_cpp_takes_a_model_for_phi3_where_the_tokenizer_is_and_not_by_its_name(tmp_path):
    plain = byte_level()  # without <s>, for which llama.cpp looks in a model that is called so
    named = replace(as_lazy(tiny("llama")), name="runs/Phi3-like")
    file = write_gguf_model(named, plain, None, tmp_path / "named.gguf", "f32", lambda _: None)
    assert _cut_alike(file, plain, _texts(60)) == []
    phi = with_byte_fallback()
    greedy = ["<|user|>", "<|end|>", "</s>"]
    phi.backend_tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    phi.backend_tokenizer.add_special_tokens([AddedToken(each, rstrip=True, normalized=False) for each in greedy])
    file = written(tmp_path, tiny("llama", vocab_size=416), tokenizer=phi)
    texts = ["<|user|>\nthe 12<|end|>\n<|user|>", "<s> hi<|end|> \n there", "<|endoftext|>\n a</s>  the"]
    assert (_cut_alike(file, phi, texts), file.notes) == ([], ())
