"""Combining by definition: dense ΔW in fp64, out of what PEFT makes of a folder, and textbook formulas on them."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

Deltas = dict[str, Tensor]
"""ΔW in fp64 by the parameter's name, as the model lays it out."""


def peft_deltas(folder: Path, model: PreTrainedModel) -> Deltas:
    """What PEFT's merge changes of every parameter, in fp64."""
    before = copy.deepcopy(model).double()
    adapted = PeftModel.from_pretrained(copy.deepcopy(model).double(), str(folder)).double()
    after = dict(adapted.merge_and_unload().named_parameters(remove_duplicate=False))
    own = dict(before.named_parameters(remove_duplicate=False))
    return {name: (after[name] - own[name]).detach() for name in own}


def weighted(sources: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Deltas:
    """Σ w ΔW."""
    return {name: sum(w * source[name] for w, source in zip(weights, sources)) for name in sources[0]}  # type: ignore[misc]


def averaged(sources: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Deltas:
    """Σ w ΔW / Σ w."""
    return {name: delta / sum(weights) for name, delta in weighted(sources, weights).items()}


def slerped(first: Mapping[str, Tensor], second: Mapping[str, Tensor], t: float) -> Deltas:
    """On the arc between the two, module by module; the straight line where the angle is nothing, or there is none."""
    return {name: _on_arc(first[name], second[name], t) for name in first}


def _on_arc(first: Tensor, second: Tensor, t: float) -> Tensor:
    if not first.any() or not second.any():
        return (1 - t) * first + t * second
    one, other = first / first.norm(), second / second.norm()
    along = float((one * other).sum())
    if abs(along) > 0.9995:
        return (1 - t) * first + t * second
    angle = math.atan2(float((other - along * one).norm()), along)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def nearest(deltas: Mapping[str, Tensor], rank: int) -> tuple[Deltas, float]:
    """Each matrix's best approximation of a rank, and the share of all energy that is left out."""
    found, lost, whole = {}, 0.0, 0.0
    for name, delta in deltas.items():
        if delta.dim() < 2:
            continue
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        found[name] = (u[:, :rank] * s[:rank]) @ v[:rank]
        lost, whole = lost + float((delta - found[name]).square().sum()), whole + float(delta.square().sum())
    return found, lost / whole


def furthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest distance of a parameter's change from the expected, relative to the largest change."""
    largest = max(float(delta.norm()) for delta in expected.values())
    return max(float((found[name] - expected[name]).norm()) for name in expected) / largest
