"""`topwork chat`: ask a run, with and without its adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topwork.data.conversations import Message
from topwork.data.template import stop_ids
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.run.folder import ADAPTER_NAME, OpenRun, open_run


def answer(
    run: Path | str | OpenRun, text: str, adapter: bool = True, sampling: Sampling = Sampling(),
    system: str | None = None,
) -> str:  # fmt: skip
    """One answer to one message, with the run's adapter or without it."""
    opened = run if isinstance(run, OpenRun) else open_run(Path(run), log=lambda _: None)
    return Chat(opened, adapter, sampling, system).say(text)


@dataclass
class Chat:
    """A conversation with a run. The system message is the one that training had, unless another is given."""

    run: OpenRun
    adapter: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """The answer to `text`, given what was said before; `on_text` gets it piece by piece as it comes."""
        system = self.system if self.system is not None else self.run.system
        messages = [*([Message("system", system)] if system else []), *self.turns, Message("user", text)]
        prompt = self.run.template.prompt_ids(messages)
        pieces = _Pieces(self.run, on_text)
        (tokens,) = generate(
            self.run.base, [prompt], [ADAPTER_NAME if self.adapter else None], stop_ids(self.run.template),
            self.sampling, on_token=pieces.add,
        )  # fmt: skip
        said = self.run.base.text(tokens)
        pieces.finish(said)
        self.turns += [Message("user", text), Message("assistant", said)]
        return said

    def forget(self) -> None:
        """Begin anew."""
        self.turns.clear()


class _Pieces:
    """Tokens to text: what is printed is the growth of the decoded whole, since one token may be half a character."""

    def __init__(self, run: OpenRun, on_text: Callable[[str], None] | None) -> None:
        self.run, self.on_text = run, on_text
        self.tokens: list[int] = []
        self.shown = ""

    def add(self, _index: int, token: int) -> None:
        self.tokens.append(token)
        if self.on_text is None:
            return
        text = self.run.base.text(self.tokens)
        if not text.endswith("\ufffd") and len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text

    def finish(self, text: str) -> None:
        """What was held back because a character might still have become whole."""
        if self.on_text is not None and len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])


def side_by_side(run: OpenRun, text: str, sampling: Sampling, system: str | None = None) -> Sequence[str]:
    """(without the adapter, with it)."""
    return [answer(run, text, adapter, sampling, system) for adapter in (False, True)]
