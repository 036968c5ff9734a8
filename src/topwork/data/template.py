"""From conversations to token ids and the weights with which they are learned, by the model's own chat template.

An answer is found by difference: the template renders the messages before it, opening the assistant's turn (what
generation is prompted with), and then the messages up to it. The difference is what the model has to say. So the tokens
before a learned answer are always the tokens that generation is prompted with. Where a template rewrites history
(Qwen 3 leaves out earlier thinking), no single sequence has this property for all turns, and the conversation becomes
one sequence per answer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

from topwork.common.errors import DataError
from topwork.data.calls import CallFormat, call_format
from topwork.data.conversations import BadRow, Conversation, Message, RowProblem
from topwork.data.rendering import Renderer, TemplateRejects, folded

TrainOn = Literal["answers", "last_answer", "all"]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Encoded:
    """A sequence. weights[i] is the weight with which tokens[i] is learned from tokens[:i]; weights[0] is 0.

    notes  what of the conversation the template left out, as `Conversation.notes`
    """

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Turn:
    """The texts of one learned answer: what generation is prompted with, and the same through the end of the turn."""

    prompt: str
    through: str
    weight: float


@dataclass(frozen=True)
class _Rendered:
    """A conversation or a document of which everything is learned.

    Where messages have weights of their own: `upto` are the conversation's beginnings through each message.
    """

    text: str
    upto: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    document: bool = False


class ChatTemplate:
    """`template` is None (the tokenizer's own), `chatml`, `plain`, a file, or Jinja; `fold_system` see DataConfig."""

    def __init__(self, tokenizer: Any, template: str | None = None, fold_system: bool = False) -> None:
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, template, fold_system)

    @property
    def jinja(self) -> str | None:
        """The template's text, to be saved with a model; None where there is none."""
        return self.renderer.jinja

    @cached_property
    def takes_system(self) -> bool:
        """Whether it renders a system message."""
        try:
            return "topworkprobesystem" in self.renderer.render(
                [Message("system", "topworkprobesystem"), Message("user", "x")], None, True
            )
        except TemplateRejects:
            return False

    @cached_property
    def calls(self) -> CallFormat | None:
        """How the template writes tool calls; None where it has no way of its own."""
        return call_format(self.renderer)

    def prompt_ids(
        self, messages: Sequence[Message], tools: Tools = None, variables: Mapping[str, Any] | None = None,
        goes_on: bool = False,
    ) -> list[int]:  # fmt: skip
        """What generation is prompted with: the messages and the opened assistant's turn.

        variables  what else the template reads (`enable_thinking`)
        goes_on    the last message is the assistant's and is left open, for the answer to go on with it

        Raises DataError.
        """
        if goes_on and (not messages or messages[-1].role != "assistant" or messages[-1].extra.get("tool_calls")):
            last = messages[-1].role + "'s" if messages else "not there"
            raise DataError(f"an answer goes on with the assistant's text, and the last message is the {last}")
        try:
            text = self._rendered(messages, tools, not goes_on, variables, goes_on)
            text.encode()
        except RowProblem as problem:
            raise DataError(f"these messages cannot be put to the model: {problem}") from problem
        except UnicodeEncodeError as error:
            raise DataError("these messages cannot be put to the model: half a surrogate pair is no text") from error
        return self.renderer.ids([text])[0]

    def encode(self, conversation: Conversation, train_on: TrainOn = "answers") -> list[Encoded]:
        """One sequence, or one per learned answer where the template rewrites history. Raises DataError."""
        (encoded,), bad = self.encode_all([conversation], train_on)
        if bad:
            raise DataError(f"{bad[0].source}: {bad[0].reason}")
        return encoded

    def encode_all(
        self, conversations: Sequence[Conversation], train_on: TrainOn = "answers"
    ) -> tuple[list[list[Encoded]], list[BadRow]]:
        """Each conversation's sequences, none for a bad row; all texts are tokenized in one call.

        Raises DataError where the template cannot do at all what the recipe asks.
        """
        plans: list[Sequence[_Turn | _Rendered]] = []
        bad: list[BadRow] = []
        for conversation in conversations:
            try:
                plans.append(self._plan(conversation, train_on))
            except RowProblem as problem:
                plans.append(())
                bad.append(BadRow(conversation.source, str(problem)))
        texts = list(dict.fromkeys(text for plan in plans for part in plan for text in _texts(part)))
        ids = dict(zip(texts, self.renderer.ids(texts)))
        return [self._encoded(plan, ids) for plan in plans], bad

    # What is rendered

    def _plan(self, conversation: Conversation, train_on: TrainOn) -> Sequence[_Turn | _Rendered]:
        if conversation.kind == "text":
            return (_Rendered(conversation.text or "", document=True),)
        messages, tools = conversation.messages, conversation.tools
        if train_on == "all":
            return (self._whole(messages, tools),)
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        chosen = answers[-1:] if train_on == "last_answer" else answers
        learned = [number for number in chosen if messages[number].weight != 0]
        if not learned:
            raise RowProblem("nothing to learn: every answer has the weight 0")
        turns = [self._turn(messages, number, tools) for number in learned]
        self._check_complete(messages[: learned[-1]], tools, turns[-1].prompt)
        return turns

    def _turn(self, messages: Sequence[Message], number: int, tools: Tools) -> _Turn:
        if number == 0:
            raise RowProblem("the first message is the assistant's, so there is nothing that it answers")
        prompt = self._rendered(messages[:number], tools, True)
        whole = self._rendered(messages[: number + 1], tools, False)
        if not whole.startswith(prompt):
            near = max(0, _shared(prompt, whole) - 20)
            fold = "data.fold_system: true, or " if messages[0].role == "system" else ""
            raise RowProblem(
                f"the chat template opens the assistant's turn with {prompt[near : near + 60]!r} when generating, but "
                f"writes {whole[near : near + 60]!r} where the answer is given, so what is learned would never be "
                f"generated; set {fold}data.chat_template to one that does the same in both, for example chatml"
            )
        answer = messages[number]
        for call in answer.extra.get("tool_calls", ()):
            if call["function"]["name"] not in whole[len(prompt) :]:
                raise RowProblem(
                    f"the chat template leaves out the tool call {call['function']['name']}; {_TRY_CHATML}"
                )
        weight = 1.0 if answer.weight is None else answer.weight
        return _Turn(prompt, prompt + self.renderer.cut(whole[len(prompt) :]), weight)

    def _whole(self, messages: Sequence[Message], tools: Tools) -> _Rendered:
        text = self._rendered(messages, tools, False)
        self._check_complete(messages[:-1], tools, text)
        weights = tuple(1.0 if message.weight is None else message.weight for message in messages)
        if not any(weights):
            raise RowProblem("nothing to learn: every message has the weight 0")
        if all(weight == 1.0 for weight in weights):
            return _Rendered(text)
        upto = [self._rendered(messages[: number + 1], tools, False) for number in range(len(messages) - 1)]
        return _Rendered(text, (*upto, text), weights)

    def _rendered(
        self, messages: Sequence[Message], tools: Tools, prompt: bool, variables: Mapping[str, Any] | None = None,
        goes_on: bool = False,
    ) -> str:  # fmt: skip
        """Raises DataError where the template rejects a system message, RowProblem where it rejects these messages."""
        try:
            return self.renderer.render(messages, tools, prompt, variables, goes_on)
        except TemplateRejects as error:
            reason = str(error)
        if not self.renderer.fold_system and any(message.role == "system" for message in messages):
            try:
                self.renderer.render(folded(messages), tools, prompt, variables, goes_on)
            except TemplateRejects:
                pass
            else:
                raise DataError(
                    f"the chat template rejects a system message ({reason!r}); set data.fold_system: true, which puts "
                    "it at the head of the first user turn, or leave system messages out"
                )
        raise RowProblem(f"the chat template rejects these messages: {reason!r}")

    def _check_complete(self, messages: Sequence[Message], tools: Tools, rendered: str) -> None:
        """Raises RowProblem where the template passes over a message or the tools in silence."""
        for tool in tools or ():
            name = tool["function"].get("name")
            if name and name not in rendered:
                raise RowProblem(f"the chat template leaves out the tools, {name} among them; {_TRY_CHATML}")
        for number, message in enumerate(messages):
            content = message.content.strip()
            if message.role == "assistant" or content in rendered or json.dumps(content)[1:-1] in rendered:
                continue
            marked = list(messages)
            marked[number] = Message(message.role, "topworkprobecontent", None, message.extra)
            if "topworkprobecontent" not in self._rendered(marked, tools, True):
                raise RowProblem(f"the chat template leaves out message {number + 1} ({message.role})")

    # What is learned

    def _encoded(self, plan: Sequence[_Turn | _Rendered], ids: dict[str, list[int]]) -> list[Encoded]:
        sequences: list[Encoded] = []
        for part in plan:
            if isinstance(part, _Rendered):
                sequences.append(self._everything(part, ids))
                continue
            prompt, answer = ids[part.prompt], self._answer(part, ids)
            # An answer joins the sequence before it only if that sequence is what generation would be prompted with.
            if not sequences or prompt[: len(sequences[-1].tokens)] != sequences[-1].tokens:
                sequences.append(Encoded())
            tokens, weights = sequences[-1].tokens, sequences[-1].weights
            new = prompt[len(tokens) :]
            tokens += new + answer
            weights += [0.0] * len(new) + [part.weight] * len(answer)
        return [_first_unlearned(sequence) for sequence in sequences]

    def _answer(self, turn: _Turn, ids: dict[str, list[int]]) -> list[int]:
        prompt, through = ids[turn.prompt], ids[turn.through]
        if through[: len(prompt)] == prompt:
            answer = through[len(prompt) :]
        else:  # the answer's first letters would merge with the prompt's last
            answer = self.renderer.ids_after(turn.through[len(turn.prompt) :])
        return answer if self.renderer.ends_turn(turn.through) else [*answer, self._eos()]

    def _everything(self, whole: _Rendered, ids: dict[str, list[int]]) -> Encoded:
        tokens = list(ids[whole.text])
        weights, start = [1.0] * len(tokens), 0
        for text, weight in zip(whole.upto, whole.weights):
            stop = max(start, _shared(ids[text], tokens))
            weights[start:stop] = [weight] * (stop - start)
            start = stop
        if whole.document and self.renderer.adds_bos:
            tokens, weights = [self.tokenizer.bos_token_id, *tokens], [0.0, *weights]
        if not self.renderer.ends_turn(whole.text.rstrip()):
            tokens, weights = [*tokens, self._eos()], [*weights, whole.weights[-1] if whole.weights else 1.0]
        return _first_unlearned(Encoded(tokens, weights))

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "neither the chat template nor the tokenizer has a token that ends a turn, so the model could not "
                "learn to stop; set the tokenizer's eos_token, or a data.chat_template that closes the assistant's turn"
            )
        return int(self.tokenizer.eos_token_id)


_TRY_CHATML = "data.chat_template: chatml renders them"


def stop_ids(template: ChatTemplate) -> set[int]:
    """The token ids that end the assistant's turn, for generation: those that are learned, and the tokenizer's EOS."""
    return set(template.renderer.end_ids)


def _texts(part: _Turn | _Rendered) -> Iterable[str]:
    return (part.prompt, part.through) if isinstance(part, _Turn) else (part.text, *part.upto)


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def _first_unlearned(sequence: Encoded) -> Encoded:
    """Nothing stands before the first token from which it could be learned."""
    if sequence.weights:
        sequence.weights[0] = 0.0
    return sequence
