"""When it is called overfitting: validation rises twice in a row while the training loss falls, told once."""

import pytest

from topwork.training.checkpoint import Validation
from topwork.training.watch import overfitting_since


def history(evals: list[float], trained: list[float | None]) -> list[Validation]:
    return [Validation(10 * number, train, loss) for number, (loss, train) in enumerate(zip(evals, trained))]


FALLING: list[float | None] = [None, 4.0, 3.0, 2.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("evals", "trained", "since"),
    [
        ([], FALLING, None),
        ([3.0, 2.0], FALLING, None),
        ([3.0, 2.0, 2.1], FALLING, None),
        ([3.0, 2.0, 2.1, 2.2], FALLING, 10),
        ([3.0, 2.0, 2.1, 2.05], FALLING, None),
        ([3.0, 2.0, 2.1, 2.1], FALLING, None),
        ([3.0, 2.0, 2.1, 2.2, 2.3], FALLING, None),
        ([3.0, 2.0, 2.1, 2.2, 2.1, 2.0], FALLING, None),
        ([3.0, 2.0, 2.1, 2.2, 2.1, 2.2, 2.3], [*FALLING, 0.4], None),
        ([3.0, 2.0, 2.1, 2.2], [None, 2.0, 2.1, 2.2], None),
        ([3.0, 3.1, 3.2], FALLING, 0),
        ([3.0, 3.1, 3.2], [None, None, 3.0], None),
    ],
)
def test_overfitting_since(evals: list[float], trained: list[float | None], since: int | None) -> None:
    assert overfitting_since(history(evals, trained)) == since
