"""An Ollama Modelfile: the model's file, perhaps an adapter's, the TEMPLATE and what is set for asking.

Its parser (Ollama's `parser.go`) knows no escapes and drops characters that do not print. Texts stand between three
quotation marks, and what cannot is refused or written into the TEMPLATE, where Go's escapes are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from topwork.common.errors import RequestError, quoted
from topwork.export.ollama.go_template import prints

_QUOTES = '"""'
ADAPTERS_NOT_READ = {
    "bert", "deepseek2", "deepseekocr", "gemma3", "gemma3n", "gemma4", "gptoss", "gpt-oss", "laguna", "llama4",
    "mistral3", "mllama", "nemotron_h", "nemotron_h_moe", "nemotron_h_omni", "nomic-bert", "olmo3", "qwen25vl",
    "qwen3", "qwen3moe", "qwen35", "qwen35moe", "qwen3next", "qwen3vl", "qwen3vlmoe", "glm4moelite", "glmocr",
    "lfm2", "lfm2moe",
}  # fmt: skip
"""Architectures that Ollama runs on its own engine, which takes an ADAPTER and answers "loras are not yet
implemented" when the model is asked (`fs/ggml/ggml.go`, `runner/ollamarunner`); these need the merged model."""


@dataclass(frozen=True)
class Modelfile:
    """What stands in one.

    model       the GGUF file, relative to the Modelfile
    adapter     a GGUF adapter for it, or None
    template    Go's text/template
    parameters  by name; a list is written a line each (`stop`)
    system      the system message for conversations that bring none, or None
    """

    model: str
    adapter: str | None
    template: str
    parameters: Mapping[str, str | int | float | Sequence[str]]
    system: str | None = None

    def text(self) -> str:
        """The file. Raises RequestError for a text that Ollama's parser would not give back."""
        lines = [f"FROM ./{self.model}"]
        lines += [f"ADAPTER ./{self.adapter}"] if self.adapter is not None else []
        lines.append(f"TEMPLATE {_between_quotes(self.template, 'the TEMPLATE')}")
        lines += [f"SYSTEM {_between_quotes(self.system, 'the system message')}"] if self.system is not None else []
        for name, value in self.parameters.items():
            for each in [value] if isinstance(value, str | int | float) else value:
                lines.append(
                    f"PARAMETER {name} {_between_quotes(each, name) if isinstance(each, str) else f'{each:g}'}"
                )
        return "\n".join(lines) + "\n"


def stands_in_modelfile(text: str) -> bool:
    """Whether Ollama's parser gives a text back as it is."""
    return _QUOTES not in text and prints(text)


def _between_quotes(text: str, called: str) -> str:
    if not stands_in_modelfile(text):
        raise RequestError(
            f"{called} ({quoted(text, 60)}) holds three quotation marks, or characters that do not print, which "
            "Ollama's Modelfile cannot say; leave them out, or serve the model with llama.cpp (--format gguf)"
        )
    return f"{_QUOTES}{text}{_QUOTES}"


def parsed(text: str) -> list[tuple[str, str]]:
    """A Modelfile's commands and their values in order, as Ollama's parser gives them; of a parameter its name. For
    reading back what was written."""
    found, rest = [], text
    while rest := rest.lstrip(" \t\r\n"):
        name, _, rest = rest.partition(" ")
        if name == "PARAMETER":
            name, _, rest = rest.partition(" ")
        if rest.startswith(_QUOTES):
            value, _, rest = rest[len(_QUOTES) :].partition(_QUOTES)
            tail, _, rest = rest.partition("\n")  # quotation marks that ended the text
            value += tail
        else:
            value, _, rest = rest.partition("\n")
        found.append((name, "".join(letter for letter in value if letter in " \t\r\n" or letter.isprintable())))
    return found
