"""Chat on a terminal."""

import sys

from topwork.common.errors import RequestError
from topwork.generation.sampling import Sampling
from topwork.run.chat import Chat, side_by_side
from topwork.run.folder import OpenRun

HELP = "/base and /adapter switch the adapter off and on, /new begins anew, /quit ends"


def ask_once(run: OpenRun, prompt: str, sampling: Sampling, system: str | None, adapter: bool, compare: bool) -> None:
    """One question, its answer on standard output."""
    if compare:
        without, with_it = side_by_side(run, prompt, sampling, system)
        print(f"without the adapter:\n{without}\n\nwith the adapter:\n{with_it}")
        return
    Chat(run, adapter, sampling, system).say(prompt, _written)
    print()


def converse(run: OpenRun, sampling: Sampling, system: str | None, adapter: bool) -> None:
    """Questions until the input ends or `/quit`."""
    chat = Chat(run, adapter, sampling, system)
    print(HELP, file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/quit":
            return
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


def _written(text: str) -> None:
    print(text, end="", flush=True)
