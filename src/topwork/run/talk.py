"""Chat on a terminal."""

import sys

from topwork.common.errors import RequestError
from topwork.generation.sampling import Sampling
from topwork.run.chat import Chat
from topwork.run.compare import Pair
from topwork.run.console_pair import both_shown
from topwork.run.opened import OpenRun

HELP = "/base and /adapter switch the adapter off and on, /new begins anew, /quit ends"
HELP_TOGETHER = "each question goes to both; /new begins anew, /quit ends"


def ask_once(run: OpenRun, prompt: str, sampling: Sampling, system: str | None, adapter: bool) -> None:
    """One question, its answer on standard output."""
    Chat(run, adapter, sampling, system).say(prompt, _written)
    print()


def ask_both(pair: Pair, prompt: str) -> None:
    """One question, and both answers side by side."""
    with both_shown([side.label for side in pair.sides]) as shown:
        pair.say(prompt, shown.add)


def converse_with_both(pair: Pair) -> None:
    """Questions to both until the input ends or `/quit`."""
    print(HELP_TOGETHER, file=sys.stderr)
    while (text := _asked()) is not None:
        if text == "/new":
            pair.forget()
        elif text.startswith("/"):
            print(HELP_TOGETHER, file=sys.stderr)
        elif text:
            try:
                ask_both(pair, text)
            except RequestError as error:  # the context is full, most likely
                print(f"{error}; /new begins anew", file=sys.stderr)


def converse(run: OpenRun, sampling: Sampling, system: str | None, adapter: bool) -> None:
    """Questions until the input ends or `/quit`."""
    chat = Chat(run, adapter, sampling, system)
    print(HELP, file=sys.stderr)
    while (text := _asked()) is not None:
        if text in ("/base", "/adapter"):
            chat.adapter = text == "/adapter"
        elif text == "/new":
            chat.forget()
        elif text.startswith("/"):
            print(HELP, file=sys.stderr)
        elif text:
            try:
                chat.say(text, _written)
            except RequestError as error:  # the context is full, most likely
                print(f"{error}; /new begins anew", file=sys.stderr)
            print(flush=True)


def _asked() -> str | None:
    """The next line; None where it is the end."""
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if text == "/quit" else text


def _written(text: str) -> None:
    print(text, end="", flush=True)
