"""A base small enough to be trained in a second, with a tokenizer and a chat template, and rows and recipes for it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data.family_tokenizers import build_tokenizer
from reference.families import tiny_model

CONTEXT = 512
PRODUCTS = ("kettle", "lamp", "radio", "scale", "fan", "clock")
TROUBLES = ("leaks", "is late", "is broken", "hums")


def write_model(
    folder: Path, seed_shift: float = 0.0, family: str = "smollm2", template: str | None = None, tokenizer: Any = None,
    **values: Any,
) -> Path:  # fmt: skip
    """A random fp32 llama of two layers with a tokenizer of `family`, as a Hugging Face folder; no template where "" is
    given."""
    tokenizer = tokenizer or build_tokenizer(family, template)
    model = tiny_model(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, hidden_size=32, intermediate_size=48,
        head_dim=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **values,
    )  # fmt: skip
    if seed_shift:
        for parameter in model.parameters():
            parameter.data.add_(seed_shift)
    model.save_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template or None
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Tickets and their JSON; all of them differ."""
    made = []
    for number in range(first, first + count):
        product, trouble = PRODUCTS[number % len(PRODUCTS)], TROUBLES[number // len(PRODUCTS) % len(TROUBLES)]
        answer = json.dumps({"product": product, "order": number, "urgent": trouble == "leaks"})
        asked = f"Order {number}: my {product} {trouble}." + " Please help." * (number % 3)
        made.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    return made


def write_rows(path: Path, made: Sequence[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return path


def recipe_values(base: Path, train: Path, output_dir: Path, /, **changes: Any) -> dict[str, Any]:
    """A recipe of twenty-four steps with dropout; `changes` are sections with options, or whole values."""
    values: dict[str, Any] = {
        "model": {"model_name_or_path": str(base), "dtype": "float32", "device": "cpu"},
        "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "data": {"train": str(train), "eval_fraction": 0.1},
        "training": {
            "learning_rate": 5e-3, "max_steps": 24, "batch_size": 4, "tokens_per_pass": 300, "eval_steps": 6,
            "save_steps": 2, "warmup_steps": 1,
        },
        "evaluation": {"max_new_tokens": 8, "max_rows": 3},
        "output_dir": str(output_dir),
    }  # fmt: skip
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    return values


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """The values as a YAML file."""
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
