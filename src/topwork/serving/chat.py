"""A chat's answer as OpenAI writes it, in chunks or whole. The whole is the sum of the chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.generation.calls import CallParser, Delta, together
from topwork.generation.text import token_bytes, token_text
from topwork.serving.answering import Piece, Scored, usage
from topwork.serving.asking import Prepared
from topwork.serving.openai import ChatRequest


@dataclass
class _Choice:
    """What one choice has said so far."""

    parser: CallParser
    deltas: list[Delta] = field(default_factory=list)
    scored: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    told: int = 0
    """So many of its tokens have been told in chunks."""


class ChatAnswer:
    """Takes the pieces of a request's choices (`take`); gives chunks, and the whole when all have ended."""

    def __init__(
        self, asked: ChatRequest, prepared: Prepared, tokenizer: Any, id: str, created: int, model: str
    ) -> None:  # fmt: skip
        assert prepared.use is not None
        self.asked, self.prepared, self.tokenizer = asked, prepared, tokenizer
        self.id, self.created, self.model = id, created, model
        self.choices = [_Choice(prepared.use.parser()) for _ in range(prepared.choices)]

    def opening(self) -> Iterator[dict[str, Any]]:
        """A chunk for each choice with the role."""
        for index in range(len(self.choices)):
            chunk = self._chunk(index, {"role": "assistant", "content": ""}, None)
            if self.asked.return_token_ids and index == 0:
                chunk["prompt_token_ids"] = list(self.prepared.prompts[0])
            yield chunk

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunks that a piece makes, none where nothing may be shown yet."""
        choice = self.choices[piece.choice]
        deltas = choice.parser.add(piece.text) if piece.text else []
        if choice.parser.ended:  # all calls that it may have are there
            piece.ended = piece.ended or "stop"
        deltas += choice.parser.finish() if piece.ended is not None else []
        choice.deltas += deltas
        choice.tokens += piece.tokens
        if self.asked.logprobs:
            choice.scored += [scored_token(self.tokenizer, one) for one in piece.scored]
        if piece.ended is not None:
            choice.finish_reason = "tool_calls" if choice.parser.called and piece.ended == "stop" else piece.ended
        for delta in deltas:
            yield self._told(piece.choice, _as_delta(delta), None)
        if choice.finish_reason is not None:
            yield self._told(piece.choice, {}, choice.finish_reason)

    def counted(self) -> dict[str, Any]:
        """The last chunk, of what it cost."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        body = {**self._head("chat.completion"), "choices": [self._whole(i) for i in range(len(self.choices))]}
        if self.asked.return_token_ids:
            body["prompt_token_ids"] = list(self.prepared.prompts[0])
        return {**body, "usage": self._usage()}

    def _whole(self, index: int) -> dict[str, Any]:
        choice = self.choices[index]
        said = together(choice.deltas)
        message: dict[str, Any] = {"role": "assistant", "content": said.text or (None if said.calls else "")}
        message["refusal"] = None
        if said.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in said.calls
            ]
        found = {"index": index, "message": message, "logprobs": self._logprobs(choice.scored)}
        found["finish_reason"] = choice.finish_reason
        return {**found, "token_ids": choice.tokens} if self.asked.return_token_ids else found

    def _told(self, index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        """A chunk, with all tokens that were not told yet."""
        choice = self.choices[index]
        chunk = self._chunk(index, delta, finish_reason, choice.scored[choice.told :])
        if self.asked.return_token_ids:
            chunk["choices"][0]["token_ids"] = choice.tokens[choice.told :]
        choice.told = len(choice.tokens)
        return chunk

    def _chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None, scored: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:  # fmt: skip
        told = {"index": index, "delta": delta, "logprobs": self._logprobs(scored) if scored else None}
        return {**self._head("chat.completion.chunk"), "choices": [{**told, "finish_reason": finish_reason}]}

    def _logprobs(self, scored: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": list(scored), "refusal": None} if self.asked.logprobs else None

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, Any]:
        return usage(self.prepared.prompt_tokens, sum(len(choice.tokens) for choice in self.choices))


def scored_token(tokenizer: Any, one: Scored) -> dict[str, Any]:
    """OpenAI's entry for a token."""
    return {**_entry(tokenizer, one.token, one.logprob), "top_logprobs": [_entry(tokenizer, *e) for e in one.likeliest]}


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(token_bytes(tokenizer, token)),
    }  # fmt: skip


def _as_delta(delta: Delta) -> dict[str, Any]:
    if delta.call is None:
        return {"content": delta.text}
    called: dict[str, Any] = {"index": delta.call}
    if delta.id is None:
        return {"tool_calls": [{**called, "function": {"arguments": delta.arguments}}]}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"tool_calls": [{**called, "id": delta.id, "type": "function", "function": function}]}
