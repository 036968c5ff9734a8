"""The one thread that runs the engine and changes what is loaded: everybody else sends it commands and gets events.

Between two steps it takes all commands that have come: requests that enter, requests that are given up, adapters that
are loaded or go. What a step brings goes to the event loop in one call.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeVar

from topwork.common.errors import RunError, TopworkError
from topwork.generation.requests import Event, Request

log = logging.getLogger("topwork.serving")

TELL_SECONDS = 0.25
"""How often the engine's figures are told while it runs."""

ENDED = "the engine's thread has ended; the server has to be started anew"

Result = TypeVar("Result")
Enter = Callable[[], tuple[Sequence[Request], Callable[[], None]]]


class RunsRequests(Protocol):
    """What is asked of the engine (`generation/engine.py`)."""

    @property
    def busy(self) -> bool: ...
    def submit(self, request: Request) -> int: ...
    def step(self) -> list[Event]: ...
    def cancel(self, id: int) -> None: ...
    def close(self) -> None: ...


class Inbox:
    """What came for one request and was not taken yet. On the event loop's thread alone."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Event]] = deque()
        self._came: asyncio.Future[None] | None = None

    def put(self, choice: int, event: Event) -> None:
        """Something came."""
        self._waiting.append((choice, event))
        if self._came is not None and not self._came.done():
            self._came.set_result(None)

    async def take(self) -> list[tuple[int, Event]]:
        """All that came, waiting for the first: (choice, event)."""
        if not self._waiting:
            self._came = asyncio.get_running_loop().create_future()
            await self._came
        taken = list(self._waiting)
        self._waiting.clear()
        return taken


@dataclass
class Admitted:
    """A request that the engine has taken: its choices by their ids, until each has ended. `leave` is called as often
    as there are choices, on the engine's thread, when one has ended."""

    inbox: Inbox
    leave: Callable[[], None]
    running: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Command:
    """What the engine's thread is to call, and who is told of it: `settle(value, error)`."""

    function: Callable[[], Any]
    settle: Callable[[Any, Exception | None], None] = lambda *_: None

    def run(self) -> None:
        try:
            value = self.function()
        except Exception as error:
            self.settle(None, error)
        else:
            self.settle(value, None)


class Worker:
    """Owns the engine, and calls what others want called between its steps."""

    def __init__(self, engine: RunsRequests, told: Callable[[Any], None] = lambda _: None) -> None:
        """`told` gets the engine's figures now and then, on the event loop's thread."""
        self.engine, self.told = engine, told
        self.running = 0
        """Choices that were handed in and have not ended; counted on the event loop's thread."""
        self.failures = 0
        """Steps that failed."""
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._live: dict[int, Admitted] = {}
        self._thread = threading.Thread(target=self._run, name="topwork-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: BaseException | None = None
        self._told_at = 0.0

    def start(self) -> None:
        """From here on commands are taken; events go to the loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and self._ended is None

    async def call(self, function: Callable[[], Result]) -> Result:
        """Call it on the engine's thread, between two steps. Raises what it raises; RunError where the thread ended."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._send(_Command(function, partial(self._post, _settle, result)))
        return await result

    async def admit(self, enter: Enter, choices: int) -> Admitted:
        """Hand a request's choices to the engine, all or none.

        enter: called on the engine's thread: the requests, as many as `choices`, and what is to be called there for
        each when it has ended. Raises what it or the engine raises.
        """
        inbox = Inbox()
        self.running += choices
        handed = asyncio.ensure_future(self.call(lambda: self._enter(enter, inbox)))
        handed.add_done_callback(lambda done: None if done.exception() is None else self._count_down(choices))
        try:
            return await asyncio.shield(handed)
        except asyncio.CancelledError:  # who asked has gone; what was handed in is taken back as soon as it is in
            handed.add_done_callback(lambda done: self.give_up(done.result()) if done.exception() is None else None)
            raise

    def give_up(self, admitted: Admitted, choices: Collection[int] | None = None) -> None:
        """Its choices that run (or these of them) end, before the next step; nothing more is told of them."""
        with suppress(RunError):  # where the thread has ended, so have they
            self._send(_Command(lambda: self._forget(admitted, choices)))

    async def close(self) -> None:
        """End the thread; what runs is told that it failed."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _send(self, command: _Command) -> None:
        with self._sending:
            if self._ended is not None:
                raise RunError(ENDED)
            self._commands.put(command)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        """To the event loop; one that has closed has nobody who would listen."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("the event loop has closed")

    # On the engine's thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.exception("the engine's thread has died")
            self._end(error)
        else:
            self._end(RunError(ENDED))

    def _end(self, why: BaseException) -> None:
        """Nobody comes in any more, and whoever waits is told."""
        with self._sending:
            self._ended = why
        self._fail(ENDED)
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                command.settle(None, RunError(ENDED))

    def _turn(self) -> bool:
        """The commands that have come, waiting for one where nothing runs, then a step. Whether to go on."""
        wait = not self.engine.busy
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                break
            if command is None:
                return False
            command.run()
            wait = False
        if self.engine.busy:
            self._step()
        return True

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception:
            self.failures += 1
            log.exception("a step of the engine failed; what ran is told so")
            self._fail("the engine failed while it wrote this answer")
            return
        told = [(event, admitted) for event in events if (admitted := self._live.get(event.id)) is not None]
        entries = [(admitted.inbox, admitted.running[event.id], event) for event, admitted in told]
        for event, _ in told:
            if event.ended is not None:
                self._left(event.id)
        self._tell(entries)

    def _tell(self, entries: list[tuple[Inbox, int, Event]]) -> None:
        now, figures = monotonic(), None
        statistics = getattr(self.engine, "statistics", None)
        if statistics is not None and (now - self._told_at > TELL_SECONDS or not self._live):
            self._told_at, figures = now, statistics()
        self._post(self._deliver, entries, figures)

    def _enter(self, enter: Enter, inbox: Inbox) -> Admitted:
        requests, leave = enter()
        admitted = Admitted(inbox, leave)
        try:
            for choice, request in enumerate(requests):
                admitted.running[self.engine.submit(request)] = choice
        except BaseException:
            for _ in range(len(requests) - len(admitted.running)):
                leave()
            self._live |= dict.fromkeys(admitted.running, admitted)
            for id in list(admitted.running):
                self._drop(id)
            raise
        self._live |= dict.fromkeys(admitted.running, admitted)
        return admitted

    def _forget(self, admitted: Admitted, choices: Collection[int] | None) -> None:
        dropped = [id for id, choice in admitted.running.items() if choices is None or choice in choices]
        for id in dropped:
            self._drop(id)
        self._post(self._count_down, len(dropped))

    def _drop(self, id: int) -> None:
        """One choice ends here and in the engine; what is told of it later finds nobody."""
        try:
            self.engine.cancel(id)
        except TopworkError:
            log.debug("request %d had ended when it was given up", id)
        self._left(id)

    def _left(self, id: int) -> None:
        admitted = self._live.pop(id)
        del admitted.running[id]
        admitted.leave()

    def _fail(self, why: str) -> None:
        """All that was handed in ends with an error, and what the engine still knows of it with it."""
        entries = [
            (admitted.inbox, admitted.running[id], Event(id, ended="failed", error=why))
            for id, admitted in self._live.items()
        ]
        for id in list(self._live):
            try:
                self._drop(id)
            except Exception:  # what leaves a broken engine may fail too; the others are still told
                log.exception("request %d could not be taken out of the engine", id)
        self._live.clear()
        try:
            self.engine.close()
        except Exception:
            log.exception("the engine could not be closed after a failure")
        self._post(self._deliver, entries, None)

    # On the event loop's thread

    def _deliver(self, entries: list[tuple[Inbox, int, Event]], figures: Any) -> None:
        for inbox, choice, event in entries:
            if event.ended is not None:
                self.running -= 1
            inbox.put(choice, event)
        if figures is not None:
            self.told(figures)

    def _count_down(self, count: int) -> None:
        self.running -= count


def _settle(result: "asyncio.Future[Any]", value: Any, error: Exception | None) -> None:
    if result.done():  # who waited has gone
        return
    if error is not None:
        result.set_exception(error)
    else:
        result.set_result(value)
