"""A decoder layer that runs through the ops that go backward by hand (`ops/project.py`, `ops/self_attention.py`,
`ops/residual.py`).

Which layers get one is decided in `models/recognise.py`. Adapters may come and go at any time: what a linear layer is
made of is asked in every pass, and what is more than frozen weights with low-rank terms and vectors runs on plain
modules.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from topwork.models.joined import JoinedWeights, join
from topwork.models.layer_parts import AttentionPart, MlpPart, Norm, Wiring, bare, own
from topwork.ops.context import current, current_batch, has_workspace, without_workspace
from topwork.ops.decoder_layer import DecoderLayer, at_once, decoder_layer, decoder_layer_of
from topwork.ops.feedforward import feedforward, feedforward_of
from topwork.ops.parts import is_plain
from topwork.ops.project import project
from topwork.ops.projection import Projection, projection_of
from topwork.ops.prologues import Gated, Identity, RmsNorm, normed
from topwork.ops.residual import residual_branch, residual_norm, residual_sum
from topwork.ops.self_attention import rotated_parts, self_attention


class FastLayer(GradientCheckpointingLayer):
    """A decoder layer with the same modules at the same places as the plain one it stands for."""

    self_attn: nn.Module
    mlp: nn.Module

    def __init__(
        self, plain: nn.Module, wiring: Wiring, norms: dict[str, Norm], attention: AttentionPart | None,
        mlp: MlpPart | None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, module in plain.named_children():
            self.add_module(name, module)
        for name, value in vars(plain).items():
            if not name.startswith("_") and not callable(value):
                setattr(self, name, value)  # what transformers asks a layer about (its kind of attention, its number)
        self.wiring, self.norms = wiring, norms
        self.attention_part, self.mlp_part = attention, mlp
        self.multiplier = float(getattr(plain, "residual_multiplier", 1.0))
        self.is_last = self.before_another = False
        self._joined: dict[tuple[str, ...], JoinedWeights] = {}
        self.train(plain.training)

    @property
    def plain_parts(self) -> list[str]:
        """What of it runs on plain modules, with their classes."""
        parts = ((self.attention_part, "attention", self.self_attn), (self.mlp_part, "MLP", self.mlp))
        return [f"{name} ({type(module).__name__})" for part, name, module in parts if part is None]

    def join_weights(self) -> None:
        """Make the dense weights of each group one tensor (`models/joined.py`), where they are not yet. To be called
        whenever parameters were given other values; until then they are multiplied apart."""
        for names, layers in self._dense_groups():
            there = self._joined.get(names)
            if there is None or not there.has([(layer.weight, layer.bias) for layer in layers]):
                self._joined.pop(names, None)
                if (joined := join(layers)) is not None:
                    self._joined[names] = joined

    def joined(self) -> list[Tensor]:
        """The parameters that are part of a joined tensor."""
        layers = [layer for names, group in self._dense_groups() if names in self._joined for layer in group]
        return [parameter for layer in layers for parameter in layer.parameters()]

    def linear_groups(self) -> Iterator[list[nn.Module]]:
        """Its linear layers that run as projections, those with one input together; adapted or not."""
        parts = ((self.self_attn, self.attention_part, "o_proj"), (self.mlp, self.mlp_part, "down_proj"))
        for parent, part, last in parts:
            if part is not None:
                yield [own(parent).get_submodule(name) for name in part.inputs]
                yield [own(parent).get_submodule(last)]

    def _dense_groups(self) -> Iterator[tuple[tuple[str, ...], list[nn.Linear]]]:
        parts = ((self.self_attn, self.attention_part), (self.mlp, self.mlp_part))
        for parent, names in [(own(parent), part.inputs) for parent, part in parts if part is not None]:
            layers = [own(parent.get_submodule(name)) for name in names]
            if len(layers) > 1 and all(type(layer) is nn.Linear for layer in layers):
                yield names, layers  # type: ignore[misc]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.join_weights()  # a cast or a move gave the parameters other values
        return self

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **others: Any
    ) -> Tensor:
        """[1, T, d] -> [1, T, d], the last layer only the rows that the batch wants; the rest as transformers hands
        it on. Between fast layers x is in fp32: what sixty sums round off would be half of a gradient's error. In a
        training pass such an x is overwritten by the next layer, so whoever wants to keep it makes a copy."""
        if goes_backward(self, hidden_states):
            return self._run(hidden_states, position_embeddings, others)
        with without_workspace():
            return self._run(hidden_states, position_embeddings, others)

    def _run(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, others: dict[str, Any]
    ) -> Tensor:
        dtype, batch = self._dtype(), current_batch()
        part, attention = self.attention_part, bare(self.self_attn)
        x = hidden_states.to(torch.promote_types(dtype, torch.float32))
        in_place = has_workspace(x)  # a training pass, in which nobody but the layers sees x
        found: dict[nn.Module, Projection | None] = {}
        if (whole := self._whole(x, found)) is not None:
            turns = self._turns(position_embeddings)
            positions = batch.output_positions if self.is_last else None
            x = decoder_layer(x, whole, turns, batch.cu_seqlens, in_place, current().recomputing, positions)
            return x if self.is_last or self.before_another else x.to(dtype)
        before = self.wiring.before_attention
        if part is not None and part.fits(attention):
            group = self._group(attention, part.inputs, found)
            x, given, prologue = self._branch(x, dtype, before, group, in_place=in_place)
            y = self._heads(given, prologue, group, position_embeddings, attention, part)
        else:
            part = None
            x, given = residual_branch(x, dtype, in_place=in_place)
            n = self._normed(given, before)
            y = attention(hidden_states=n[None], position_embeddings=position_embeddings, **others)[0][0]
        if self.is_last and batch.output_positions is not None:
            rows = batch.output_positions  # each once, so that the gradient needs no sorting of them
            x, y = x.index_select(1, rows), y.index_select(0, rows)
        with self._of_rows_that_go_on():
            if part is not None:
                last = self._group(attention, ("o_proj",), found)
                y = self._products(y, Identity(), last, self.wiring.after_attention is not None)
            y = self._normed(y, self.wiring.after_attention)
            x, y = self._mlp(x, dtype, y, in_place, found)
            y = self._normed(y, self.wiring.after_mlp)
            x = residual_sum(x, y, self.multiplier, in_place)
        return x if self.is_last or self.before_another else x.to(dtype)

    def _dtype(self) -> torch.dtype:
        """What the layer multiplies in; asked each time, since a model may be cast."""
        name = self.wiring.before_attention or self.wiring.after_attention
        return getattr(self, str(name)).weight.dtype

    def _whole(self, x: Tensor, found: dict[nn.Module, Projection | None]) -> DecoderLayer | None:
        """All of it, where that is best made in one step. What its linear layers add up to, as far as it was asked, is
        `found` for the single steps: DoRA's costs a product."""
        part, gated, wiring, context = self.attention_part, self.mlp_part, self.wiring, current()
        if part is None or gated is None or wiring.after_attention or wiring.after_mlp:
            return None
        positions = current_batch().output_positions
        if context.virtual or context.cache is not None or (positions is not None and not len(positions)):
            return None
        first, second = self._norm(wiring.before_attention), self._norm(wiring.before_mlp)
        if first is None or second is None or not at_once(x, first.weight):
            return None
        attention, mlp = bare(self.self_attn), bare(self.mlp)
        if not part.fits(attention) or not all(hasattr(mlp, name) for name in gated.inputs):
            return None
        inputs = _all_plain([getattr(attention, name) for name in part.inputs], found)
        if inputs is None:
            return None
        with self._of_rows_that_go_on():
            others = [attention.o_proj, *(getattr(mlp, name) for name in (*gated.inputs, "down_proj"))]
            late = _all_plain(others, found)
        if late is None:
            return None
        output, *gates, down = late
        how = part.how(attention, restores=False)
        return decoder_layer_of(inputs, output, gates, down, (first, second), how, gated.activation, self.multiplier)

    def _of_rows_that_go_on(self) -> AbstractContextManager[None]:
        """Behind the attention, where of the last layer some rows alone are wanted, the batch is that of these."""
        batch = current_batch()
        if not self.is_last or batch.output_positions is None:
            return nullcontext()
        return replace(current(), batch=batch.narrowed()).active()

    def _turns(self, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """cos and sin [T, R] of its rotary positions."""
        turns = self.attention_part is not None and self.attention_part.rotary and rotary is not None
        return (rotary[0][0], rotary[1][0]) if turns and rotary is not None else None

    def _branch(
        self, x: Tensor, dtype: torch.dtype, before: str | None, group: "_Group", y: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Identity | RmsNorm]:  # fmt: skip
        """The stream [1, T, d] with y, and what a group begins with [T, d], with how that is to be taken."""
        norm = self._norm(before)
        if norm is not None and group.projections is not None and dtype != x.dtype:
            return residual_norm(x, norm, dtype, y, self.multiplier, in_place)
        x, given = residual_branch(x, dtype, y, self.multiplier, in_place)
        if norm is None or group.projections is None:
            return x, self._normed(given, before), Identity()
        return x, given, norm

    def _heads(
        self, x: Tensor, prologue: Identity | RmsNorm, group: "_Group", rotary: tuple[Tensor, Tensor] | None,
        attention: nn.Module, part: AttentionPart,
    ) -> Tensor:  # fmt: skip
        """The attention's output before its last projection [T, H * D]."""
        buffer = self._products(x, prologue, group)
        turns = self._turns(rotary)
        context, how = current(), part.how(attention, restores=group.has_gains)
        prefixes = context.prefixes(attention.layer_idx) if context.virtual else ()  # type: ignore[arg-type]
        if context.cache is None:
            return self_attention(buffer, turns, current_batch().cu_seqlens, how, prefixes)
        q, k, v = rotated_parts(buffer, turns, how, prefixes)
        return context.cache.attend(attention, q, k, v, how.rule, how.sinks).flatten(1)

    def _mlp(
        self, x: Tensor, dtype: torch.dtype, y: Tensor, in_place: bool, made: dict[nn.Module, Projection | None]
    ) -> tuple[Tensor, Tensor]:
        """The stream with the attention's y, and the MLP's output."""
        part, before, mlp = self.mlp_part, self.wiring.before_mlp, bare(self.mlp)
        if part is None or not all(hasattr(mlp, name) for name in part.inputs):
            x, given = residual_branch(x, dtype, y, self.multiplier, in_place)
            found = mlp(self._normed(given, before)[None])
            return x, (found[0] if isinstance(found, tuple) else found)[0]
        group = self._group(mlp, part.inputs, made)
        x, given, prologue = self._branch(x, dtype, before, group, y, in_place)
        linear = mlp.get_submodule("down_proj")
        down, norm_follows = _projection_of(linear, made), self.wiring.after_mlp is not None
        # without a norm the output goes into a sum, and no gradient needs its value
        skip = current().recomputing and not norm_follows and down is not None and not down.gains
        whole = feedforward_of(given, group.projections or (), down, part.activation)
        if whole is not None:
            return x, feedforward(given, whole, _handing_back(given, prologue), norm_follows, skip)
        unit = Gated(part.activation, in_place=not group.has_gains)
        buffer = self._products(given, prologue, group)
        if down is None:
            return x, bare(linear)(normed(buffer, unit))
        return x, project(buffer, (down,), unit, norm_follows, skip)

    def _products(self, x: Tensor, prologue: Identity | RmsNorm, group: "_Group", keeps: bool = True) -> Tensor:
        """Linear layers side by side after a prologue; where one is more than a projection, they run as modules."""
        if group.projections is None:
            return torch.cat([module(x) for module in group.modules], -1)
        return project(x, group.projections, _handing_back(x, prologue), keeps, joined=group.joined)

    def _group(self, parent: nn.Module, names: Sequence[str], made: dict[nn.Module, Projection | None]) -> "_Group":
        """Linear layers by name, for the current batch; some are `made` already."""
        modules = [getattr(parent, name) for name in names]
        found = [_projection_of(module, made) for module in modules]
        projections = [projection for projection in found if projection is not None]
        others = len(modules) > 1 and any(projection.input_gains for projection in projections)  # see it without
        if len(projections) < len(modules) or others:
            return _Group(None, modules=[bare(module) for module in modules])
        joined = self._joined.get(tuple(names))
        if joined is None:
            return _Group(projections)
        if not joined.has([(projection.weight, projection.bias) for projection in projections]):
            del self._joined[tuple(names)]  # it would only take memory
            return _Group(projections)
        return _Group(projections, joined.whole)

    def _normed(self, x: Tensor, name: str | None) -> Tensor:
        if name is None:
            return x
        norm = self._norm(name)
        return getattr(self, name)(x[None])[0] if norm is None else normed(x, norm)

    def _norm(self, name: str | None) -> RmsNorm | None:
        """A norm that is still what was recognised; None where there is none, or where it runs as a module."""
        found = self.norms.get(name) if name else None
        if name is None or found is None:
            return None
        module = bare(getattr(self, name))
        return RmsNorm(module.weight, found.eps, found.unit_offset) if found.is_still(module) else None  # type: ignore[arg-type]


def _projection_of(module: nn.Module, made: dict[nn.Module, Projection | None]) -> Projection | None:
    return made[module] if module in made else projection_of(module)


def _all_plain(modules: Sequence[nn.Module], made: dict[nn.Module, Projection | None]) -> list[Projection] | None:
    """What each adds up to, which is `made` now; None where one is more than products and low-rank terms."""
    layers = []
    for module in modules:
        made[module] = layer = projection_of(module)
        if layer is None or not is_plain(layer):
            return None
        layers.append(layer)
    return layers


def _handing_back(x: Tensor, prologue: Identity | RmsNorm) -> Identity | RmsNorm:
    """Of what stands at a branch's beginning: in fp32 its gradient becomes the stream's."""
    return prologue if x.dtype == torch.float32 or prologue.hands_back else replace(prologue, hands_back=True)


def goes_backward(layer: nn.Module, hidden: Tensor) -> bool:
    """Whether a layer's pass will be gone through backward: for what it is given, takes from the pass, or learns."""
    if not torch.is_grad_enabled():
        return False
    learned = hidden.requires_grad or bool(current().learned())
    return learned or any(parameter.requires_grad for parameter in layer.parameters())


class _Group(NamedTuple):
    """Linear layers side by side for the current batch: as projections, and all of them as one where their weights are
    joined; as modules where one is more than a projection, or multiplies an input that others have too."""

    projections: list[Projection] | None
    joined: Projection | None = None
    modules: Sequence[nn.Module] = ()

    @property
    def has_gains(self) -> bool:
        """Whether it keeps its products for the gradient of a gain."""
        return any(projection.gains for projection in self.projections or ())


def join_weights(model: nn.Module) -> None:
    """Join again what was joined in a model's fast layers, after its parameters were given other values."""
    for layer in model.modules():
        if isinstance(layer, FastLayer):
            layer.join_weights()
