"""A written GGUF file read again: by llama.cpp where its Python build is installed, else by its structure alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topwork.common.errors import RunError
from topwork.data.chat.rendering import TemplateRejects
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Message
from topwork.export.gguf.llama_cpp import LlamaCpp, is_installed
from topwork.export.gguf.package import gguf_package
from topwork.models.base import Base
from topwork.ops.batch import batch_of

TOP = 20
"""So many of llama.cpp's likeliest tokens are compared at each position."""

CHATS = (
    [("user", "Where is my order 4711?")],
    [("system", "Answer in one word."), ("user", "Hello!\n\nWho are you?")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
)
"""Conversations that the file's template is held to."""


@dataclass(frozen=True)
class Answer:
    """What our own model says: greedy `tokens` after `prompt`, ids, and the log-probabilities [n, V] of each place."""

    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor


@dataclass(frozen=True)
class ReadBack:
    """What the file said beside us.

    reader       `llama.cpp`, or `gguf` where only names, shapes and finite values were looked at
    weights      how many the file has
    texts        how many texts were cut into tokens by both; `texts_equal` of them alike
    positions    how many places answers were compared at; `agreed` where both say the same token
    mean_difference, largest_difference  of the log-probabilities of llama.cpp's likeliest tokens, in nats
    answers_equal  answers that came out the same when llama.cpp went on by itself, of `answers`
    chats        how many conversations both wrote out by the chat template; `chats_equal` of them alike
    """

    reader: str
    weights: int
    texts: int = 0
    texts_equal: int = 0
    positions: int = 0
    agreed: int = 0
    mean_difference: float = 0.0
    largest_difference: float = 0.0
    answers: int = 0
    answers_equal: int = 0
    chats: int = 0
    chats_equal: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.reader == "gguf":
            return f"read back by the gguf package: {self.weights} weights, all finite (xllamacpp is not installed)"
        return (
            f"read back by llama.cpp: {self.answers_equal} of {self.answers} greedy answers as ours, the likeliest "
            f"token as ours at {self.agreed} of {self.positions} places, log-probabilities "
            f"{self.mean_difference:.1e} apart ({self.largest_difference:.1e} at most), "
            f"{self.texts_equal} of {self.texts} texts cut alike, {self.chats_equal} of {self.chats} conversations "
            "written alike"
        )


@torch.no_grad()
def answers_of(
    base: Base, prompts: Sequence[Sequence[int]], adapter: str | None = None, length: int = 8
) -> list[Answer]:
    """Our model's greedy answers of `length` tokens to prompts of ids, with `adapter` or without."""
    grown, rows = [list(prompt) for prompt in prompts], []
    for _ in range(length):
        batch = batch_of([torch.tensor(ids) for ids in grown], adapter).to(base.device)
        last = torch.tensor(batch.cu_seqlens[1:]) - 1
        rows.append(base.logits(batch, last.to(base.device)).float().cpu().log_softmax(-1))
        for ids, best in zip(grown, rows[-1].argmax(-1).tolist()):
            ids.append(best)
    return [
        Answer(list(prompt), ids[len(prompt) :], torch.stack([row[at] for row in rows]))
        for at, (prompt, ids) in enumerate(zip(prompts, grown))
    ]


def read_back(path: Path, answers: Sequence[Answer], tokenizer: Any = None, texts: Sequence[str] = ()) -> ReadBack:
    """Read `path` again and hold it to our `answers`, place by place after our own tokens, so that one token that is
    nearly as likely does not change all that follow; and to how `tokenizer` cuts `texts`.

    Raises RunError where llama.cpp does not load the file, or a value is not finite.
    """
    if not is_installed():
        return ReadBack("gguf", _structure(path))
    longest = max([len(each.prompt) + len(each.tokens) for each in answers], default=0)
    reader = LlamaCpp(path, max(512, longest + 8))
    differences: list[float] = []
    agreed = equal = 0
    for each in answers:
        for at, (row, taken) in enumerate(zip(each.logprobs, each.tokens, strict=True)):
            found = reader.logprobs([*each.prompt, *each.tokens[:at]], TOP)
            agreed += next(iter(found)) == taken
            differences += [abs(value - float(row[number])) for number, value in found.items()]
        alone = reader.greedy(each.prompt, len(each.tokens))
        equal += bool(alone) and alone == each.tokens[: len(alone)]  # it ends where an answer ends
    return ReadBack(
        "llama.cpp", len(gguf_package().GGUFReader(path).tensors), len(texts),
        sum(reader.tokens(text) == list(tokenizer(text)["input_ids"]) for text in texts),
        sum(len(each.tokens) for each in answers), agreed, float(np.mean(differences)) if differences else 0.0,
        max(differences, default=0.0), len(answers), equal, *_chats(reader, tokenizer),
    )  # fmt: skip


def _chats(reader: LlamaCpp, tokenizer: Any) -> tuple[int, int]:
    """How many conversations the tokenizer's chat template takes, and how many of them the file's writes alike."""
    if getattr(tokenizer, "chat_template", None) is None:
        return 0, 0
    renderer, asked, alike = ChatTemplate(tokenizer).renderer, 0, 0
    for chat in CHATS:
        try:
            ours = renderer.render([Message(role, content) for role, content in chat], None, True)
        except TemplateRejects:
            continue
        asked += 1
        try:
            theirs = reader.rendered([{"role": role, "content": content} for role, content in chat])
        except RunError:  # it does not run the template
            continue
        bos = tokenizer.bos_token or ""  # llama.cpp takes it away where it puts one in front itself
        alike += ours in (theirs, bos + theirs)
    return asked, alike


def _structure(path: Path) -> int:
    """How many weights; every one of them is unpacked once."""
    from gguf.quants import dequantize

    weights = gguf_package().GGUFReader(path).tensors
    for weight in weights:
        if not np.isfinite(dequantize(weight.data, weight.tensor_type)).all():
            raise RunError(f"{path} holds NaN or infinity in {weight.name}; it is not to be used")
    return len(weights)
