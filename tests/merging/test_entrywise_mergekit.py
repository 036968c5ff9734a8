"""Ways to combine against what mergekit 0.1.5 made of full models: tools/mergekit_reference.py wrote it down."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from reference.measure import ROUNDING, relative
from reference.mergekit import MODULES, SOURCES, Run, base, delta, factors, runs
from topwork.merging.combine import entrywise
from topwork.merging.combine.linear import as_mean, as_weighted, on_the_arc
from topwork.merging.deltas import DenseDelta, LowRankDelta, weighted_sum

ROUNDED = 8 * ROUNDING
"""mergekit weights, adds, enlarges and divides in fp32, and adds the base, which is no larger than the change."""


def ours(run: Run, module: str) -> Tensor:
    deltas = torch.stack([delta(source, module) for source in SOURCES])
    weights, density, masks = run.settings["weights"], run.settings["density"], run.masks(module)
    match run.settings["method"]:
        case "ties":
            return entrywise.ties(deltas, weights, density, "mergekit")
        case "dare_linear":
            return entrywise.dare(deltas, weights, density, masks, "mergekit")
        case "dare_ties":
            return entrywise.dare_ties(deltas, weights, density, masks, "mergekit")
        case "della":
            return entrywise.della(deltas, weights, density, masks, "mergekit", run.settings["epsilon"])
        case _:
            return entrywise.breadcrumbs(deltas, weights, density, run.settings["gamma"])


ENTRYWISE = {name: run for name, run in runs().items() if "density" in run.settings}


@pytest.mark.parametrize("name", sorted(ENTRYWISE.keys() - {"ties_one_negative", "ties_all_negative"}))
@pytest.mark.parametrize("module", MODULES)
def test_mergekits_models(name: str, module: str) -> None:
    run = ENTRYWISE[name]
    found = base(module) + run.settings.get("lambda", 1.0) * ours(run, module)
    assert relative(found, run.merged(module)) < ROUNDED
    assert relative(base(module), run.merged(module)) > 0.05


@pytest.mark.parametrize("module", MODULES)
def test_pruning_by_magnitude(module: str) -> None:
    settings = ENTRYWISE["magnitude_prune"].settings
    deltas = torch.stack([delta(source, module) for source in SOURCES])
    found = base(module) + entrywise.magnitude_prune(deltas, settings["weights"], settings["density"])
    assert relative(found, ENTRYWISE["magnitude_prune"].merged(module)) < ROUNDED


@pytest.mark.parametrize("module", MODULES)
def test_what_mergekit_makes_of_negative_weights_in_ties(module: str) -> None:
    """It divides by the sum of the agreeing weights: negative ones alone turn the sign back, so that taking three
    adapters away adds them; 1 and -0.8 leave 0.2 to divide by."""
    run = ENTRYWISE["ties_all_negative"]
    found, theirs = ours(run, module), run.merged(module) - base(module)
    assert relative(found, -theirs) < ROUNDED * 4  # of the base, which is taken away here
    run = ENTRYWISE["ties_one_negative"]
    found, theirs = ours(run, module), run.merged(module) - base(module)
    largest = max(float(delta(source, module).abs().max()) for source in SOURCES)
    assert found.abs().max() <= largest
    assert theirs.abs().max() > 1.5 * largest
    same = (found - theirs).abs() <= 1e-6 * largest
    assert 0.3 < same.double().mean() < 0.95


def test_masks_are_what_mergekit_draws() -> None:
    """They hold roughly the density: the fixture caught masks, and not something else."""
    for name in ("dare_linear", "dare_ties", "della"):
        run = ENTRYWISE[name]
        kept: Mapping[str, float] = {
            source: float(torch.cat([run.masks(module)[i].flatten() for module in MODULES]).double().mean())
            for i, source in enumerate(SOURCES)
        }
        assert list(kept.values()) == pytest.approx(run.settings["density"], abs=0.08)


LINEAR = {
    "linear": as_mean, "task_arithmetic": as_weighted, "task_arithmetic_lambda": as_weighted, "nuslerp": on_the_arc,
    "nuslerp_unnormalized": on_the_arc,
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("module", MODULES)
def test_mergekits_models_by_factors(name: str, module: str) -> None:
    """mergekit's `nuslerp`, told the base, is what slerp is here: on the arc between two changes of it."""
    run = runs()[name]
    deltas = [LowRankDelta(*factors(source, module)) for source in run.sources]
    total = weighted_sum(deltas, LINEAR[name](deltas, run.settings["weights"]))
    assert isinstance(total, LowRankDelta)
    found = base(module) + run.settings.get("lambda", 1.0) * total.dense()
    assert relative(found, run.merged(module)) < ROUNDED


@pytest.mark.parametrize("module", MODULES)
def test_mergekits_slerp_of_whole_weights(module: str) -> None:
    run = runs()["slerp"]
    weights = [DenseDelta(base(module) + delta(source, module)) for source in run.sources]
    t = run.settings["t"]
    found = weighted_sum(weights, on_the_arc(weights, (1 - t, t))).dense()
    assert relative(found, run.merged(module)) < ROUNDED
