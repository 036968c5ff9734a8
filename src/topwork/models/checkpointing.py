"""Activation checkpointing: chosen layers keep only their input, and run again when the backward pass reaches them.

Recomputing a layer repeats its forward pass bit for bit. A fast layer leaves out its down projection, a quarter of its
work, where no gradient depends on that (`models/fast.py`); plain layers repeat it too: the same bits, for more time.

It is the first k of L layers that are checkpointed. The backward pass reaches them last; on GPUs the others have then
let go of what they kept, on CPUs that stays until the pass is over (`ops/workspace.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from topwork.common.errors import ModelError
from topwork.models.base import Base
from topwork.models.fast import goes_backward
from topwork.models.text_part import text_model
from topwork.ops.context import current, without_workspace

Run = Callable[[Tensor], Any]
"""A layer's forward pass with everything but its hidden states already given."""


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that can be checkpointed, in order; none where the family's are not made for it."""
    return [module for module in text_model(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(base: Base, count: int) -> None:
    """Checkpoint the first `count` layers from now on whenever gradients are taken; 0 switches it off.

    Raises ModelError where the base has fewer layers or none that can be checkpointed.
    """
    layers = decoder_layers(base.module)
    if not 0 <= count <= len(layers):
        raise ModelError(_refusal(base, count, len(layers)))
    for number, layer in enumerate(layers):
        layer._gradient_checkpointing_func = Checkpoint(layer)  # type: ignore[assignment]
        layer.gradient_checkpointing = layer.training = number < count


def _refusal(base: Base, count: int, there: int) -> str:
    family = base.module.config.get_text_config().model_type
    if not there:
        return (
            f"activation_checkpointing: {family}'s layers can't be checkpointed in transformers (they are no "
            "GradientCheckpointingLayer); set training.activation_checkpointing to off, or lower tokens_per_pass"
        )
    return (
        f"training.activation_checkpointing is {count}, and {base.name} has {there} layers; give at most {there}, or "
        "full for all of them"
    )


@dataclass(frozen=True)
class Checkpoint:
    """What transformers calls in place of a checkpointed layer's forward."""

    layer: GradientCheckpointingLayer

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        hidden, *others = args
        run = _run_of(self.layer, forward, others)
        if not goes_backward(self.layer, hidden):
            return run(hidden)
        parameters = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        context = current()
        learned = context.learned()
        given = [*others, *getattr(forward, "keywords", {}).values()]
        if any(isinstance(value, Tensor) and value.requires_grad for value in given):
            raise ModelError(
                f"{type(self.layer).__name__} is given learned tensors beside its hidden states, and checkpointing "
                "would lose their gradient; set training.activation_checkpointing to off"
            )
        return _Recomputed.apply(run, context, hidden, *learned, *parameters)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, context, hidden, *learned):  # type: ignore[no-untyped-def]
        ctx.run, ctx.context = run, context
        ctx.save_for_backward(hidden, *learned)
        with without_workspace():
            return run(hidden)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        hidden, *learned = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[2])
        own = len(ctx.context.learned())  # the pass's come first, and become leaves here; the layer's are leaves
        learned[:own] = [x.detach().requires_grad_() for x in learned[:own]]
        context = replace(ctx.context.with_learned(learned[:own]), workspace=None, recomputing=True)
        with without_workspace():
            with torch.enable_grad(), context.active():
                outputs = ctx.run(hidden)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            differ = [isinstance(y, Tensor) and y.requires_grad for y in outputs]
            left, right = (list(compress(side, differ)) for side in (outputs, gradients))
            wanted = [x for x in (hidden, *learned) if x.requires_grad]
            found = iter(torch.autograd.grad(left, wanted, right, allow_unused=True))
        return None, None, *(next(found) if x.requires_grad else None for x in (hidden, *learned))


def _run_of(layer: GradientCheckpointingLayer, forward: Callable[..., Any], others: Sequence[Any]) -> Run:
    """The layer with its other arguments given, always in evaluation: transformers checkpoints a layer in training mode
    only, and some families would then drop out in it."""

    def run(hidden: Tensor) -> Any:
        before, layer.training = layer.training, False
        try:
            return forward(hidden, *others)
        finally:
            layer.training = before

    return run
