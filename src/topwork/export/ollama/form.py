"""What a chat template writes around messages, found by asking it: the form that Ollama's templates can say.

Ollama runs no Jinja. Most chat templates, though, only put a fixed text before and behind each message, by its role;
these texts are found by rendering a few conversations of known words. What else a template does (moves the system
message, rewrites earlier answers) is found by comparing, and refused by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from topwork.common.errors import DataError, RequestError, quoted
from topwork.data.chat.rendering import Renderer, TemplateRejects
from topwork.data.conversations import Message

Chat = Sequence[Message]
_SYSTEM, _USER, _ANSWER = "topworkprobesystem", "topworkprobeuser", "topworkprobeanswer"
INSTEAD = (
    "llama.cpp's server runs the template itself: topwork export … --format gguf, then llama-server --jinja (or serve "
    "it with topwork serve, or vLLM)"
)


@dataclass(frozen=True)
class Around:
    """What stands before and behind a message's text."""

    before: str
    behind: str


@dataclass(frozen=True)
class TemplateForm:
    """A chat template as fixed texts around messages.

    begin      before everything, the BOS token's text included
    default    a whole system turn that is written where the conversation begins without one; "" for none
    system     around a system message; None where the template takes none, or puts it where the form cannot
    joined     the system message opens the first user turn: what stands behind it takes the place of `user.before`
    anywhere   a system message may stand later in the conversation as well
    user, assistant   around their messages
    prompt     what opens the turn that is to be answered
    """

    begin: str
    default: str
    system: Around | None
    joined: bool
    anywhere: bool
    user: Around
    assistant: Around
    prompt: str


def talk(*texts: str, system: str | None = None) -> list[Message]:
    """A conversation of user and assistant in turns."""
    first = [Message("system", system)] if system is not None else []
    return first + [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


def template_form(renderer: Renderer, text_of: Callable[[TemplateForm, Chat], str]) -> TemplateForm:
    """The form of `renderer`'s template; `text_of` is how a form renders, and what the template is compared with.

    Raises RequestError for a template that is more than fixed texts around messages.
    """
    try:
        form = _turns(renderer)
    except (TemplateRejects, _OtherFormError, ValueError, IndexError) as error:
        raise RequestError(
            f"this chat template is no fixed text around each message ({str(error)[:200]}), which is all that an "
            f"Ollama TEMPLATE is written for; {INSTEAD}"
        ) from error
    for number in (1, 3, 5):
        _compare(renderer, form, text_of, talk(*_words(number)), "turns of user and assistant")
    _refuse_rewriting(renderer, form, text_of)
    return _with_system(renderer, form, text_of)


def compare(
    renderer: Renderer, form: TemplateForm, text_of: Callable[[TemplateForm, Chat], str], chats: Sequence[Chat]
) -> int:
    """Render conversations both ways. Returns how many; raises RequestError for the first that differs."""
    for chat in chats:
        what = "a conversation that begins with " + (f"{quoted(chat[0].content, 40)}" if chat else "nothing")
        _compare(renderer, form, text_of, chat, what)
    return len(chats)


class _OtherFormError(Exception):
    """The template's texts do not fit together as the form has them."""


def _words(number: int) -> list[str]:
    return [f"{(_USER, _ANSWER)[each % 2]}{each}x" for each in range(number)]


def _between(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and behind the words, each of which stands there once and in this order."""
    parts = []
    for word in words:
        part, found, text = text.partition(word)
        if not found or word in text:
            raise _OtherFormError("a message's text is left out, moved or written twice")
        parts.append(part)
    return [*parts, text]


def _turns(renderer: Renderer) -> TemplateForm:
    """Everything but the system message."""
    one, five = _words(1), _words(5)
    open_, behind = _between(renderer.render(talk(*one), None, True), one)
    closed = _between(renderer.render(talk(*one), None, False), one)[1]
    if not behind.startswith(closed):
        closed = ""
    parts = _between(renderer.render(talk(*five), None, True), five)
    to_answer, to_user = parts[1], parts[2]
    if not to_answer.startswith(closed):
        closed = _common(to_answer, behind)
    after = _after_answer(renderer, to_user)
    before = to_user[len(after) :]
    if not open_.endswith(before):
        before = _common(open_[::-1], to_user[::-1])[::-1]
        after = to_user.removesuffix(before)
    return TemplateForm(
        begin=open_[: len(open_) - len(before)], default="", system=None, joined=False, anywhere=False,
        user=Around(before, closed), assistant=Around(to_answer[len(closed) :], after), prompt=behind[len(closed) :],
    )  # fmt: skip


def _after_answer(renderer: Renderer, to_user: str) -> str:
    """What closes an answer, where that can be told from what opens the next turn."""
    words = _words(2)
    tail = _between(renderer.render(talk(*words), None, False), words)[2]
    return tail if to_user.startswith(tail) else ""


def _common(one: str, other: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:length]


def _refuse_rewriting(renderer: Renderer, form: TemplateForm, text_of: Callable[[TemplateForm, Chat], str]) -> None:
    thought = talk("a", "<think>\nb\n</think>\n\nc", "d")
    if renderer.render(thought, None, True) != text_of(form, thought):
        raise RequestError(
            "this chat template takes the thinking out of earlier answers, and an Ollama TEMPLATE that this writes "
            f"cannot: from the second turn on the model would read another text than it has learned; {INSTEAD}"
        )


def _with_system(renderer: Renderer, form: TemplateForm, text_of: Callable[[TemplateForm, Chat], str]) -> TemplateForm:
    """The form with its system turn, if the template has one that the form can say. What then is no system turn stays
    an error in Ollama too (`go_template.py`)."""
    words = [_SYSTEM, *_words(1)]
    try:
        first, then, _ = _between(renderer.render(talk(*words[1:], system=_SYSTEM), None, True), words)
    except (TemplateRejects, _OtherFormError):
        return form
    opened = first.removeprefix(form.begin)
    ways = [*_own_turns(renderer, form, first, then), replace(form, system=Around(opened, then), joined=True)]
    tried = [talk(*_words(number), system=_SYSTEM) for number in (1, 3)]
    fitting = [way for way in ways if all(_rendered(renderer, chat) == text_of(way, chat) for chat in tried)]
    later = [*talk(*_words(2)), *talk(f"{_USER}7x", system=_SYSTEM)]
    for found in fitting:
        anywhere = replace(found, anywhere=not found.joined)
        if anywhere.anywhere and _rendered(renderer, later) == text_of(anywhere, later):
            return anywhere
    return fitting[0] if fitting else form


def _own_turns(renderer: Renderer, form: TemplateForm, first: str, then: str) -> list[TemplateForm]:
    """A system message that has a turn of its own, perhaps with a default for conversations without one: the ways in
    which what stands before it may be shared out between the conversation's beginning and the turn's."""
    if not then.endswith(form.user.before):
        return []
    behind = then[: len(then) - len(form.user.before)]
    if first.startswith(form.begin):
        return [replace(form, system=Around(first[len(form.begin) :], behind))]
    bos = str(renderer.tokenizer.bos_token or "")
    begins = [bos, ""] if bos and first.startswith(bos) and form.begin.startswith(bos) else [""]
    return [
        replace(form, begin=begin, default=form.begin[len(begin) :], system=Around(first[len(begin) :], behind))
        for begin in begins
    ]


def _rendered(renderer: Renderer, chat: Chat) -> str | None:
    try:
        return renderer.render(chat, None, True)
    except TemplateRejects:
        return None


def _compare(
    renderer: Renderer, form: TemplateForm, text_of: Callable[[TemplateForm, Chat], str], chat: Chat, what: str
) -> None:
    try:
        ours = renderer.render(chat, None, True)
    except (TemplateRejects, DataError) as error:
        raise RequestError(f"the chat template does not take {what} ({error}); {INSTEAD}") from error
    theirs = text_of(form, chat)
    if ours != theirs:
        at = len(_common(ours, theirs))
        raise RequestError(
            f"the Ollama TEMPLATE would write {what} otherwise than the chat template does: "
            f"{quoted(theirs[at : at + 40])} where that has {quoted(ours[at : at + 40])}; {INSTEAD}"
        )
