"""Columns that a pass without a gradient fills before the step."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from topwork.models.base import Base
from topwork.objectives.objective import Objective
from topwork.ops.batch import Batch


def reference(base: Base, batch: Batch) -> Tensor:
    """Log-probabilities [N] of the bare base: the model before any of its adapters."""
    segments = tuple(replace(segment, adapter=None) for segment in batch.segments)
    return base.log_probabilities(replace(batch, segments=segments, dropout_seeds=None))


@torch.no_grad()
def with_columns(base: Base, objectives: Mapping[str, Objective], batch: Batch) -> Batch:
    """The batch with the columns that the objectives of its adapters, by name, want filled; zero for the others.

    Of each part its own rows run, in a pass of their own: inside the gradient's pass they would be kept for it.
    """
    for name in sorted({name for objective in objectives.values() for name in objective.columns}):
        values = torch.zeros(len(batch.labels), device=batch.tokens.device)
        for rows, part in batch.parts():
            objective = objectives.get(part.segments[0].adapter or "")
            if objective is not None and name in objective.columns:
                values[rows] = objective.columns[name](base, part)
        batch = replace(batch, labels=batch.labels.with_column(name, values))
    return batch
