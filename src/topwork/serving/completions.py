"""A completion as OpenAI writes it, in chunks or whole. The whole is the sum of the chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.generation.text import token_text
from topwork.serving.answering import Piece, Scored, usage
from topwork.serving.asking import Prepared
from topwork.serving.openai import CompletionRequest


@dataclass
class _Choice:
    """What one choice has said so far."""

    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    told: int = 0
    """So many of its tokens have been told in chunks."""
    offset: int = 0
    """Where in the text the next token begins, the tokens' own texts put together."""


class CompletionAnswer:
    """Takes the pieces of a request's choices (`take`); gives chunks, and the whole when all have ended."""

    def __init__(
        self, asked: CompletionRequest, prepared: Prepared, tokenizer: Any, id: str, created: int, model: str
    ) -> None:  # fmt: skip
        self.asked, self.prepared, self.tokenizer = asked, prepared, tokenizer
        self.id, self.created, self.model = id, created, model
        self.choices = [_Choice() for _ in range(prepared.choices)]

    def opening(self) -> Iterator[dict[str, Any]]:
        """The prompts, where they are asked for."""
        for index, choice in enumerate(self.choices):
            if not (self.asked.echo or self.asked.return_token_ids):
                return
            choice.text = self._echo(index)
            chunk = self._chunk(index, choice.text, None, None)
            if self.asked.return_token_ids:
                chunk["choices"][0] |= {"prompt_token_ids": list(self.prepared.prompt_of(index)), "token_ids": []}
            yield chunk

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunk that a piece makes, none where nothing may be shown yet."""
        choice = self.choices[piece.choice]
        choice.text += piece.text
        choice.tokens += piece.tokens
        choice.scored += piece.scored
        choice.finish_reason = piece.ended
        if not piece.text and piece.ended is None:
            return
        new, first = choice.scored[choice.told :], choice.told
        chunk = self._chunk(piece.choice, piece.text, piece.ended, self._logprobs(choice, new))
        if self.asked.return_token_ids:
            chunk["choices"][0]["token_ids"] = choice.tokens[first:]
        choice.told = len(choice.tokens)
        yield chunk

    def counted(self) -> dict[str, Any]:
        """The last chunk, of what it cost."""
        return {**self._head(), "choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        return {**self._head(), "choices": [self._whole(i) for i in range(len(self.choices))], "usage": self._usage()}

    def _whole(self, index: int) -> dict[str, Any]:
        choice = self.choices[index]
        choice.offset = 0
        found = {
            "index": index, "text": choice.text, "logprobs": self._logprobs(choice, choice.scored),
            "finish_reason": choice.finish_reason,
        }  # fmt: skip
        if not self.asked.return_token_ids:
            return found
        return {**found, "token_ids": choice.tokens, "prompt_token_ids": list(self.prepared.prompt_of(index))}

    def _echo(self, index: int) -> str:
        return self.prepared.texts[index // self.prepared.per_prompt] if self.asked.echo else ""

    def _logprobs(self, choice: _Choice, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        tokens = [token_text(self.tokenizer, one.token) for one in scored]
        offsets = []
        for text in tokens:
            offsets.append(choice.offset)
            choice.offset += len(text)
        likeliest = [
            {
                token_text(self.tokenizer, token): logprob
                for token, logprob in (*one.likeliest, (one.token, one.logprob))
            }
            for one in scored
        ]
        return {
            "tokens": tokens, "token_logprobs": [one.logprob for one in scored], "top_logprobs": likeliest,
            "text_offset": offsets,
        }  # fmt: skip

    def _chunk(
        self, index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:  # fmt: skip
        told = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head(), "choices": [told]}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, Any]:
        return usage(self.prepared.prompt_tokens, sum(len(choice.tokens) for choice in self.choices))
