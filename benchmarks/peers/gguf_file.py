"""One GGUF file, written and asked; or, before, our own answers to the same questions.

    python -m peers.gguf_file ours|TYPE MODEL FOLDER [TOKENS]      (in benchmarks/)

Prints one line of JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common import peak_mib
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Message
from topwork.export.gguf.model import write_gguf_model
from topwork.export.gguf.readback import Answer, answers_of, read_back
from topwork.models.config import ModelConfig
from topwork.models.lazy import open_lazily
from topwork.models.load import load_base
from topwork.models.source import find_source
from topwork.models.tokenizer import load_tokenizer

QUESTIONS = [
    "What is the capital of France?", "Write a haiku about rain.", "Name three prime numbers.",
    "Why is the sky blue?", "Translate 'good morning' into German.", "def fibonacci(n):",
    "A train goes 60 km in 45 minutes. How fast is it?", "Give me a recipe for pancakes.",
]  # fmt: skip


def ours(model: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Answers in fp32, kept in `folder`."""
    lazy = open_lazily(find_source(ModelConfig(model_name_or_path=model), _quiet))
    found = {
        "idle_mib": peak_mib(), "dtype": str(next(iter(lazy.tensors.values())).dtype).removeprefix("torch."),
        "largest_mib": max(tensor.nbytes for tensor in lazy.tensors.values()) / 2**20, "prompts": len(QUESTIONS),
    }  # fmt: skip
    base = load_base(ModelConfig(model_name_or_path=model, dtype="float32"), _quiet)
    template = ChatTemplate(base.tokenizer)
    answers = answers_of(base, [template.prompt_ids([Message("user", each)]) for each in QUESTIONS], None, tokens)
    kept = {f"{at}.{name}": torch.tensor(getattr(each, name)) for at, each in enumerate(answers) for name in _LISTS}
    save_file({**kept, **{f"{at}.logprobs": each.logprobs for at, each in enumerate(answers)}}, folder / "ours")
    return found


_LISTS = ("prompt", "tokens")


def one(type: str, model: str, folder: Path) -> dict[str, Any]:
    """The file of a type, and what llama.cpp says of it."""
    source = find_source(ModelConfig(model_name_or_path=model), _quiet)
    lazy, tokenizer = open_lazily(source), load_tokenizer(source, False)
    file, begun = folder / f"{type}.gguf", time.perf_counter()
    written = write_gguf_model(lazy, tokenizer, None, file, type, _quiet)
    found: dict[str, Any] = {"seconds": time.perf_counter() - begun, "peak_mib": peak_mib(), "bytes": written.bytes}
    kept = load_file(folder / "ours")
    answers = [
        Answer(kept[f"{at}.prompt"].tolist(), kept[f"{at}.tokens"].tolist(), kept[f"{at}.logprobs"])
        for at in range(len(QUESTIONS))
    ]
    found |= read_back(file, answers, tokenizer, QUESTIONS).as_dict()
    file.unlink()
    return found


def _quiet(_: str) -> None:
    pass


if __name__ == "__main__":
    what, name, place, *more = sys.argv[1:]
    print(json.dumps(ours(name, Path(place), int(more[0])) if what == "ours" else one(what, name, Path(place))))
