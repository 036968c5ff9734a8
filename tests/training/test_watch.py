"""When it is called overfitting: validation rises twice in a row while the training loss falls, told once."""

import pytest
import torch
from torch import nn

from topwork.training import watch
from topwork.training.checkpoint import TrainState, Validation
from topwork.training.watch import FirstWeights, overfitting_since, worse_than_base


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


def test_what_was_no_worse_before_training_is_named() -> None:
    def state(*losses: float) -> TrainState:
        history = tuple(Validation(2 * at, None, loss) for at, loss in enumerate(losses))
        return TrainState(step=history[-1].step if history else 0, history=history)

    assert worse_than_base(state(), True) is None
    assert worse_than_base(state(3.0), True) is None
    assert worse_than_base(state(3.0, 2.9, 3.1), True) is None
    last = worse_than_base(state(3.0, 2.9, 3.1), False)
    assert str(last).startswith("the base without the adapter is better: its validation loss is 3.0000, and 3.1000")
    assert "of step 4, the last of this run" in str(last)
    best = worse_than_base(state(3.0, 3.2, 3.1), True, "runs/before")
    assert str(best).startswith("runs/before, from which it began, is better: its validation loss is 3.0000")
    assert str(best).endswith("until then take that")
    assert "is as good" in str(worse_than_base(state(3.0, 3.0), True))


def test_that_nothing_moved_is_seen_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding's sum at once would make an int64 copy of it all."""
    sizes: list[int] = []
    real = torch.Tensor.sum

    def counted(tensor: torch.Tensor, *given: object, **named: object) -> torch.Tensor:
        sizes.append(tensor.numel())
        return real(tensor, *given, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(watch, "PIECE", 7)
    monkeypatch.setattr(torch.Tensor, "sum", counted)
    parameters = {"lora_B": nn.Parameter(torch.randn(5, 6)), "norm": nn.Parameter(torch.randn(3).bfloat16())}
    first = FirstWeights(parameters)
    assert first.unmoved()
    with torch.no_grad():
        parameters["lora_B"][4, 5] += 1
    assert not first.unmoved()
    assert max(sizes) <= 7
