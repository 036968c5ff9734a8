"""A small tokenizer of any family: trained on a few lines, with the family's special tokens, and its chat template."""

import json
from functools import cache
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"

# family: (BOS, EOS, the other special tokens)
FAMILIES: dict[str, tuple[str | None, str | None, tuple[str, ...]]] = {
    "smollm2": ("<|im_start|>", "<|im_end|>", ("<|endoftext|>",)),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")),
    "qwen2_5": (None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "qwen3": (None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "gemma": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma3": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": ("<s>", "</s>", ()),
    "mistral_v3": ("<s>", "</s>", ("[INST]", "[/INST]")),
    "phi3": ("<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "phi4": ("<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_sep|>")),
    "no_end": ("<s>", "</s>", ()),
}

# Those of which only the learned spans are tested.
OTHERS: dict[str, tuple[str | None, str | None, tuple[str, ...]]] = {
    "llama2": ("<s>", "</s>", ()),
    "llama3_1": ("<s>", "</s>", ()),
    "mistral_tools": ("<s>", "</s>", ()),
    "tekken": (
        "<s>", "</s>",
        (
            "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
        ),
    ),
    "zephyr": ("<s>", "</s>", ()),
    "vicuna": ("<s>", "</s>", ()),
    "command_r": (
        "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    "granite": (
        "<|end_of_text|>", "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    ),
    "olmo": ("<|endoftext|>", "<|endoftext|>", ()),
    "falcon": (None, "<|endoftext|>", ()),
    "smollm3": (None, "<|im_end|>", ("<|im_start|>", "<|begin_of_text|>", "<|end_of_text|>")),
    "harmony": (
        None, "<|return|>",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|endoftext|>"),
    ),
    "r1": ("<s>", "</s>", ("<|User|>", "<|Assistant|>")),
    "r1_old": ("<s>", "</s>", ("<|User|>", "<|Assistant|>")),
    "r1_tools": ("<s>", "</s>", ("<|User|>", "<|Assistant|>", "<|call|>", "<|endcall|>", "<|out|>")),
    "generation": ("<s>", "</s>", ()),
    "generation_chatml": (None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
}  # fmt: skip


@cache
def _trained(special: tuple[str, ...], adds_bos: str | None, words: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [
        "user\nHi there\n\nassistant\nHello!\n\nHello! See you soon.\n",
        "model\n\nYes. No. Be brief. Hi there [/INST]",
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines * 4,
        trainers.BpeTrainer(
            vocab_size=360, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
        ),
    )
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{adds_bos} $A", special_tokens=[(adds_bos, tokenizer.token_to_id(adds_bos))]
        )
    return tokenizer


def build_tokenizer(
    family: str, template: str | None = None, adds_bos: bool = False, words: bool = True, **named: Any
) -> Any:
    """Without `words`, letters merge with the white space around them: the hard case at boundaries."""
    from transformers import PreTrainedTokenizerFast

    bos, eos, other = (FAMILIES | OTHERS)[family]
    special = tuple(token for token in (bos, eos, *other) if token)
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(special, bos if adds_bos else None, words),
        chat_template=template if template is not None else (TEMPLATES / f"{family}.jinja").read_text("utf-8"),
        **{"bos_token": bos, "eos_token": eos, "pad_token": eos, **named},
    )


STORY = """Once upon a time there was a little girl named Lily. She loved to play outside in the park with her dog.
One day they saw a cat in a tree. "Look!" said Lily. The dog sat down, and the cat was sad and wanted to go home."""


def sentencepiece_tokenizer() -> Any:
    """A small one of llama 2's kind: "▁" for a space, bytes for letters it never saw, a BOS, no chat template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def plain(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return tokenizer

    learned = plain(models.BPE())
    learned.train_from_iterator(STORY.split(), trainers.BpeTrainer(vocab_size=120, show_progress=False))
    merges = [(left, right) for left, right in json.loads(learned.to_str())["model"]["merges"]]
    letters = sorted(token for token in learned.get_vocab() if len(token) == 1)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map("".join, merges), *letters]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    whole = plain(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    whole.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
