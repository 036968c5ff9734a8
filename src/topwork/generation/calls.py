"""What a model says, as it comes, to text and tool calls."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from secrets import choice
from string import ascii_letters, digits

from topwork.data.chat.calls import CallFormat
from topwork.generation.call_object import CallObject


@dataclass(frozen=True)
class ToolCall:
    """A call; `arguments` is JSON text as the model wrote it (cut off where its answer was)."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: text, or a piece of the call number `call` (from 0). A call's first piece has its id and
    name and no arguments; the others have a piece of its arguments alone."""

    text: str = ""
    call: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Said:
    """An answer: its text, "" where it is calls alone, and the calls."""

    text: str
    calls: tuple[ToolCall, ...]


def together(deltas: Iterable[Delta]) -> Said:
    """The sum of an answer's deltas."""
    texts: list[str] = []
    calls: dict[int, tuple[str, str, list[str]]] = {}
    for delta in deltas:
        texts.append(delta.text)
        if delta.call is None:
            continue
        if delta.id is not None and delta.name is not None:
            calls[delta.call] = (delta.id, delta.name, [])
        calls[delta.call][2].append(delta.arguments)
    return Said("".join(texts), tuple(ToolCall(id, name, "".join(parts)) for id, name, parts in calls.values()))


class CallParser:
    """Reads one answer: text goes on as it comes, a call's name as soon as its arguments begin, and these as they come.

    A call is a JSON object with the name of a known function and its arguments (or parameters), one or a list of them,
    behind the format's mark, or as the answer's beginning: models that should write the mark often leave it out. What
    is no call after all is text. White space that a call follows is left out, and so is another call behind it that
    the answer's end cut off before its name was known.

    names  the functions that may be called; none: all is text
    most   calls that are told; what comes after the last of them is left out
    """

    def __init__(self, form: CallFormat, names: Collection[str], most: int | None = None) -> None:
        self._form, self._mark, self._end = form, form.opens.strip(), form.closes.strip()
        self._names, self._most = frozenset(names), most
        self._deltas: list[Delta] = []
        self._calls = 0
        self._read: Callable[[str], str] = self._text
        self._held = ""  # of text: what may become a mark, or white space that a call may follow; behind a call: any
        self._begun = False  # text was told, or a call
        self._before = ""  # what is to be text where the object is no call
        self._object = CallObject(self._names, bare=True)
        self._in_list = False

    @property
    def called(self) -> bool:
        """Whether a call has begun: finish_reason is then "tool_calls" where it would be "stop"."""
        return self._calls > 0

    @property
    def ended(self) -> bool:
        """Whether all calls that are told have come: what follows is left out, and the answer may be cancelled."""
        return self._read == self._nothing

    def add(self, text: str) -> list[Delta]:
        """What this text brings; what may still become a call is held back."""
        while text:
            text = self._read(text)
        told, self._deltas = self._deltas, []
        return told

    def finish(self) -> list[Delta]:
        """The answer is at its end: what was held back."""
        if self._read == self._text:
            self._tell(self._held.rstrip() if self.called else self._held)
        elif self._read == self._call and not self._object.told and not self.called:
            self._tell(self._before + "".join(self._object.raw))
        self._read = self._nothing
        told, self._deltas = self._deltas, []
        return told

    # Each reads the beginning of a text, and returns what it leaves to whoever reads then

    def _nothing(self, _text: str) -> str:
        return ""

    def _text(self, text: str) -> str:
        if not self._names:
            self._tell(text)
            return ""
        text, self._held = self._held + text, ""
        bare = text.lstrip()
        if not bare and not (self._begun and text):
            self._held = text
            return ""
        marked = bare.startswith(self._mark) or self._mark.startswith(bare)
        if not self._begun and bare[0] in "{[" and not (self._mark and marked):
            return self._begin(text[: len(text) - len(bare)], bare, bare=True)
        at = text.find(self._mark) if self._mark else -1
        if at >= 0:
            sure = text[:at].rstrip()
            self._tell(sure)
            behind = at + len(self._mark)
            return self._begin(text[len(sure) : behind], text[behind:], bare=False)
        keep = next((n for n in range(min(len(self._mark), len(text)), 0, -1) if text.endswith(self._mark[:n])), 0)
        sure = text[: len(text) - keep]
        sure = sure.rstrip() if self._mark else sure
        self._held = text[len(sure) :]
        self._tell(sure)
        return ""

    def _begin(self, before: str, text: str, bare: bool) -> str:
        self._read, self._before, self._object = self._call, before, CallObject(self._names, bare)
        return text

    def _call(self, text: str) -> str:
        call = self._object
        for at, letter in enumerate(text):
            if letter == "[" and call.untouched and not self._in_list:
                self._in_list = True
                call.raw.append(letter)
                continue
            call.read(letter)
            if call.failed:
                self._in_list, self._read = False, self._text
                self._tell(self._before + "".join(call.raw))
                return text[at + 1 :]
            if call.done:
                self._tell_call(call)
                last = self._most is not None and self._calls >= self._most
                self._read = self._nothing if last else self._behind
                return text[at + (not call.broken) :]
        self._tell_call(call)
        return ""

    def _behind(self, text: str) -> str:
        """Another call, the end mark, or text."""
        whole, self._held = self._held + text, ""
        text = whole.lstrip()
        follows = text[1:].lstrip()
        if not text or (text[0] in ",;" and not follows):
            self._held = whole
            return ""
        if self._in_list and text[0] == "]":
            self._in_list = False
            return text[1:]
        if text[0] in ",;" and follows[0] == "{":
            return self._begin(text[: len(text) - len(follows)], follows, bare=not self._mark)
        if text[0] == "{" and not self._mark:
            return self._begin("", text, bare=True)
        if self._end.startswith(text) and text != self._end:
            self._held = whole
            return ""
        if self._end and text[0] == "}":  # one too many is a common slip
            return text[1:]
        self._in_list, self._read = False, self._text
        return text.removeprefix(self._end) if self._end and text.startswith(self._end) else whole

    def _tell(self, text: str) -> None:
        if text:
            self._begun = True
            self._deltas.append(Delta(text))

    def _tell_call(self, call: CallObject) -> None:
        """What is new of it."""
        if call.called and not call.told:
            call.told = self._begun = True
            count = 9 if self._form.short_ids else 24
            made = "".join(choice(ascii_letters + digits) for _ in range(count))
            made = made if self._form.short_ids else f"call_{made}"
            self._deltas.append(Delta(call=self._calls, id=made, name=call.name))
            self._calls += 1
        if call.told and call.new:
            self._deltas.append(Delta(call=self._calls - 1, arguments="".join(call.new)))
            call.new.clear()
