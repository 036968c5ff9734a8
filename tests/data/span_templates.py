"""Templates on which learned spans are compared, and what is known of each; the tokenizer's kind stands beside it."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

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

    tokenizer  a family, or "sentencepiece"
    options    further options of `data`
    """

    tokenizer: str
    known: Known
    template: str = ""
    options: dict[str, Any] = field(default_factory=dict)

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
    if name != "sentencepiece":
        return build_tokenizer(name, jinja)
    made = sentencepiece_tokenizer()
    made.chat_template = jinja
    return made


def without_thinking(block: str) -> tuple[Known, dict[str, Any]]:
    """Qwen 3's and SmolLM3's switch: the empty block is in the prompt."""
    variables = {"enable_thinking": False}
    return Known(("<|im_end|>",), opens=block, variables=variables), {"chat_template_kwargs": variables}


QWEN3_OFF, OFF = without_thinking(BLOCK)
SMOLLM3_OFF, _ = without_thinking("<think>\n\n</think>\n")
CASES: dict[str, Case] = {
    "smollm2": Case("smollm2", IM_END),
    "qwen2_5": Case("qwen2_5", IM_END),
    "qwen3": Case("qwen3", IM_END),
    "qwen3_off": Case("qwen3", QWEN3_OFF, options=OFF),
    "smollm3": Case("smollm3", IM_END),
    "smollm3_off": Case("smollm3", SMOLLM3_OFF, options=OFF),
    "llama2": Case("llama2", EOS),
    "llama2_sp": Case("sentencepiece", EOS, "llama2"),
    "llama3": Case("llama3", Known(("<|eot_id|>",))),
    "llama3_1": Case("llama3_1", EOS),
    "llama3_tools": Case("llama3", Known(("<|eot_id|>",)), tool_templates.LLAMA),
    "mistral": Case("mistral", EOS),
    "mistral_sp": Case("sentencepiece", EOS, "mistral"),
    "mistral_v3": Case("mistral_v3", EOS),
    "mistral_v3_tools": Case("mistral_v3", EOS, tool_templates.MISTRAL),
    "mistral_tools_sp": Case("sentencepiece", EOS, "mistral_tools"),
    "tekken": Case("tekken", EOS),
    "gemma": Case("gemma", Known(("<end_of_turn>",))),
    "gemma3": Case("gemma3", Known(("<end_of_turn>",))),
    "phi3": Case("phi3", Known(("<|end|>",))),
    "phi4": Case("phi4", IM_END),
    "zephyr": Case("zephyr", EOS),
    "zephyr_sp": Case("sentencepiece", EOS, "zephyr"),
    "vicuna_sp": Case("sentencepiece", EOS, "vicuna"),
    "command_r": Case("command_r", Known(("<|END_OF_TURN_TOKEN|>",))),
    "granite": Case("granite", Known(("<|end_of_text|>",))),
    "olmo": Case("olmo", Known(("<|endoftext|>",))),
    "falcon": Case("falcon", Known()),
    "no_end": Case("no_end", Known()),
    "harmony": Case("harmony", Known(("<|return|>", "<|call|>"))),
    "hermes": Case("qwen3", IM_END, tool_templates.HERMES),
    "r1": Case("r1", Known(("</s>",), opens="<think>\n", strips=True)),
    "r1_old": Case("r1_old", Known(("</s>",), strips=True)),
    "r1_tools": Case("r1_tools", Known(("</s>",), text_arguments=True)),
    "generation": Case("generation", EOS),
    "generation_sp": Case("sentencepiece", EOS, "generation"),
    "generation_chatml": Case("generation_chatml", IM_END),
    "chatml": Case("smollm2", IM_END, "chatml"),
    "chatml_sp": Case("sentencepiece", IM_END, "chatml"),
    "plain": Case("mistral", EOS, "plain"),
    "plain_sp": Case("sentencepiece", EOS, "plain"),
}
