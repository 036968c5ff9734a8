"""How byte-level tokenizers cut a text before they merge, under the names that llama.cpp has for it.

llama.cpp computes the rule itself, by name (`tokenizer.ggml.pre`); a wrong name gives other tokens than the model has
learned, silently. A name is taken here on one of two proofs. The first is llama.cpp's own: the SHA-256 of what the
tokenizer makes of a fixed text, looked up in its list (`convert_hf_to_gguf.py`, get_vocab_base_pre; the rows of
tokenizers that the families written here use). The second is the rule itself: the tokenizer's pre-tokenizer, letter by
letter that which llama.cpp computes under the name (`llama-vocab.cpp`). Without either there is no file.
"""

import hashlib
from typing import Any

from topwork.common.errors import ModelError

CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) "
    "✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 "
    "?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
"""llama.cpp's fixed text."""

BY_HASH = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",  # of Llama 3
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen 1.5 to 3
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen 3 Embedding
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # SmolLM, SmolLM2
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "7967bfa498ade6b757b064f31e964dddbb80f8f9a4d68d4ba7998fcf281c531a": "jina-v2-code",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",  # Phi 4 mini
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",  # GPT-4's, Phi 4
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "4e2b24cc4770243d65a2c9ec19770a72f08cffc161adbb73fcbb6b7dd45a0aae": "exaone",
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
    "4a2e2abae11ca2b86d570fc5b44be4d5eb5e72cc8f22dd136a94b37da83ab665": "kormo",
}

APPROXIMATE = ("gpt-4o", "tekken", "pixtral")
"""Names under which llama.cpp computes a rule that differs from the tokenizers' at combining marks (Devanagari's)."""

Rule = tuple[tuple[str, str], ...]
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BY_RULE: dict[tuple[Rule, bool], str] = {
    ((("bytes", "gpt2"),), False): "gpt-2",
    ((("digits", "one"), ("bytes", "gpt2")), False): "smollm",
    ((("split", _CONTRACTIONS + _LETTERS + r"\p{N}" + _REST), ("bytes", "")), False): "qwen2",
    ((("split", _CONTRACTIONS + _LETTERS + r"\p{N}{1,3}" + _REST), ("bytes", "")), True): "llama-bpe",
}
"""By the parts of a pre-tokenizer and whether a word that is a token is taken whole (`ignore_merges`)."""


def pre_tokenizer_name(tokenizer: Any, described: dict[str, Any]) -> str:
    """llama.cpp's name for the rule of a byte-level tokenizer; `described` is its tokenizer.json.

    Raises ModelError, with the hash, for one that neither proof knows, and where they contradict each other.
    """
    digest = hashlib.sha256(str(list(tokenizer.encode(CHECK_TEXT))).encode()).hexdigest()
    by_hash = BY_HASH.get(digest)
    rule = rule_of(described)
    by_rule = BY_RULE.get((rule, bool(described["model"].get("ignore_merges")))) if rule else None
    if by_hash is not None and (by_rule is None or _RULES_OF.get(by_hash, by_rule) == by_rule):
        return by_hash
    if by_hash is None and by_rule is not None:
        return by_rule
    if by_hash is not None:
        raise ModelError(
            f"this tokenizer gives the tokens of llama.cpp's {by_hash!r} for its check text and has the rule of "
            f"{by_rule!r}; it is not written, because one of the two would cut other texts otherwise"
        )
    raise ModelError(
        f"llama.cpp has no pre-tokenizer that is known here as this tokenizer's (hash {digest}, rule "
        f"{described.get('pre_tokenizer')}); a guess would give other tokens than the model has learned, so no GGUF is "
        "written. Export it as hf or vllm instead"
    )


_RULES_OF = {
    "llama-bpe": "llama-bpe", "qwen2": "qwen2", "deepseek-r1-qwen": "qwen2", "smollm": "smollm", "starcoder": "smollm",
    "refact": "smollm", "exaone": "smollm", "gpt-2": "gpt-2",
}  # fmt: skip
"""The rule that stands behind a name, where it is one of `BY_RULE`."""


def rule_of(described: dict[str, Any]) -> Rule | None:
    """A pre-tokenizer's parts, in the order in which they cut; None for one of another kind."""
    whole = described.get("pre_tokenizer") or {}
    parts = [_part(part) for part in (whole["pretokenizers"] if whole.get("type") == "Sequence" else [whole])]
    return tuple(part for part in parts if part) if all(parts) else None


def _part(part: dict[str, Any]) -> tuple[str, str] | None:
    kind = part.get("type")
    if kind == "Digits" and part.get("individual_digits"):
        return "digits", "one"
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes", "gpt2" if part.get("use_regex", True) else ""
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        regex = part["pattern"].get("Regex")
        return ("split", str(regex)) if regex else None
    return None
