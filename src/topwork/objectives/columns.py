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
    """The batch with the columns that the objectives of its adapters, by name, want filled: in these adapters' rows,
    whatever was there. In the others' a column stays as the rows brought it, and is not a number where they did not.

    Of each part its own rows run, in a pass of their own: inside the gradient's pass they would be kept for it. Raises
    ValueError where what fills a column does not give one number a label.
    """
    for name in sorted({name for objective in objectives.values() for name in objective.columns}):
        given = batch.labels.columns.get(name)
        values = torch.full((len(batch.labels),), torch.nan, device=batch.tokens.device)
        values = values if given is None else given.clone()
        for rows, part in batch.parts():
            objective = objectives.get(part.segments[0].adapter or "")
            if objective is not None and name in objective.columns:
                found = objective.columns[name](base, part)
                if found.shape != (len(part.labels),):
                    raise ValueError(
                        f"column {name} was filled with {[*found.shape]}, not [{len(part.labels)}] numbers"
                    )
                values[rows] = found
        batch = replace(batch, labels=batch.labels.with_column(name, values))
    return batch
