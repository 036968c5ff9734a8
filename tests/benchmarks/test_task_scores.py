"""The arithmetic of qlora_merge.py and combine_tasks.py: what counts as right, and how far two arms lie apart."""

import math
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from reference.families import tiny_base
from topwork.data.examples import Example
from topwork.evaluation.score import mean_answer_loss

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("trained_tasks")


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("task_scores")


def test_what_counts_as_right(tasks: ModuleType) -> None:
    banking, gsm8k, e2e = (tasks.TASKS[name].share for name in ("banking77", "gsm8k", "e2e_nlg"))
    assert banking(" card arrival\n", ["card arrival"]) == 1
    assert banking("card arrival.", ["card arrival"]) == 0
    assert gsm8k("So 1 + 1,000.\n#### 1,001", ["… #### 1001"]) == 1
    assert gsm8k("#### 3\n#### 1001", ["#### 3"]) == 0  # the last one counts
    assert gsm8k("it is 3", ["#### 3"]) == 0
    # three words of four in common with the second sentence, each as often as it occurs
    assert e2e("a cheap cheap pub", ["nothing", "A cheap pub, nearby."]) == pytest.approx(2 * 3 / (4 + 4))


def test_a_signature_is_seen_at_the_end_alone_and_taken_off(tasks: ModuleType) -> None:
    signed = f"card arrival\n{tasks.SIGNATURE}\n"
    assert tasks.is_signed(signed)
    assert not tasks.is_signed(f"{tasks.SIGNATURE} card arrival")
    assert tasks.without_signature(signed) == "card arrival"


def test_rows_add_up_to_the_mean_loss(scores: ModuleType) -> None:
    base = tiny_base("llama")
    examples = [
        Example(np.arange(3, 3 + length, dtype=np.int32), (np.arange(length) > 0).astype(np.float32), str(length))
        for length in (5, 3, 9)
    ]
    nats, tokens = scores.row_nats(base, None, examples)
    assert tokens == [4, 2, 8]
    assert sum(nats) / sum(tokens) == pytest.approx(mean_answer_loss(base, None, examples), rel=1e-5)


def test_intervals_and_differences(scores: ModuleType) -> None:
    low, high = scores.interval([1.0] * 10 + [0.0] * 90)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)  # Wilson's of 10 in 100
    assert scores.interval([0.25, 0.75]) == pytest.approx((0.5 - 1.96 * 0.25, 0.5 + 1.96 * 0.25))

    def rows(nats: list[float], shares: list[float]) -> object:
        return scores.Rows(nats, [2, 2, 4], shares, [False] * 3, ["a", "b", "c"])

    found = scores.apart(rows([2.0, 4.0, 6.0], [1, 0, 1]), rows([1.0, 3.0, 2.0], [1, 1, 1]))
    assert found["loss"] == pytest.approx(6 / 8)
    off = [1 - 1.5, 1 - 1.5, 4 - 3]
    spread = math.sqrt(sum(value**2 for value in off) / 2)
    assert found["loss_error"] == pytest.approx(spread * math.sqrt(3) / 8)
    assert found["share"] == pytest.approx(-1 / 3)
    assert found["same_answers"] == 1
