"""Templates on which learned spans are compared, and what is known of each; the tokenizer's kind stands beside it."""

import json
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import AddedToken

from data import tool_templates
from data.family_tokenizers import TEMPLATES, build_tokenizer, sentencepiece_tokenizer
from reference.incremental import Known

IM_END = Known(("<|im_end|>",))
EOS = Known(("</s>",))
BLOCK = "<think>\n\n</think>\n\n"
SHIPPED = Path(__file__).parents[2] / "src/topwork/data/templates"


@dataclass(frozen=True)
class Case:
    """`template` is a file's name in `templates`, one that Topwork ships (asked by its name), or Jinja itself.

    tokenizer  a family, or one of `MADE`
    options    further options of `data`
    needs      what `span_shapes.taken` does with messages for it
    without    shapes that it is not held to
    """

    tokenizer: str
    known: Known
    template: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def shipped(self) -> bool:
        return self.template in ("chatml", "plain")

    @property
    def jinja(self) -> str:
        if self.shipped:
            return (SHIPPED / f"{self.template}.jinja").read_text("utf-8")
        if "{" in self.template:
            return self.template
        return (TEMPLATES / f"{self.template or self.tokenizer}.jinja").read_text("utf-8")

    def load_tokenizer(self) -> Any:
        """With the template as its own."""
        return _tokenizer(self.tokenizer, self.jinja)


@cache
def _tokenizer(name: str, jinja: str) -> Any:
    made = MADE[name]() if name in MADE else build_tokenizer(name)
    made.chat_template = jinja
    return made


def _metaspace() -> Any:
    """One that writes "▁" only at the head of a whole text, and not behind each special token."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    old = sentencepiece_tokenizer()
    described = json.loads(old.backend_tokenizer.to_str())
    described["normalizer"] = None
    whole = Tokenizer.from_str(json.dumps(described))
    whole.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    named = {name: getattr(old, name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **named)


def _thinks(family: str) -> Any:
    """With tokens that are added but not special, as Qwen 3 and DeepSeek R1 have them."""
    made = build_tokenizer(family)
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    assert not {"<think>", "<tool_call>"} & set(made.all_special_tokens)
    return made


def _strips_right() -> Any:
    """Phi 3's: the marks of roles take the white space behind them."""
    made = build_tokenizer("phi3")
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    made.add_special_tokens({
        "additional_special_tokens": [AddedToken(name, special=True, rstrip=True, normalized=False) for name in names]
    })  # fmt: skip
    assert len(made("<|user|>\n\n")["input_ids"]) == 1
    return made


def _composes() -> Any:
    """Qwen's: letters and their accents become one, in special tokens' surroundings too."""
    from tokenizers import normalizers

    made = build_tokenizer("qwen3")
    made.backend_tokenizer.normalizer = normalizers.NFC()
    assert made("e\u0301")["input_ids"] == made("é")["input_ids"]
    return made


def _normalizes() -> Any:
    """Early llama's: its special tokens are looked for in normalized text, where a "▁" stands before each."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    old = sentencepiece_tokenizer()
    described = json.loads(old.backend_tokenizer.to_str())
    for token in described["added_tokens"]:
        token["normalized"] = True
    named = {name: getattr(old, name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), **named)
    assert made.eos_token_id not in made("a</s>")["input_ids"]
    return made


MADE = {
    "composes": _composes, "normalizes": _normalizes,
    "sentencepiece": sentencepiece_tokenizer, "metaspace": _metaspace, "strips_right": _strips_right,
    "qwen3_thinks": lambda: _thinks("qwen3"), "r1_thinks": lambda: _thinks("r1"),
    **{f"{family}_merges": partial(build_tokenizer, family, words=False) for family in ("smollm2", "gemma3", "no_end")},
}  # fmt: skip


def without_thinking(block: str) -> tuple[Known, dict[str, Any]]:
    """Qwen 3's and SmolLM3's switch: the empty block is in the prompt."""
    variables = {"enable_thinking": False}
    return Known(("<|im_end|>",), opens=block, variables=variables), {"chat_template_kwargs": variables}


QWEN3_OFF, OFF = without_thinking(BLOCK)
SMOLLM3_OFF, _ = without_thinking("<think>\n\n</think>\n")
MIDDLE = ("system_middle",)  # nobody says into which turn such a message is folded
FOLDED = {"fold_system": True, "merge_turns": True}
CASES: dict[str, Case] = {
    "smollm2": Case("smollm2", IM_END),
    "smollm2_merges": Case("smollm2_merges", IM_END, "smollm2"),  # letters merge with the white space around them
    "qwen2_5": Case("qwen2_5", IM_END),
    "qwen3": Case("qwen3", IM_END),
    "qwen3_thinks": Case("qwen3_thinks", IM_END, "qwen3"),
    "qwen3_composes": Case("composes", IM_END, "qwen3"),
    "qwen3_off": Case("qwen3", QWEN3_OFF, options=OFF),
    "smollm3": Case("smollm3", IM_END),
    "smollm3_off": Case("smollm3", SMOLLM3_OFF, options=OFF),
    "llama2": Case("llama2", EOS, needs=("user",)),
    "llama2_sp": Case("sentencepiece", EOS, "llama2", needs=("user",)),
    "llama2_meta": Case("metaspace", EOS, "llama2", needs=("user",)),
    "llama3": Case("llama3", Known(("<|eot_id|>",))),
    "llama3_1": Case("llama3_1", EOS, needs=("one_call",)),
    "llama3_tools": Case("llama3", Known(("<|eot_id|>",)), tool_templates.LLAMA, needs=("one_call",)),
    "mistral": Case("mistral", EOS, needs=("user",)),
    "mistral_sp": Case("sentencepiece", EOS, "mistral", needs=("user",)),
    "mistral_meta": Case("metaspace", EOS, "mistral", needs=("user",)),
    "mistral_folded": Case("mistral", EOS, options=FOLDED, needs=("user", "folded", "merged"), without=MIDDLE),
    "mistral_v3_folded": Case("mistral_v3", EOS, options=FOLDED, needs=("folded", "merged"), without=MIDDLE),
    "qwen3_merged": Case("qwen3", IM_END, options={"merge_turns": True}, needs=("merged",)),
    "mistral_v3": Case("mistral_v3", EOS),
    "mistral_v3_tools": Case("mistral_v3", EOS, tool_templates.MISTRAL),
    "mistral_tools_sp": Case("sentencepiece", EOS, "mistral_tools"),
    "tekken": Case("tekken", EOS),
    "gemma": Case("gemma", Known(("<end_of_turn>",)), needs=("user",)),
    "gemma_folded": Case(
        "gemma", Known(("<end_of_turn>",)), options=FOLDED, needs=("user", "folded", "merged"), without=MIDDLE
    ),
    "gemma3": Case("gemma3", Known(("<end_of_turn>",)), needs=("user",)),
    "gemma3_merges": Case("gemma3_merges", Known(("<end_of_turn>",)), "gemma3", needs=("user",)),
    "phi3": Case("phi3", Known(("<|end|>",))),
    # The marks take white space, of an answer's beginning too; beside letters that spell one the reference cannot tell.
    "phi3_strips": Case("strips_right", Known(("<|end|>",)), "phi3", without=("spaces", "spelled")),
    "phi4": Case("phi4", IM_END),
    "zephyr": Case("zephyr", EOS),
    "zephyr_meta": Case("metaspace", EOS, "zephyr"),
    "zephyr_sp": Case("sentencepiece", EOS, "zephyr"),
    "vicuna_sp": Case("sentencepiece", EOS, "vicuna"),
    "command_r": Case("command_r", Known(("<|END_OF_TURN_TOKEN|>",))),
    "granite": Case("granite", Known(("<|end_of_text|>",))),
    "olmo": Case("olmo", Known(("<|endoftext|>",))),
    "falcon": Case("falcon", Known()),
    "no_end": Case("no_end", Known()),
    "no_end_merges": Case("no_end_merges", Known(), "no_end"),
    "harmony": Case("harmony", Known(("<|return|>", "<|call|>"))),
    "hermes": Case("qwen3", IM_END, tool_templates.HERMES),
    "r1": Case("r1", Known(("</s>",), opens="<think>\n", strips=True), needs=("inline",)),
    "r1_old": Case("r1_old", Known(("</s>",), strips=True), needs=("inline",)),
    "r1_thinks": Case("r1_thinks", Known(("</s>",), opens="<think>\n", strips=True), "r1", needs=("inline",)),
    "r1_tools": Case("r1_tools", Known(("</s>",), text_arguments=True)),
    "generation": Case("generation", EOS),
    "generation_sp": Case("sentencepiece", EOS, "generation"),
    "generation_chatml": Case("generation_chatml", IM_END),
    "chatml": Case("smollm2", IM_END, "chatml"),
    "chatml_sp": Case("sentencepiece", IM_END, "chatml"),
    "plain": Case("mistral", EOS, "plain"),
    "plain_meta": Case("metaspace", EOS, "plain"),
    "chatml_meta": Case("metaspace", IM_END, "chatml"),
    "plain_sp": Case("sentencepiece", EOS, "plain"),
}
