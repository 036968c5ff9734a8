"""Torch's own number of threads while something computes, and after it."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import topwork.models.load
import topwork.ops.threads
from reference.families import tiny_base
from topwork.ops.threads import RecurringThreads, Threads, computing_threads


@pytest.fixture(autouse=True)
def _two_asked() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Any:
    """cores(n): a machine where n threads pay."""
    return lambda count: monkeypatch.setattr(topwork.ops.threads, "paying_threads", lambda asked: min(asked, count))


class Told:
    """A choice that a test makes."""

    def __init__(self, most: int, *counts: int) -> None:
        self.most = self.count = most
        self.counts = list(counts)

    def look(self) -> str | None:
        before, self.count = self.count, self.counts.pop(0)
        return None if self.count == before else f"{self.count} instead of {before}"


def test_what_is_chosen_is_torchs_until_the_end(cores: Any) -> None:
    cores(2)
    with computing_threads("auto", choice=lambda most: Told(most, 2, 1, 1, 2, 1)) as threads:  # type: ignore[arg-type, return-value]
        found = [(threads.look(), threads.count, torch.get_num_threads()) for _ in range(5)]
        told = [None, "1 instead of 2", None, "2 instead of 1", "1 instead of 2"]
        assert found == list(zip(told, [2, 1, 1, 2, 1], [2, 1, 1, 2, 1]))
    assert torch.get_num_threads() == 2


def test_an_error_brings_them_back_too(cores: Any) -> None:
    cores(1)

    def fails() -> None:
        with computing_threads("auto"):
            assert torch.get_num_threads() == 1
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fails()
    assert torch.get_num_threads() == 2


def test_more_than_there_are_cores_for_are_told(cores: Any) -> None:
    cores(1)
    said: list[str] = []
    with computing_threads("auto", said.append) as threads:
        assert said == ["1 thread instead of 2: the cores that this process may use are no more"]
        assert threads.count == torch.get_num_threads() == 1
        assert threads.look() is None
    cores(2)
    with computing_threads("auto", said.append):
        assert len(said) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_number_is_held(cores: Any, count: int) -> None:
    cores(1)
    with computing_threads(count, pytest.fail, lambda _: pytest.fail("chosen")) as threads:
        assert threads.look() is None
        assert threads.count == torch.get_num_threads() == count
    assert torch.get_num_threads() == 2


def test_threads_that_nobody_chose_are_torchs() -> None:
    assert Threads().count == 2
    assert Threads().look() is None


def test_what_recurs_remembers_its_load(cores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(2)
    made: list[Told] = []

    def make(most: int) -> Told:
        made.append(Told(most, 1, 1, 2))
        return made[-1]

    monkeypatch.setattr(topwork.ops.threads, "ThreadChoice", make)
    threads = RecurringThreads(torch.device("cpu"))
    seen = []
    for _ in range(2):
        threads.begin()
        seen.append(torch.get_num_threads())
        threads.look()
        seen.append(torch.get_num_threads())
        threads.end()
        assert torch.get_num_threads() == 2
    assert seen == [2, 1, 1, 1]
    assert len(made) == 1
    threads.look()  # nothing computes
    assert torch.get_num_threads() == 2


def test_on_a_card_nothing_is_chosen(cores: Any) -> None:
    cores(1)
    threads = RecurringThreads(torch.device("cuda"))
    threads.begin()
    threads.look()
    assert torch.get_num_threads() == 2
    threads.end()


def test_a_base_has_taken_the_first_cosines_before_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so has every new number of threads: of these the first are now and then off."""
    taken: list[int] = []
    for module in (topwork.ops.threads, topwork.models.load):
        monkeypatch.setattr(module, "take_first_cosines", lambda: taken.append(torch.get_num_threads()))
    tiny_base("llama")
    assert taken == [2]
    with computing_threads(1):
        assert taken == [2, 1]
    assert taken == [2, 1, 2]


def test_cosines_are_right_behind_the_first() -> None:
    """In processes of their own, of which every eighth has a wrong one otherwise."""
    program = (
        "import torch; torch.set_num_threads(2); from topwork.ops.threads import take_first_cosines as take; take(); "
        "x = torch.linspace(-9, 9, 2400); assert torch.equal(x.cos(), x.cos())"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", program], check=True)
