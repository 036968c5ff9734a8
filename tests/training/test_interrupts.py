"""Which signals ask a run to stop, and what they leave alone."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from topwork.training.interrupts import SIGNALS, Interrupts, Stopped, ending_on_signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent to this process")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_is_remembered(number: signal.Signals) -> None:
    with Interrupts() as interrupts:
        assert not interrupts.asked
        send(number)
        assert interrupts.asked
        assert interrupts.number == number


def test_they_are_those_of_people_terminals_and_schedulers() -> None:
    assert {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"} <= {number.name for number in SIGNALS}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_what_comes_twice_by_itself_is_one_request(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends a signal to a process and to its group, a terminal that goes hangs up twice."""
    monkeypatch.setattr("time.monotonic", lambda: 7.0)
    with Interrupts() as interrupts:
        send(number, number)
        send(signal.SIGHUP)
        assert interrupts.number == number


def test_ctrl_c_twice_and_sigterm_some_time_later_break_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Interrupts():
        send(signal.SIGINT)
        now = 0.1
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    with Interrupts():
        send(signal.SIGTERM)
        now = 5.0
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_what_is_ignored_stays_so(number: signal.Signals) -> None:
    """As under `nohup`, or for a shell's job in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with ending_on_signals(), Interrupts() as interrupts:
            send(number)
            assert not interrupts.asked
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_handler_of_the_programs_own_stays() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with Interrupts() as interrupts:
            send(signal.SIGUSR1)
            assert not interrupts.asked
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_terminal_that_has_gone_takes_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with Interrupts() as interrupts:
        monkeypatch.setattr("topwork.training.interrupts.os.write", gone)
        send(signal.SIGHUP)
        assert interrupts.asked


@pytest.mark.parametrize("number", SIGNALS)
def test_the_rest_of_a_command_ends_with_the_shells_code(number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as caught, ending_on_signals():
        send(number)
    assert isinstance(caught.value, Stopped)
    assert (caught.value.code, caught.value.name) == (128 + number, number.name)


def test_within_a_command_the_second_ends_it_so() -> None:
    with pytest.raises(Stopped), ending_on_signals(), Interrupts():
        send(signal.SIGTERM, signal.SIGINT)


def test_in_another_thread_nothing_is_installed() -> None:
    seen = []

    def inside() -> None:
        with ending_on_signals(), Interrupts():
            seen.append({number: signal.getsignal(number) for number in SIGNALS})

    before = {number: signal.getsignal(number) for number in SIGNALS}
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
