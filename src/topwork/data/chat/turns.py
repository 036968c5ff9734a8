"""A conversation's learned turns as text: what generation is prompted with, and what is to be said then."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from topwork.common.errors import DataError
from topwork.data.chat import complete, thinking
from topwork.data.chat.prepared import LETTERS as LETTERS
from topwork.data.chat.prepared import Prepared, Preparer, Tools
from topwork.data.chat.rendering import Renderer, TemplateRejects, folded
from topwork.data.chat.spans import Pieces, Whole, shared
from topwork.data.conversations import Message, RowProblem
from topwork.data.meaning.usable import merged_turns

FIRST = "the assistant's first turn answers nothing and is not learned"
CUT = "the assistant's first turn is cut: the chat template wants the user to begin"
OTHERWISE = "the template's {% generation %} marks something else than what generation has to say, which is learned"
_ENOUGH = 3
"""Answers from which on one rendering of the whole is sooner than one of each beginning."""
_SAID = "topworkprobeanswer"
_TRY_CHATML = "data.chat_template: chatml renders them"


@dataclass(frozen=True)
class TurnText:
    """What generation is prompted with, and what it then has to say, the end of the turn included."""

    prompt: str
    answer: str
    weight: float


Texts = Callable[[int, bool], str]


class _Rejected(RowProblem):
    """The template does not take these messages."""


class Turns:
    """Renders what is learned. `allow`: answers of which the template leaves something out are learned all the same."""

    def __init__(self, renderer: Renderer, preparer: Preparer, allow: bool = False) -> None:
        self.renderer, self.preparer, self.allow = renderer, preparer, allow

    def learned(self, prepared: Prepared, last: bool) -> tuple[list[TurnText], tuple[str, ...]]:
        """The learned answers, or the last alone, and what is told of them. Raises RowProblem."""
        try:
            return self._learned(prepared, last)
        except _Rejected:
            kept = _without_opening(prepared)
            if kept is None or not any(message.role == "assistant" for message in kept.messages):
                raise
            return self._learned(kept, last)

    def prompt(
        self, prepared: Prepared, variables: Mapping[str, Any] | None, goes_on: bool, as_learned: bool
    ) -> str:  # fmt: skip
        """What generation is prompted with; `as_learned` cuts the opening that `learned` cuts. Raises RowProblem."""
        try:
            return self.rendered(prepared.messages, prepared.tools, not goes_on, variables, goes_on)
        except _Rejected:
            kept = _without_opening(prepared) if as_learned else None
            if kept is None:
                raise
            return self.rendered(kept.messages, kept.tools, not goes_on, variables, goes_on)

    def _learned(self, prepared: Prepared, last: bool) -> tuple[list[TurnText], tuple[str, ...]]:
        messages, notes = prepared.messages, list(prepared.notes)
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        chosen = [number for number in (answers[-1:] if last else answers) if messages[number].weight != 0]
        if not chosen:
            alone = (
                "the last answer, which data.train_on learns alone," if len(answers) > 1 and last else "every answer"
            )
            raise RowProblem(f"nothing to learn: {alone} has the weight 0")
        if chosen[0] == 0:
            if len(chosen) == 1:
                raise RowProblem("the first message is the assistant's, so there is nothing that it answers")
            chosen, notes = chosen[1:], [*notes, FIRST]
        turns = []
        text = self._texts(messages, prepared.tools, len(chosen))
        for number in chosen:
            turn, told = self._turn(messages, number, prepared.tools, text)
            turns.append(turn)
            notes += told
        notes += self._check_context(messages[: chosen[-1]], prepared.tools, turns[-1].prompt)
        return turns, tuple(dict.fromkeys(notes))

    def _texts(self, messages: Sequence[Message], tools: Tools, answers: int) -> Texts:
        """The text of the first so many messages, and whether the assistant's turn is opened behind them."""
        whole = self.renderer.whole(messages, tools) if answers >= _ENOUGH and self.preparer.split else None
        if whole is not None and all(
            whole.beginning(count, prompt) == self.rendered(messages[:count], tools, prompt)
            for count, prompt in ((len(messages), False), (len(messages) // 2 + 1, True))
        ):
            return whole.beginning
        return lambda count, prompt: self.rendered(messages[:count], tools, prompt)

    def _turn(self, messages: Sequence[Message], number: int, tools: Tools, text: Texts) -> tuple[TurnText, list[str]]:
        message, prompt, whole = messages[number], text(number, True), text(number + 1, False)
        if thinking.is_cut_off(message.content):
            raise RowProblem("the answer begins with <think> and never ends it, as one that was cut off")
        if thinking.has_thinking(message.content) and self.preparer.form.strips:
            answer = self._verbatim(messages[: number + 1], tools, prompt)
        elif whole.startswith(prompt):
            answer = self.renderer.cut(whole[len(prompt) :])
        else:
            answer = self._behind_opening(messages[: number + 1], tools, prompt, whole)
        answer = answer if self.preparer.split else self._ended_once(answer)
        said = self.renderer.tokens.said(answer) if self.preparer.split else answer
        notes = self._lost(message, complete.missing(message, said))
        if self.renderer.marks_generation and not self._marks_agree(messages[: number + 1], tools, answer):
            notes = [*notes, OTHERWISE]
        return TurnText(prompt, answer, 1.0 if message.weight is None else message.weight), notes

    def _behind_opening(self, messages: Sequence[Message], tools: Tools, prompt: str, whole: str) -> str:
        """An answer behind the opening of its turn, where the template writes turns before it otherwise once it is
        there, as Qwen 3 does with an answer that another one follows: the prompt is what generation is given."""
        before = self.rendered(messages[:-1], tools, False)
        opening = prompt[len(before) :] if prompt.startswith(before) else ""
        at = whole.rfind(opening) if any(text in opening for text in self.renderer.tokens.control) else -1
        if at < 0:
            raise RowProblem(self._opens_otherwise(messages, prompt, whole))
        return self.renderer.cut(whole[at + len(opening) :])

    def _opens_otherwise(self, messages: Sequence[Message], prompt: str, whole: str) -> str:
        opened = thinking.opening(prompt)
        if opened and whole.startswith(prompt[: -len(opened)]):
            return (
                f"the chat template opens an answer's thinking ({opened!r}) when generating, and this answer has "
                "none, so what is learned would never be generated; give answers their thinking, or set "
                "data.chat_template to one that opens none, for example chatml"
            )
        if thinking.is_closed(prompt) and thinking.THINKS in whole:
            return (
                "the prompt for an answer says that there is no thinking (as with enable_thinking: false), and this "
                "answer has some; set data.thinking: drop, or leave out data.chat_template_kwargs"
            )
        near = max(0, shared(prompt, whole) - 20)
        fold = "data.fold_system: true, or " if messages[0].role == "system" else ""
        merge = "data.merge_turns: true, or " if len(_merged(messages)) < len(messages) else ""
        return self.renderer.tokens.unmarked(
            f"the chat template opens the assistant's turn with {prompt[near : near + 60]!r} when generating, but "
            f"writes {whole[near : near + 60]!r} where the answer is given, so what is learned would never be "
            f"generated; set {fold}{merge}data.chat_template to one that does the same in both, for example chatml"
        )

    def _verbatim(self, messages: Sequence[Message], tools: Tools, prompt: str) -> str:
        """An answer as it stands, in place of what a template writes that takes its thinking out: after what generation
        is prompted with, which may have opened the thinking already, and with the template's end of the turn."""
        answer = messages[-1]
        plain = replace(answer, content=_SAID, extra={k: v for k, v in answer.extra.items() if k not in thinking.KEYS})
        whole = self.rendered([*messages[:-1], plain], tools, False)
        start = shared(prompt, whole)
        opening = prompt[start:]
        head, found, tail = whole[start:].partition(_SAID)
        if not found or head.strip() or (opening.strip() and thinking.opening(opening) != opening):
            raise RowProblem(self._opens_otherwise(messages, prompt, whole))
        content = answer.content
        if opening.strip():
            content, head = thinking.after_opening(content, opening), ""
        return head + content + self.renderer.cut(_SAID + tail)[len(_SAID) :]

    def _ended_once(self, answer: str) -> str:
        """Where rows bring their own markup, an answer may bring the end of its turn."""
        end = self.renderer.closing.text
        return answer[: -len(end)] if end and answer.endswith(end * 2) else answer

    def _marks_agree(self, messages: Sequence[Message], tools: Tools, answer: str) -> bool:
        """Whether the template's own marks mark the answer, its end and white space aside."""
        whole, marks = self.renderer.generated(messages, tools)
        if not marks:
            return False
        end = self.renderer.closing.text.strip()
        said, marked = answer.strip(), whole[marks[-1][0] : marks[-1][1]].strip()
        return said.removesuffix(end).strip() == marked.removesuffix(end).strip()

    def whole(self, prepared: Prepared) -> tuple[Whole, tuple[str, ...]]:
        """A conversation of which everything is learned. Raises RowProblem."""
        messages, tools = prepared.messages, prepared.tools
        text = self.rendered(messages, tools, False)
        if thinking.has_thinking(messages[-1].content) and self.preparer.form.strips:
            prompt = self.rendered(messages[:-1], tools, True)
            text = prompt + self._verbatim(messages, tools, prompt)
        weights = tuple(1.0 if message.weight is None else message.weight for message in messages)
        if not any(weights):
            raise RowProblem("nothing to learn: every message has the weight 0")
        notes = [*prepared.notes, *self._check_context(messages[:-1], tools, text)]
        notes += self._lost(messages[-1], complete.missing(messages[-1], text))
        if all(weight == 1.0 for weight in weights):
            upto, weights = [text], (1.0,)
        else:
            upto = [self.rendered(messages[: number + 1], tools, False) for number in range(len(messages) - 1)]
            upto.append(text)
        pieces, ends = Pieces(self.renderer.tokens), self.renderer.tokens.ends_turn(text.rstrip())
        return Whole(tuple(map(pieces.after, upto)), weights, ends), tuple(dict.fromkeys(notes))

    def rendered(
        self, messages: Sequence[Message], tools: Tools, prompt: bool, variables: Mapping[str, Any] | None = None,
        goes_on: bool = False,
    ) -> str:  # fmt: skip
        """Raises DataError where the template rejects a system message, RowProblem where it rejects these messages."""
        try:
            text = self.renderer.render(messages, tools, prompt, variables, goes_on)
            return text if self.preparer.split else self._begun_once(text)
        except TemplateRejects as error:
            reason = self.renderer.tokens.unmarked(str(error))

        def takes(others: Sequence[Message]) -> bool:
            try:
                return bool(self.renderer.render(others, tools, prompt, variables, goes_on))
            except TemplateRejects:
                return False

        has_system = any(message.role == "system" for message in messages)
        if not self.renderer.fold_system and has_system and takes(folded(messages)):
            raise DataError(
                f"the chat template rejects a system message ({reason!r}); set data.fold_system: true, which puts "
                "it at the head of the first user turn, or leave system messages out"
            )
        raise _Rejected(f"the chat template rejects these messages: {reason!r}{self._remedy(messages, takes)}")

    def _remedy(self, messages: Sequence[Message], takes: Any) -> str:
        merged = _merged(messages)
        if len(merged) < len(messages) and takes(merged):
            return "; set data.merge_turns: true, which makes one turn of several of one role"
        if len(merged) < len(messages) and takes(folded(merged)):
            return (
                "; set data.merge_turns: true, which makes one turn of several of one role, and data.fold_system: "
                "true, which puts the system message at the head of the first user turn"
            )
        rest = [message for message in messages if message.role != "system"]
        if rest and rest[0].role == "assistant":
            return "; it wants the user to begin, so leave the first turn out, or set data.chat_template: chatml"
        return ""

    def _begun_once(self, text: str) -> str:
        bos = self.renderer.tokenizer.bos_token
        return text[len(bos) :] if bos and self.renderer.adds_bos and text.startswith(bos * 2) else text

    # What is lost

    def _lost(self, message: Message, gone: Sequence[str], earlier: bool = False) -> list[str]:
        """Notes on what the template leaves out, where that is allowed. Raises RowProblem."""
        if not gone:
            return []
        which = "an earlier answer's" if earlier else "the answer's"
        if not self.allow or (not earlier and len(gone) == len(complete.kinds(message))):
            raise RowProblem(self.renderer.tokens.unmarked(_remedied(gone[0], which)))
        return [
            f"the chat template leaves out {each if each.startswith('the ') else f'{which} {each}'}" for each in gone
        ]

    def _check_context(self, messages: Sequence[Message], tools: Tools, rendered: str) -> list[str]:
        """Notes on, or RowProblem for, what the template passes over in silence: messages or tools."""
        notes: list[str] = []
        for tool in tools or ():
            name = tool["function"].get("name")
            if name and (name not in rendered or not self._tells_tools):
                raise RowProblem(f"the chat template leaves out the tools, {name} among them; {_TRY_CHATML}")
        at = 0
        for number, message in enumerate(messages):
            plain = message.role != "assistant" or not (message.extra or thinking.has_thinking(message.content))
            end = complete.stands_in(message.content, rendered, at) if plain else -1
            if end >= 0:
                at = end
            elif message.role == "assistant":
                notes += self._lost(message, complete.missing(message, rendered, False), True)
            else:
                self._check_rendered(messages, number, tools)
        return notes

    @cached_property
    def _tells_tools(self) -> bool:
        """Whether the template writes tools at all: a call among the messages names one too."""
        name = "topworkprobetool"
        tools = [{"type": "function", "function": {"name": name, "description": name, "parameters": {}}}]
        for chat in ([Message("user", "x")], [Message("system", "x"), Message("user", "x")]):
            try:
                if name in self.renderer.render(chat, tools, True):
                    return True
            except TemplateRejects:
                continue
        return False

    def _check_rendered(self, messages: Sequence[Message], number: int, tools: Tools) -> None:
        """A template may write a message in other words; it must not write nothing of it."""
        marked = list(messages)
        marked[number] = replace(messages[number], content="topworkprobecontent", weight=None)
        if "topworkprobecontent" not in self.rendered(marked, tools, True):
            raise RowProblem(f"the chat template leaves out message {number + 1} ({messages[number].role})")


def _without_opening(prepared: Prepared) -> Prepared | None:
    """Without an assistant's turn that stands before all others but the system's; None where there is none."""
    messages = prepared.messages
    first = next((n for n, message in enumerate(messages) if message.role != "system"), 0)
    if not messages or messages[first].role != "assistant":
        return None
    return replace(prepared, messages=messages[:first] + messages[first + 1 :], notes=(*prepared.notes, CUT))


def _merged(messages: Sequence[Message]) -> Sequence[Message]:
    """As `data.merge_turns` would have them; as they are where it would refuse them."""
    try:
        return merged_turns(messages)
    except RowProblem:
        return messages


def _remedied(what: str, which: str) -> str:
    if what == complete.THINKING:
        return (
            f"the chat template leaves out {which} thinking; set data.thinking: inline, which puts it into <think> "
            "tags before the answer, or drop, which leaves it out"
        )
    if what == complete.BESIDE:
        return (
            f"the chat template leaves out {which} text beside a tool call; set data.lost_text: allow to learn the "
            "call alone, or data.chat_template to one that writes both, for example chatml"
        )
    if what == complete.TEXT:
        return (
            f"the chat template leaves out {which} text, or changes it; set data.lost_text: allow to learn the rest, "
            "or another data.chat_template"
        )
    return f"the chat template leaves out {what}; {_TRY_CHATML}"
