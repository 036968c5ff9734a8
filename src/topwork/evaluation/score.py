"""Scoring a model on rows with known answers: loss on the reference, and what it writes itself."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from topwork.common.errors import DataError
from topwork.data.batches import collate, pack
from topwork.data.chat.template import ChatTemplate, stop_ids
from topwork.data.conversations import Conversation
from topwork.data.examples import Example
from topwork.evaluation.grade import Grade, Grader, grade, summarise
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.models.base import Base
from topwork.ops.threads import computing_threads

TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Question:
    """A row as the model is asked it: the messages before the last answer, as tokens, and that answer."""

    prompt: str
    tokens: tuple[int, ...]
    reference: str
    source: str


@dataclass(frozen=True)
class Scores:
    """What one arm (the base, or an adapter) made of the questions."""

    summary: dict[str, Any]
    answers: tuple[str, ...]
    grades: tuple[Grade, ...]


def questions_of(conversations: Sequence[Conversation], template: ChatTemplate) -> list[Question]:
    """The last assistant turn of each conversation as a question. Raises DataError where there is none to ask."""
    asked = []
    for row in conversations:
        if row.kind != "chat" or len(row.messages) < 2 or row.messages[-1].role != "assistant":
            continue
        before = row.messages[:-1]
        shown = "\n\n".join(message.content for message in before if message.role != "system")
        ids = tuple(template.prompt_ids(before, row.tools, as_learned=True))
        asked.append(Question(shown, ids, row.messages[-1].content, row.source))
    if not asked:
        raise DataError("no row ends with an assistant's answer, so nothing can be asked and graded")
    return asked


def score(
    base: Base,
    adapter: str | None,
    questions: Sequence[Question],
    examples: Sequence[Example],
    template: ChatTemplate,
    grader: Grader,
    max_new_tokens: int,
    batch_size: int,
    on_finished: Callable[[int], None] | None = None,
) -> Scores:
    """Answer every question greedily and grade it; the loss is over the learned tokens of `examples`. Without questions
    the loss is all there is."""
    start = time.perf_counter()
    [new] = _written(base, [adapter], questions, template, max_new_tokens, batch_size, on_finished)
    seconds = time.perf_counter() - start
    scored = _graded(base, adapter, new, questions, examples, grader)
    if not questions:
        return scored
    read, wrote = sum(len(question.tokens) for question in questions), sum(map(len, new))
    speed = {
        "tokens_per_second": round((read + wrote) / seconds, 1), "answer_tokens": wrote, "seconds": round(seconds, 2),
    }  # fmt: skip
    return Scores(scored.summary | speed, scored.answers, scored.grades)


def score_together(
    base: Base,
    adapters: Sequence[str | None],
    questions: Sequence[Question],
    examples: Sequence[Example],
    template: ChatTemplate,
    grader: Grader,
    max_new_tokens: int,
    batch_size: int,
    on_finished: Callable[[int], None] | None = None,
) -> list[Scores]:
    """`score` for several adapters, one after another in the result, whose answers are written in one call; a batch may
    hold several. The figures say nothing of speed, which they share."""
    written = _written(base, adapters, questions, template, max_new_tokens, batch_size, on_finished)
    return [_graded(base, adapter, new, questions, examples, grader) for adapter, new in zip(adapters, written)]


def _written(
    base: Base, adapters: Sequence[str | None], questions: Sequence[Question], template: ChatTemplate,
    max_new_tokens: int, batch_size: int, on_finished: Callable[[int], None] | None,
) -> list[list[list[int]]]:  # fmt: skip
    """Each adapter's answers to all questions, as tokens."""
    if not questions:
        return [[] for _ in adapters]
    new = generate(
        base,
        [question.tokens for question in questions] * len(adapters),
        [adapter for adapter in adapters for _ in questions],
        stop_ids(template),
        Sampling(max_new_tokens=max_new_tokens),
        batch_size,
        on_finished,
    )
    return [new[at : at + len(questions)] for at in range(0, len(new), len(questions))]


def _graded(
    base: Base, adapter: str | None, new: Sequence[list[int]], questions: Sequence[Question],
    examples: Sequence[Example], grader: Grader,
) -> Scores:  # fmt: skip
    answers = tuple(base.text(tokens) for tokens in new)
    grades = tuple(grade(answer, question.reference, grader) for answer, question in zip(answers, questions))
    shares = summarise(grades, grader) if questions else {}
    return Scores({**shares, "loss": mean_answer_loss(base, adapter, examples)}, answers, grades)


@torch.no_grad()
def mean_answer_loss(base: Base, adapter: str | None, examples: Sequence[Example]) -> float:
    """Nats per learned token."""
    budget = max(TOKENS_PER_PASS, *(len(example.tokens) for example in examples))
    total = count = 0.0
    with computing_threads("auto") as threads:
        for indices in pack([len(example.tokens) for example in examples], budget):
            threads.look()
            batch = collate([examples[i] for i in indices], adapter).to(base.device)
            total -= float((batch.labels.loss_weights * base.log_probabilities(batch)).sum())
            count += float(batch.labels.loss_weights.sum())
    return total / count
