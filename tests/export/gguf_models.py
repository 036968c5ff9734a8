"""Small models with a tokenizer, as llama.cpp can load them, and the differences from transformers' own pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from reference.families import tiny_model
from topwork.export.gguf.llama_cpp import LlamaCpp
from topwork.export.gguf.model import GgufModel, write_gguf_model
from topwork.models.lazy import LazyModel, LazyTensor

ROWS = 352
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
"""The weights are large, so that attention chooses and a wrong row is seen."""
LENGTHS = (1, 3, 20, 40)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level(special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), **model: Any) -> Any:
    """A fast tokenizer that cuts as SmolLM's, with merges that join digits and words; 270 tokens."""
    merges = [("1", "2"), ("12", "3"), ("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "1"), ("hell", "o"), ("Ġ", "a")]
    letters = [*bytes_to_unicode().values(), *(left + right for left, right in merges)]
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **model))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[-1], pad_token=special[0],
        chat_template=TEMPLATE,
    )  # fmt: skip


def with_byte_fallback(words: Sequence[str] = ("▁the", "▁there", "here", "▁a", "▁▁", "▁▁▁▁", "12")) -> Any:
    """A tokenizer as SentencePiece's are converted: every pair that makes a token is merged, best token first."""
    letters = [chr(code) for code in range(33, 127)] + ["▁", "é", "ß"]
    pieces = [*dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))]
    pieces += [word[start:] for word in words for start in range(1, len(word) - 1) if word[start:] not in pieces]
    pieces = list(dict.fromkeys(piece for piece in pieces if piece not in letters))
    return _of_pieces(pieces, letters, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def with_runs(longest: int = 6) -> Any:
    """The same as Gemma's are: runs of spaces, line ends and tabs first, the longest first, in turns; no space in
    front."""
    runs = [letter * length for length in range(longest, 1, -1) for letter in ("\n", "▁", "\t")]
    pairs = [
        (letter * left, letter * (length - left))
        for length in range(longest, 1, -1)
        for left in range(length - 1, 0, -1)
        for letter in ("\n", "▁", "\t")
    ]
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\n", "\t"]
    return _of_pieces([*runs, "▁a", "th"], letters, normalizers.Replace(" ", "▁"), pairs)


def _of_pieces(pieces: list[str], letters: list[str], normalizer: Any, first: Sequence[tuple[str, str]] = ()) -> Any:
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges = [*first, *(pair for pair in merges if pair not in first)]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny(family: str, **values: Any) -> PreTrainedModel:
    """A random model for these tokenizers."""
    return tiny_model(family, **{**SIZES, **values})


def as_lazy(model: PreTrainedModel, **changes: Any) -> LazyModel:
    """A model in memory as its checkpoint's files would have it."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    tensors = {
        key: LazyTensor(tuple(weight.shape), weight.dtype, lambda weight=weight: weight.clone())
        for key, weight in weights.items()
    }
    return LazyModel("tiny", None, {**model.config.to_dict(), **changes}, tensors)


def written(folder: Path, model: PreTrainedModel, type: str = "f32", tokenizer: Any = None) -> GgufModel:
    """The model as a file in `folder`."""
    return write_gguf_model(
        as_lazy(model), tokenizer or byte_level(), None, folder / f"{type}.gguf", type, lambda _: None
    )


def prompts(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    """Random ids, none of them special."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 260, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def last_logprobs(model: PreTrainedModel, given: Sequence[Tensor]) -> list[Tensor]:
    """[V] after each prompt, by transformers' own pass."""
    return [model(input_ids=ids[None], use_cache=False).logits[0, -1].float().log_softmax(-1) for ids in given]


def apart(reader: LlamaCpp, given: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """The largest difference of llama.cpp's log-probabilities, over all of the vocabulary, after each prompt."""
    found = [reader.logprobs(ids.tolist(), ROWS) for ids in given]
    return [max(abs(value - float(row[at])) for at, value in place.items()) for place, row in zip(found, expected)]
