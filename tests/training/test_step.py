"""The step: how sequences are spread over passes changes nothing, and nothing is updated by what is not finite."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.families import learning_batch, randomise, sequences, tiny_base
from reference.logprobs import log_probabilities_whole
from reference.measure import GRADIENTS_APART, LOGITS_APART, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import NonFiniteLossError
from topwork.models.base import Base
from topwork.objectives.sft import Sft
from topwork.ops.batch import Batch, Labels
from topwork.training.step import Learner, StepResult, mean_losses, train_step

LENGTHS = (13, 5, 7, 24, 9, 2, 17, 11)
CONFIGS = {
    "linear layers": AdapterConfig(r=4),
    "and a saved head": AdapterConfig(r=4, modules_to_save=["lm_head", "norm"]),
}


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients it was given."""

    def __init__(self, parameters: Sequence[Tensor], lr: float = 0.0) -> None:
        super().__init__(parameters, lr=lr)
        self.given: list[Tensor] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.given = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step()


def prepared(config: AdapterConfig = CONFIGS["linear layers"], family: str = "llama") -> tuple[Base, Adapters]:
    base = tiny_base(family)
    adapters = Adapters(base.module)
    adapters.add("a", config)
    randomise(adapters, "a")
    return base, adapters


def passes(sizes: Sequence[int], seed: int = 0) -> list[Batch]:
    """The eight sequences in passes of so many each, always with the same weights."""
    parts = sequences(LENGTHS, seed)
    weights = torch.arange(1, 101) / 50
    batches, at = [], 0
    for size in sizes:
        batch = learning_batch(parts[at : at + size], "a")
        learned = [len(part) - 1 for part in parts[at : at + size]]
        batches.append(
            replace(batch, labels=replace(batch.labels, loss_weights=torch.cat([weights[:count] for count in learned])))
        )
        at += size
    assert at == len(parts)
    return batches


def step(
    base: Base, parameters: Sequence[Any], optimizer: torch.optim.Optimizer, batches: Sequence[Batch],
    clip: float = 1.0,
) -> StepResult:  # fmt: skip
    """A step of the one adapter."""
    [result] = train_step(base, [Learner("a", Sft(), parameters, optimizer, clip)], batches)
    if isinstance(result, Exception):
        raise result
    return result


def stepped(
    base: Base, adapters: Adapters, batches: Sequence[Batch], clip: float = 0.0
) -> tuple[StepResult, list[Tensor]]:
    parameters = list(adapters.parameters("a").values())
    optimizer = Recorder(parameters)
    return step(base, parameters, optimizer, batches, clip), optimizer.given


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5], [2, 2, 4]], ids=str)
def test_one_pass_of_eight_is_any_other_split(sizes: list[int], name: str) -> None:
    base, adapters = prepared(CONFIGS[name])
    whole, expected = stepped(base, adapters, passes([8]))
    split, found = stepped(base, adapters, passes(sizes))
    assert relative(found, expected) < GRADIENTS_APART
    assert split.loss == pytest.approx(whole.loss, rel=LOGITS_APART)
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=GRADIENTS_APART)
    assert (split.tokens, split.learned_tokens) == (whole.tokens, whole.learned_tokens) == (88, 80)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_loss_list_does_not_depend_on_the_passes(family: str) -> None:
    lists = []
    for sizes in ([8], [1] * 8, [3, 5]):
        base, adapters = prepared(family=family)
        parameters = list(adapters.parameters("a").values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
        lists.append([
            step(base, parameters, optimizer, passes(sizes, number)).loss for number in range(6)
        ])  # fmt: skip
    assert lists[1] == pytest.approx(lists[0], rel=1e-5)
    assert lists[2] == pytest.approx(lists[0], rel=1e-5)
    assert len(set(lists[0])) == 6


def test_the_loss_is_the_weighted_mean_over_the_step() -> None:
    """Against log_softmax over all logits; weights count in the divisor too."""
    base, adapters = prepared()
    total, weight = 0.0, 0.0
    with torch.no_grad():
        for batch in passes([3, 5]):
            hidden = base.hidden(batch)[batch.labels.positions]
            truth = log_probabilities_whole(hidden, base.head.weight, batch.labels.targets)
            total, weight = (
                total - float((batch.labels.loss_weights * truth).sum()),
                weight + float(batch.labels.loss_weights.sum()),
            )
    result, _ = stepped(base, adapters, passes([3, 5]))
    assert result.loss == pytest.approx(total / weight, rel=LOGITS_APART)
    assert mean_losses(base, {"a": Sft()}, passes([8]))["a"].loss == pytest.approx(total / weight, rel=LOGITS_APART)
    assert mean_losses(base, {"a": Sft()}, passes([2, 6]))["a"].loss == pytest.approx(total / weight, rel=LOGITS_APART)


def test_clipping_cuts_the_norm_and_nothing_else() -> None:
    base, adapters = prepared()
    free, gradients = stepped(base, adapters, passes([8]))
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    assert free.grad_norm == pytest.approx(norm, rel=GRADIENTS_APART)
    cut, clipped = stepped(base, adapters, passes([8]), clip=norm / 3)
    assert cut.grad_norm == pytest.approx(norm, rel=GRADIENTS_APART)
    assert relative(clipped, [g / 3 for g in gradients]) < 1e-4
    _, spared = stepped(base, adapters, passes([8]), clip=norm * 2)
    assert relative(spared, gradients) < 1e-7


def test_gradients_are_gone_after_a_step() -> None:
    base, adapters = prepared()
    stepped(base, adapters, passes([8]))
    assert all(parameter.grad is None for parameter in adapters.parameters("a").values())
    _, once = stepped(base, adapters, passes([8]))
    _, again = stepped(base, adapters, passes([8]))
    assert relative(again, once) < 1e-7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "model"])
def test_a_loss_that_is_not_finite_updates_nothing(where: str, bad: float) -> None:
    base, adapters = prepared()
    parameters = list(adapters.parameters("a").values())
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    batches = passes([4, 4])
    embedding = base.module.get_input_embeddings().weight
    good = embedding.detach().clone()
    if where == "weights":
        batches[1] = replace(
            batches[1], labels=replace(batches[1].labels, loss_weights=batches[1].labels.loss_weights * bad)
        )
    else:
        embedding[batches[1].tokens[3]] = bad
    with pytest.raises(NonFiniteLossError, match="the loss is"):
        step(base, parameters, optimizer, batches)
    assert all(torch.equal(left, right) for left, right in zip(parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert not optimizer.state
    embedding.copy_(good)
    assert step(base, parameters, optimizer, passes([8])).loss > 0


def test_a_pass_in_which_nothing_is_learned_changes_nothing() -> None:
    for config in CONFIGS.values():
        base, adapters = prepared(config)
        _, expected = stepped(base, adapters, passes([8]))
        empty = replace(learning_batch(sequences((3, 4)), "a"), labels=Labels())
        result, found = stepped(base, adapters, [empty, *passes([8])])
        assert relative(found, expected) < 1e-7
        assert result.learned_tokens == 80
