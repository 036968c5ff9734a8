"""A recipe as lines, above each the reason that it is there and what could be set instead."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from topwork.recipe.recipe import Recipe, options_at

WIDTH = 100

INSTEAD = {
    "model.dtype": "float16 for cards before 2020, float32 for a CPU without bf16.",
    "quantization.load_in_4bit": "leave the section out where there is memory for 16 bits; load_in_8bit lies between.",
    "adapter.method": "ia3, vera, loha, lokr, oft, prefix, prompt, bitfit and full; `topwork sweep RECIPE --preset "
    "methods` compares some.",
    "adapter.r": "half or twice as much; `topwork sweep RECIPE --preset rank` compares six in one pass.",
    "adapter.lora_dropout": "0.05 to 0.1 where the validation loss rises early.",
    "adapter.target_modules": "a list of names, such as [q_proj, v_proj], for half of the memory and less learned.",
    "data.eval_fraction": "data.eval: FILE, rows of your own to validate on.",
    "data.max_length": "any number up to what the base reads; a row's memory and time go with it.",
    "data.too_long": "refuse, truncate, drop, split, oldest_turns, middle: docs/data.md, Lengths.",
    "data.documents": "file (all of it is one), paragraph (what stands between empty lines), line.",
    "data.chat_template": "chatml, plain, raw (with data.separator), or a Jinja file.",
    "training.learning_rate": "`topwork sweep RECIPE --preset learning-rate` finds your own, in one pass.",
    "training.batch_size": "any number up to 32; it costs time and no memory.",
    "training.num_train_epochs": "max_steps: a number of steps.",
    "training.lr_scheduler_type": "linear, constant.",
    "training.optim": "adamw, adamw_8bit, paged_adamw_8bit.",
    "evaluation.max_new_tokens": "more where answers come out cut off.",
}
"""What else there is for a key, for people. Nothing for what few would change."""


@dataclass(frozen=True)
class Line:
    """An option under its dotted key, and why it is so. One that is `off` stands in a comment, to be switched on."""

    key: str
    value: Any
    why: str
    off: bool = False

    @property
    def section(self) -> str:
        """The recipe's section; the key itself where it is in none."""
        return self.key.partition(".")[0]


def in_order(lines: Iterable[Line]) -> list[Line]:
    """As `Recipe` has its sections and each of these its options. Of two lines of a key the later one counts."""
    latest = {line.key: line for line in lines}
    sections = list(Recipe.model_fields)
    names = {section: list(options_at([section])) for section in sections}

    def place(line: Line) -> tuple[int, int]:
        _, _, name = line.key.partition(".")
        known = names[line.section]
        return sections.index(line.section), known.index(name) if name in known else len(known)

    return sorted(latest.values(), key=place)


def values_of(lines: Iterable[Line]) -> dict[str, Any]:
    """What the lines say that are not off, as a recipe's values."""
    values: dict[str, Any] = {}
    for line in lines:
        if line.off:
            continue
        at = values
        *parents, last = line.key.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = line.value
    return values


def recipe_text(lines: Sequence[Line], title: str, told: Sequence[str]) -> str:
    """YAML with comments; above it a title, and what was found."""
    text = [*_comment(title), "#", *(part for each in told for part in _comment(each, hanging=True))]
    for section in dict.fromkeys(line.section for line in lines):
        own = [line for line in lines if line.section == section]
        if own[0].key == section:
            text += _written(own[0], "")
        elif all(line.off for line in own):
            text += [part for line in own for part in _comment(line.why)]
            text += [f"# {section}:", *(f"#   {_yaml(line)}" for line in own)]
        else:
            text += [f"{section}:", *(part for line in own for part in _written(line, "  "))]
    return "\n".join(text) + "\n"


def _written(line: Line, indent: str) -> list[str]:
    instead = INSTEAD.get(line.key) if not line.off and "`topwork sweep" not in line.why else None
    why = f"{line.why} Else: {instead}" if instead else line.why
    return [*_comment(why, indent), f"{indent}{'# ' if line.off else ''}{_yaml(line)}"]


def _comment(text: str, indent: str = "", hanging: bool = False) -> list[str]:
    wide = WIDTH - len(indent)
    further = "    " if hanging else ""
    return [
        f"{indent}# {part}"
        for part in textwrap.wrap(text, wide, subsequent_indent=further, break_long_words=False, break_on_hyphens=False)
    ]


def _yaml(line: Line) -> str:
    """The option on one line."""
    name = line.key.rpartition(".")[2]
    value = yaml.safe_dump(line.value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 20)
    return f"{name}: {value.strip().removesuffix('...').strip()}"
