"""Several adapters in one pass: each one's step is the step it takes alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference.families import added, learning_batch, sequences, tiny_base
from reference.measure import GRADIENTS_APART, LOGITS_APART, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import NonFiniteLossError
from topwork.models.base import Base
from topwork.objectives.sft import Sft
from topwork.ops.batch import Batch, Labels, Segment
from topwork.training.config import TrainingConfig
from topwork.training.optimizers import make_optimizer, parameter_groups, set_learning_rate
from topwork.training.step import Learner, StepResult, mean_losses, train_step

CONFIGS = {
    "a": AdapterConfig(r=4),
    "b": AdapterConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"]),
    "c": AdapterConfig(r=8, target_modules=["down_proj"]),
}
WITH_HEAD = {**CONFIGS, "b": AdapterConfig(r=2, target_modules=["lm_head", "v_proj"])}
LENGTHS = {"a": (13, 5), "b": (7, 24, 9), "c": (2, 17)}
CLIPS = {"a": 0.0, "b": 0.01, "c": 1.0}


def mixed(names: Sequence[str], seed: int = 0) -> Batch:
    """One pass with a segment for each name."""
    rows = [learning_batch(sequences(LENGTHS[name], seed + at), name, at) for at, name in enumerate("abc")]
    parts = [part for part in rows if part.segments[0].adapter in names]
    bounds, segments, starts = [0], [], []
    for part in parts:
        start = bounds[-1]
        starts.append(start)
        bounds += [start + bound for bound in part.cu_seqlens[1:]]
        segments.append(Segment(start, bounds[-1], part.segments[0].adapter))
    tokens, positions = (torch.cat([getattr(part, field) for part in parts]) for field in ("tokens", "positions"))
    targets, weights = (
        torch.cat([getattr(part.labels, field) for part in parts]) for field in ("targets", "loss_weights")
    )
    learned = torch.cat([part.labels.positions + start for part, start in zip(parts, starts)])
    return Batch(tokens, positions, tuple(bounds), tuple(segments), Labels(learned, targets, weights))


class Keep(torch.optim.SGD):
    """Steps nothing, and keeps the gradients."""

    given: list[Tensor]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.given = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def prepared(configs: dict[str, AdapterConfig] = CONFIGS) -> tuple[Base, Adapters, dict[str, Learner]]:
    base = tiny_base()
    adapters = added(base, **configs)
    learners = {}
    for name in configs:
        parameters = list(adapters.parameters(name).values())
        learners[name] = Learner(name, Sft(), parameters, Keep(parameters, lr=0.0), CLIPS[name])
    return base, adapters, learners


def gradients(learner: Learner) -> list[Tensor]:
    optimizer = learner.optimizer
    assert isinstance(optimizer, Keep)
    return optimizer.given


@pytest.mark.parametrize("configs", [CONFIGS, WITH_HEAD], ids=["linear layers", "one has the head"])
def test_each_steps_as_alone(configs: dict[str, AdapterConfig]) -> None:
    base, _, learners = prepared(configs)
    together = train_step(base, list(learners.values()), [mixed("abc"), mixed("ca", 5)])
    found = [gradients(learner) for learner in learners.values()]
    for name, result, own in zip(learners, together, found):
        passes = [mixed(name)] if name == "b" else [mixed(name), mixed(name, 5)]
        [alone] = train_step(base, [learners[name]], passes)
        assert isinstance(alone, StepResult)
        assert isinstance(result, StepResult)
        assert result.loss == pytest.approx(alone.loss, rel=LOGITS_APART)
        assert result.grad_norm == pytest.approx(alone.grad_norm, rel=GRADIENTS_APART)
        assert (result.tokens, result.learned_tokens) == (alone.tokens, alone.learned_tokens)
        assert relative(own, gradients(learners[name])) < GRADIENTS_APART
    assert len({result.loss for result in together if isinstance(result, StepResult)}) == 3


def test_validation_losses_are_each_ones_own() -> None:
    base, _, learners = prepared()
    found = mean_losses(base, {name: Sft() for name in learners}, [mixed("abc"), mixed("ca", 5)])
    for name in learners:
        passes = [mixed(name)] if name == "b" else [mixed(name), mixed(name, 5)]
        alone = mean_losses(base, {name: Sft()}, passes)[name]
        assert found[name].loss == pytest.approx(alone.loss, rel=LOGITS_APART)


@pytest.mark.parametrize("where", ["weights", "adapter"])
def test_one_that_is_not_finite_is_left_out_and_touches_no_other(where: str) -> None:
    base, adapters, learners = prepared()
    expected = train_step(base, list(learners.values()), [mixed("abc")])
    before = {name: gradients(learner) for name, learner in learners.items()}
    learners["b"].optimizer.given = []  # type: ignore[attr-defined]
    batch = mixed("abc")
    if where == "weights":
        [_, (rows, _), _] = batch.parts()
        weights = batch.labels.loss_weights.clone()
        weights[rows] = float("inf")
        batch = replace(batch, labels=replace(batch.labels, loss_weights=weights))
    else:
        next(iter(adapters.parameters("b").values())).data.fill_(float("nan"))
    results = train_step(base, list(learners.values()), [batch])
    assert isinstance(results[1], NonFiniteLossError)
    assert gradients(learners["b"]) == []
    assert [results[0], results[2]] == [expected[0], expected[2]]
    for name in "ac":
        assert all(torch.equal(left, right) for left, right in zip(gradients(learners[name]), before[name]))
    assert all(p.grad is None for learner in learners.values() for p in learner.parameters)


def test_parts_are_whole_batches() -> None:
    batch = mixed("abc")
    parts = [part for _, part in batch.parts()]
    for name, part in zip("abc", parts, strict=True):
        own = mixed(name)
        assert (part.cu_seqlens, part.segments) == (own.cu_seqlens, own.segments)
        for field in ("tokens", "positions"):
            assert torch.equal(getattr(part, field), getattr(own, field)), field
        for field in ("positions", "targets", "loss_weights"):
            assert torch.equal(getattr(part.labels, field), getattr(own.labels, field)), field


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_loraplus_steps_b_by_its_own_rate(optim: str) -> None:
    """Adam's first step is the learning rate, whatever the gradient."""
    config = TrainingConfig.model_validate(
        {"learning_rate": 1e-3, "loraplus_lr_ratio": 16, "optim": optim, "adam_epsilon": 1e-30}
    )
    parameters = {
        name: torch.nn.Parameter(torch.zeros(4))
        for name in ("x.lora_A.weight", "x.lora_B.weight", "x.lora_embedding_B")
    }
    optimizer = make_optimizer(config, parameter_groups(config, parameters))
    set_learning_rate(optimizer, 5e-4)
    for parameter in parameters.values():
        parameter.grad = torch.ones(4)
    optimizer.step()
    moved = [-float(parameter.detach()[0]) for parameter in parameters.values()]
    assert moved == pytest.approx([5e-4, 8e-3, 8e-3], rel=1e-5)
    [group] = parameter_groups(config.model_copy(update={"loraplus_lr_ratio": None}), parameters)
    assert group["names"] == list(parameters)
