"""How many threads are chosen, on machines that are made up: counters and a clock that a test moves."""

import os
from dataclasses import dataclass, field

import pytest

from topwork.common.processors import Load, Usage
from topwork.common.threads import (
    FIRST_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    SPINS,
    ThreadChoice,
    leaving,
    let_waiting_threads_sleep,
)


def load(free: float, cpus: int = 2, stolen: float = 0.0) -> Load:
    return Load(cpus, free, cpus - free, stolen, 1.0)


@pytest.mark.parametrize(
    ("free", "threads", "most", "expected"),
    [
        (2.0, 2, 2, 2), (1.5, 2, 2, 2), (1.41, 2, 2, 2), (1.33, 2, 2, 1), (1.0, 2, 2, 1), (0.1, 2, 2, 1),
        (1.0, 1, 2, 1), (1.7, 1, 2, 1), (1.8, 1, 2, 2), (2.0, 1, 2, 2), (0.3, 1, 2, 1),
        (7.0, 8, 8, 7), (7.5, 8, 8, 8), (6.2, 8, 8, 6), (2.0, 8, 8, 4), (2.0, 4, 8, 4), (7.8, 4, 8, 8), (6.9, 4, 8, 7),
        (30.0, 4, 4, 4), (3.0, 2, 2, 2), (0.0, 3, 3, 1), (2.0, 1, 1, 1), (8.0, 3, 3, 3),
    ],
)  # fmt: skip
def test_as_many_threads_as_other_work_leaves_cores(free: float, threads: int, most: int, expected: int) -> None:
    assert leaving(load(free, 8), threads, most) == expected


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 16])
def test_never_more_than_asked_never_less_than_half_and_one_look_settles(most: int) -> None:
    for threads in range(max(1, most // 2), most + 1):
        for tenths in range(10 * most + 20):
            free = tenths / 10
            found = leaving(load(free, most + 2), threads, most)
            assert max(1, most // 2) <= found <= most
            assert leaving(load(free, most + 2), found, most) == found, (free, threads)


@dataclass
class Machine:
    """CPUs of which others take what a test says: `busy` of them, and `stolen` while we have all our threads."""

    cpus: int = 2
    busy: float = 0.0
    stolen: float = 0.0
    now: float = 100.0
    counts: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    broken: bool = False

    def read(self) -> Usage | None:
        idle, stolen, own = self.counts
        return None if self.broken else Usage(self.now, self.cpus, self.now * self.cpus, idle, stolen, own)

    def clock(self) -> float:
        return self.now

    def steps(self, choice: ThreadChoice, seconds: float, each: float = 1.0) -> list[tuple[float, int, str]]:
        """Steps of so many seconds each for so long; when the number changed, to what, and what was told."""
        found, end = [], self.now + seconds
        while self.now < end - 1e-9:
            self.now += each
            taken = self.busy + (self.stolen if choice.count == choice.most else 0.0)
            own = min(float(choice.count), self.cpus - taken)
            self.counts[0] += each * (self.cpus - taken - own)
            self.counts[1] += each * (taken - self.busy)
            self.counts[2] += each * own
            told = choice.look()
            if told is not None:
                found.append((self.now, choice.count, told))
        return found


def chosen(machine: Machine, most: int = 2) -> ThreadChoice:
    return ThreadChoice(most, machine.read, machine.clock)


def test_idle_nothing_changes() -> None:
    machine = Machine()
    choice = chosen(machine)
    assert machine.steps(choice, 100.0) == []
    assert choice.count == 2


def test_a_neighbour_comes_and_goes() -> None:
    machine = Machine()
    choice = chosen(machine)
    machine.steps(choice, 5.0)
    machine.busy = 1.0
    assert machine.steps(choice, 60.0) == [(106.0, 1, "another process keeps a core busy: 1 thread instead of 2")]
    machine.busy = 0.0
    assert machine.steps(choice, 60.0) == [(166.0, 2, "the cores are free again: 2 threads instead of 1")]


def test_a_small_neighbour_is_none() -> None:
    machine = Machine(busy=0.45)
    assert machine.steps(chosen(machine), 60.0) == []


def test_one_that_was_there_before_the_first_step() -> None:
    machine = Machine(busy=1.0)
    choice = chosen(machine)
    machine.now += 20.0  # the base is read
    machine.counts = [0.0, 0.0, 20.0]
    assert "1 thread instead of 2" in str(choice.look())


def test_between_looks_nothing_is_read() -> None:
    machine = Machine(busy=1.0)
    choice = chosen(machine)
    machine.read = lambda: pytest.fail("read too soon")  # type: ignore[method-assign]
    choice.read = machine.read
    assert machine.steps(choice, 0.29, each=0.01) == []


def test_a_core_that_is_free_for_a_moment_is_not_taken() -> None:
    machine = Machine(busy=1.0)
    choice = chosen(machine)
    machine.steps(choice, 5.0)
    for _ in range(10):
        machine.busy = 0.0
        assert machine.steps(choice, FIRST_WAIT_SECONDS - 0.5, each=0.5) == []
        machine.busy = 1.0
        assert machine.steps(choice, 0.5, each=0.5) == []


def test_trials_that_go_wrong_become_rare() -> None:
    """A host takes time only from a machine that asks for all of it: each trial shows it again."""
    machine = Machine(stolen=0.8)
    choice = chosen(machine)
    changes = machine.steps(choice, 1800.0)
    up = [at for at, count, _ in changes if count == 2]
    waits = [later - before for before, later in zip(up, up[1:])]
    assert all(later >= before for before, later in zip(waits, waits[1:]))
    assert LONGEST_WAIT_SECONDS <= waits[-1] <= LONGEST_WAIT_SECONDS + 3
    assert len(up) < 25
    assert changes[0][2] == "the host takes 0.8 of this machine's 2 processors away: 1 thread instead of 2"


def test_after_a_long_while_waits_are_short_again() -> None:
    machine = Machine(stolen=0.8)
    choice = chosen(machine)
    machine.steps(choice, 600.0)
    machine.stolen = 0.0
    machine.steps(choice, 600.0)
    assert choice.count == 2
    machine.busy = 1.0
    machine.steps(choice, 5.0)
    machine.busy = 0.0
    assert [count for _, count, _ in machine.steps(choice, FIRST_WAIT_SECONDS + 1)] == [2]


def test_a_trial_that_goes_wrong_in_several_looks_is_one() -> None:
    machine = Machine(cpus=4, busy=2.0)
    choice = chosen(machine, 4)
    machine.steps(choice, 5.0)
    for wait in (1, 2, 4, 8):  # each trial doubles it once
        machine.busy = 0.0
        assert machine.steps(choice, wait - 1.0) == []
        assert [count for _, count, _ in machine.steps(choice, 1.0)] == [4]
        for busy, left in ((1.0, 3), (2.0, 2)):
            machine.busy = busy
            assert [count for _, count, _ in machine.steps(choice, 3.0)] == [left]


def test_many_cores_lose_as_many_threads_as_are_busy() -> None:
    machine = Machine(cpus=8)
    choice = chosen(machine, 8)
    machine.busy = 3.0
    assert machine.steps(choice, 20.0) == [
        (101.0, 5, "other processes keep 3 of 8 processors busy: 5 threads instead of 8")
    ]
    machine.busy = 1.0
    assert machine.steps(choice, 20.0)[-1][1:] == (7, "some of the cores are free again: 7 threads instead of 5")


def test_threads_on_one_half_of_each_core_have_the_other_halves_to_spare() -> None:
    machine = Machine(cpus=4, busy=2.0)
    assert machine.steps(chosen(machine, 2), 20.0) == []
    machine.busy = 3.0
    assert [count for _, count, _ in machine.steps(chosen(machine, 2), 20.0)] == [1]


def test_where_nothing_counts_all_threads_stay() -> None:
    machine = Machine(busy=1.0, broken=True)
    assert machine.steps(chosen(machine), 20.0) == []
    machine.broken = False
    choice = chosen(machine)
    machine.broken = True
    assert machine.steps(choice, 20.0) == []
    machine.broken = False
    assert [count for _, count, _ in machine.steps(choice, 20.0)] == [1]


def test_one_thread_is_never_looked_at() -> None:
    choice = ThreadChoice(1, lambda: pytest.fail("read"), lambda: 0.0)
    assert choice.look() is None
    assert choice.count == 1


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_is_the_environments_where_it_says_so(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], expected: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    let_waiting_threads_sleep()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
