"""Activation checkpointing: chosen layers keep only their input, and run again when the backward pass reaches them.

Recomputing a layer repeats its forward pass bit for bit, save for products whose value no gradient depends on: mostly
the down projection, a quarter of a layer's work (`models/standins.py`).

It is the first k of L layers that are checkpointed. The backward pass reaches them last; on GPUs the others have then
let go of what they kept, on CPUs that stays until the pass is over (`ops/kept.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from topwork.common.errors import ModelError
from topwork.models.base import Base
from topwork.models.fast import goes_backward
from topwork.models.standins import Run, StandIn, left_out, outputs_of, stand_ins_at, unneeded_products
from topwork.ops.batch import Batch, Segment, batch_of
from topwork.ops.context import PassContext, current, without_workspace


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that can be checkpointed, in order; none where the family's are not made for it."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(base: Base, count: int, adapters: Sequence[str]) -> None:
    """Checkpoint the first `count` layers from now on whenever gradients are taken; 0 switches it off.

    To be called when the named adapters are grafted: what is left out while recomputing is found with them in place.
    Raises ModelError where the base has fewer layers or none that can be checkpointed.
    """
    layers = decoder_layers(base.module)
    if not 0 <= count <= len(layers):
        raise ModelError(_refusal(base, count, len(layers)))
    for layer in layers:
        _switch_off(layer)
    if not count:
        return
    left_out = _products_to_leave_out(base, layers[:count], adapters)
    for layer, paths in zip(layers, left_out):
        _switch_on(layer, Checkpoint(layer, stand_ins_at(layer, paths)))


def products_left_out(base: Base) -> list[str]:
    """Paths of the linear layers whose product is not repeated in the layers that are checkpointed now."""
    found = []
    for path, layer in base.module.named_modules():
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(function, Checkpoint) and function.layer.gradient_checkpointing:
            found += [f"{path}.{stand_in.name}" for stand_in in function.stand_ins]
    return found


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
    stand_ins: tuple[StandIn, ...] = ()

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
        return _Recomputed.apply(run, self.stand_ins, context, hidden, *learned, *parameters)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, stand_ins, context, hidden, *learned):  # type: ignore[no-untyped-def]
        ctx.run, ctx.stand_ins, ctx.context = run, stand_ins, context
        ctx.save_for_backward(hidden, *learned)
        with without_workspace():
            return run(hidden)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        hidden, *learned = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[3])
        own = len(ctx.context.learned())  # the pass's come first, and become leaves here; the layer's are leaves
        learned[:own] = [x.detach().requires_grad_() for x in learned[:own]]
        context = replace(ctx.context.with_learned(learned[:own]), workspace=None, recomputing=True)
        with without_workspace():
            with torch.enable_grad(), context.active(), left_out(ctx.stand_ins):
                outputs = outputs_of(ctx.run(hidden))
            differ = [isinstance(y, Tensor) and y.requires_grad for y in outputs]
            left, right = (list(compress(side, differ)) for side in (outputs, gradients))
            wanted = [x for x in (hidden, *learned) if x.requires_grad]
            found = iter(torch.autograd.grad(left, wanted, right, allow_unused=True))
        return None, None, None, *(next(found) if x.requires_grad else None for x in (hidden, *learned))


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


@dataclass
class _Capture:
    """Runs a layer as it is, and keeps how it was called."""

    layer: GradientCheckpointingLayer
    calls: list[tuple[Run, Tensor, PassContext]] = field(default_factory=list)

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        hidden, *others = args
        run = _run_of(self.layer, forward, others)
        self.calls.append((run, hidden.detach(), current()))
        return run(hidden)


def _switch_on(layer: GradientCheckpointingLayer, function: "Checkpoint | _Capture") -> None:
    layer._gradient_checkpointing_func = function  # type: ignore[assignment]
    layer.gradient_checkpointing = layer.training = True


def _switch_off(layer: GradientCheckpointingLayer) -> None:
    layer.gradient_checkpointing = layer.training = False


def _products_to_leave_out(
    base: Base, layers: Sequence[GradientCheckpointingLayer], adapters: Sequence[str]
) -> list[tuple[str, ...]]:
    """For each layer the linear layers whose value no gradient needs; found once for layers built alike."""
    found: dict[tuple[Any, ...], tuple[str, ...]] = {}
    kinds = [tuple((path, type(module)) for path, module in layer.named_modules()) for layer in layers]
    for layer, kind, (run, hidden, context) in zip(layers, kinds, _captured_runs(base, layers, adapters)):
        if kind not in found:
            with context.active():
                found[kind] = unneeded_products(layer, run, hidden)
    return [found[kind] for kind in kinds]


def _captured_runs(
    base: Base, layers: Sequence[GradientCheckpointingLayer], adapters: Sequence[str]
) -> list[tuple[Run, Tensor, PassContext]]:
    """How each layer is called in one pass of a few tokens, some for each adapter."""
    captures = [_Capture(layer) for layer in layers]
    for layer, capture in zip(layers, captures):
        _switch_on(layer, capture)
    try:
        with torch.no_grad():
            base.hidden(_few_tokens(base, adapters))
    finally:
        for layer in layers:
            _switch_off(layer)
    return [capture.calls[0] for capture in captures]


def _few_tokens(base: Base, adapters: Sequence[str]) -> Batch:
    """Two random tokens for each adapter."""
    vocabulary = base.module.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (len(adapters), 2), generator=torch.Generator().manual_seed(0))
    batch = batch_of([part.to(base.device) for part in tokens])
    segments = tuple(Segment(2 * at, 2 * at + 2, name) for at, name in enumerate(adapters))
    return Batch(batch.tokens, batch.positions, batch.cu_seqlens, segments).with_dropout_seeds(range(len(adapters)))
