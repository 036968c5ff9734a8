"""`topwork chat`: ask a run, with and without its adapter."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from topwork.common.os_errors import explained
from topwork.data.chat.template import stop_ids
from topwork.data.conversations import Message
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.generation.text import TextStream
from topwork.run.folder import ADAPTER_NAME
from topwork.run.given import given_adapter
from topwork.run.opened import OpenRun, open_given


@explained()
def answer(
    run: Path | str | OpenRun, text: str, adapter: bool = True, sampling: Sampling = Sampling(),
    system: str | None = None, *, model: str | None = None, checkpoint: str | int | None = None, force: bool = False,
) -> str:  # fmt: skip
    """One answer to one message, with the adapter of a run, a PEFT folder or a Hub id, or without it. `model` is its
    base, where that is not where the run or the folder names it; `checkpoint` a step, `best` or `last` (left out, the
    finished adapter, or where there is none yet the newest checkpoint's, which a line says)."""
    opened = run if isinstance(run, OpenRun) else _opened(run, model, checkpoint, force)
    return Chat(opened, adapter, sampling, system).say(text)


def _opened(run: Path | str, model: str | None, checkpoint: str | int | None, force: bool) -> OpenRun:
    """Which adapter it is is worth a line; how its base is loaded is not."""
    given = given_adapter(run, model, checkpoint, lambda text: print(text, file=sys.stderr))
    return open_given(given, force=force, log=lambda _: None)


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
        stream, said = TextStream(self.run.base.tokenizer), ""

        def told(piece: str) -> None:
            nonlocal said
            said += piece
            if on_text is not None and piece:
                on_text(piece)

        generate(
            self.run.base, [prompt], [ADAPTER_NAME if self.adapter else None], stop_ids(self.run.template),
            self.sampling, on_token=lambda _, token: told(stream.add(token)),
        )  # fmt: skip
        told(stream.finish())
        self.turns += [Message("user", text), Message("assistant", said)]
        return said

    def forget(self) -> None:
        """Begin anew."""
        self.turns.clear()
