"""Conversations, and what is learned of them, as text."""

from typing import Any

from topwork.data.chat.template import ChatTemplate, Encoded
from topwork.data.conversations import Conversation, Message


def user(text: str) -> Message:
    return Message("user", text)


def said(text: str, weight: float | None = None, **extra: Any) -> Message:
    return Message("assistant", text, weight, extra)


def chat(*messages: Message, tools: list[dict[str, Any]] | None = None) -> Conversation:
    return Conversation(messages, tools, "train.jsonl:1")


def text(content: str, number: int = 1) -> Conversation:
    return Conversation((), None, f"train.jsonl:{number}", "text", content)


def shown(template: ChatTemplate, encoded: Encoded) -> str:
    """The sequence as text, its learned stretches in ⟦ ⟧."""
    runs: list[tuple[bool, list[int]]] = []
    for token, weight in zip(encoded.tokens, encoded.weights, strict=True):
        if not runs or runs[-1][0] != bool(weight):
            runs.append((bool(weight), []))
        runs[-1][1].append(token)
    texts = [(learned, template.tokenizer.decode(ids, skip_special_tokens=False)) for learned, ids in runs]
    return "".join(f"⟦{each}⟧" if learned else each for learned, each in texts)


def learned(template: ChatTemplate, *messages: Message, tools: list[dict[str, Any]] | None = None) -> list[str]:
    """The learned stretches of a conversation, one for each answer."""
    found = []
    for encoded in template.encode(chat(*messages, tools=tools)):
        found += [part.split("⟧")[0] for part in shown(template, encoded).split("⟦")[1:]]
    return found


def check_prompts(template: ChatTemplate, *messages: Message, tools: list[dict[str, Any]] | None = None) -> None:
    """Every learned stretch follows exactly the ids that generation is prompted with, and ends in what ends a turn."""
    answers = [n for n, message in enumerate(messages) if message.role == "assistant" and message.weight != 0 and n]
    found = []
    for item in template.encode(chat(*messages, tools=tools)):
        weights = [*item.weights, 0.0]
        starts = [i for i, weight in enumerate(item.weights) if weight and not weights[i - 1]]
        ends = [item.tokens[i] for i, weight in enumerate(item.weights) if weight and not weights[i + 1]]
        assert set(ends) <= set(template.renderer.end_ids)
        found += [item.tokens[:start] for start in starts]
    assert found == [template.prompt_ids(messages[:number], tools) for number in answers]
