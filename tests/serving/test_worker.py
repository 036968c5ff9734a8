"""The engine's thread: what it is sent and what it tells, also when the engine fails or the thread dies."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serving.scripted import ScriptedEngine
from topwork.common.errors import RequestError, RunError
from topwork.generation.requests import Event, Request
from topwork.generation.sampling import Sampling
from topwork.serving.worker import Admitted, Worker

ANSWER = [5, 6, 7]


class Left:
    """Counts what has left."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def tried(
    work: Callable[[Worker, ScriptedEngine], Coroutine[Any, Any, None]], engine: ScriptedEngine | None = None
) -> None:
    """Runs `work` with a worker, which is closed afterwards."""

    async def run() -> None:
        used = engine or ScriptedEngine(lambda _: ANSWER)
        worker = Worker(used)
        worker.start()
        try:
            async with asyncio.timeout(20):
                await work(worker, used)
        finally:
            used.gate.set()
            await worker.close()

    asyncio.run(run())


async def admitted(worker: Worker, choices: int = 1, left: Callable[[], None] = lambda: None) -> Admitted:
    request = Request([1, 2], sampling=Sampling(10**9))
    return await worker.admit(lambda: ([request] * choices, left), choices)


async def drained(request: Admitted, choices: int = 1) -> list[list[Event]]:
    """All events of each choice, through its end."""
    found: list[list[Event]] = [[] for _ in range(choices)]
    while not all(events and events[-1].ended for events in found):
        for choice, event in await request.inbox.take():
            found[choice].append(event)
    return found


def test_each_choice_gets_its_own_events_and_leaves_once() -> None:
    async def work(worker: Worker, engine: ScriptedEngine) -> None:
        left = Left()
        engine.gate.clear()
        request = await admitted(worker, 3, left)
        assert worker.running == 3
        engine.gate.set()
        found = await drained(request, 3)
        assert [[event.token for event in events] for events in found] == [[*ANSWER, None]] * 3
        await worker.call(lambda: None)
        assert (left.count, worker.running) == (3, 0)

    tried(work)


def test_a_step_that_fails_ends_what_runs_and_the_next_request_is_answered() -> None:
    async def work(worker: Worker, engine: ScriptedEngine) -> None:
        left = Left()
        engine.fail.append(ValueError("secret of the engine"))
        (events,) = await drained(await admitted(worker, 1, left))
        assert events[-1].ended == "failed"
        assert "secret" not in str(events[-1].error)
        assert worker.alive
        assert left.count == 1
        assert worker.running == 0
        (events,) = await drained(await admitted(worker))
        assert [event.token for event in events] == [*ANSWER, None]

    tried(work)


def test_what_is_called_runs_on_the_engines_thread_and_may_raise() -> None:
    async def work(worker: Worker, _: ScriptedEngine) -> None:
        assert await worker.call(lambda: threading.current_thread().name) == "topwork-engine"

        def wrong() -> None:
            raise RequestError("no")

        with pytest.raises(RequestError, match="no"):
            await worker.call(wrong)
        assert worker.alive

    tried(work)


def test_what_is_given_up_leaves_before_the_next_step() -> None:
    async def work(worker: Worker, engine: ScriptedEngine) -> None:
        left = Left()
        request = await admitted(worker, 2, left)
        await request.inbox.take()
        engine.gate.clear()
        worker.give_up(request)
        steps = engine.steps
        engine.gate.set()
        await worker.call(lambda: None)
        assert sorted(engine.cancelled) == [0, 1]
        assert engine.steps <= steps + 1
        assert (left.count, worker.running) == (2, 0)

    tried(work, ScriptedEngine(lambda _: range(1000)))


def test_one_choice_may_be_given_up_and_the_others_go_on() -> None:
    async def work(worker: Worker, engine: ScriptedEngine) -> None:
        engine.gate.clear()
        request = await admitted(worker, 3)
        worker.give_up(request, [1])
        engine.gate.set()
        for choice in (0, 2):
            while choice in request.running.values():
                await worker.call(lambda: None)
        assert engine.cancelled == [1]

    tried(work)


def test_all_choices_or_none_are_taken() -> None:
    class Full(ScriptedEngine):
        def submit(self, request: Request) -> int:
            if len(self.running) == 2:
                raise RequestError("full")
            return super().submit(request)

    async def work(worker: Worker, engine: ScriptedEngine) -> None:
        left = Left()
        with pytest.raises(RequestError, match="full"):
            await admitted(worker, 3, left)
        assert (left.count, worker.running, engine.running) == (3, 0, {})

    tried(work, Full(lambda _: ANSWER))


def test_who_goes_while_it_is_handed_in_leaves_nothing_behind() -> None:
    async def work(worker: Worker, engine: ScriptedEngine) -> None:
        held, go = threading.Event(), threading.Event()
        blocked = asyncio.ensure_future(worker.call(lambda: (held.set(), go.wait(20))))
        await asyncio.to_thread(held.wait, 20)
        left = Left()
        task = asyncio.ensure_future(admitted(worker, 2, left))
        await asyncio.sleep(0)
        task.cancel()
        go.set()
        await blocked
        with pytest.raises(asyncio.CancelledError):
            await task
        while worker.running or engine.running:
            await worker.call(lambda: None)
            await asyncio.sleep(0)
        assert left.count == 2

    tried(work, ScriptedEngine(lambda _: range(10**6)))


def test_a_thread_that_died_is_known_and_refuses() -> None:
    class Dying(ScriptedEngine):
        def step(self) -> list[Event]:
            raise SystemExit

    async def work(worker: Worker, _: ScriptedEngine) -> None:
        (events,) = await drained(await admitted(worker))
        assert events[-1].ended == "failed"
        assert not worker.alive
        with pytest.raises(RunError, match="started anew"):
            await worker.call(lambda: None)
        with pytest.raises(RunError, match="started anew"):
            await admitted(worker)
        assert worker.running == 0

    tried(work, Dying(lambda _: ANSWER))


def test_closing_tells_what_runs_and_what_waits_to_be_called() -> None:
    async def work(worker: Worker, engine: ScriptedEngine) -> None:
        request = await admitted(worker)
        engine.gate.clear()
        closing = asyncio.ensure_future(worker.close())
        await asyncio.sleep(0)
        late = asyncio.ensure_future(worker.call(lambda: "never"))
        await asyncio.sleep(0)
        engine.gate.set()
        await closing
        (events,) = await drained(request)
        assert events[-1].ended == "failed"
        with pytest.raises(RunError):
            await late

    tried(work, ScriptedEngine(lambda _: range(10**6)))
