"""What an adapter has at one module of the base, and the layer that holds the module once with all adapters' parts.

A part is one adapter's learned tensors at one place, and what they do to the module's output there. A new method is a
class of parts (`methods/ia3.py`, `methods/lora/` …) with a record (`method.py`). While a batch runs, its segments say
which rows go through which adapter's part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from topwork.common.errors import AdapterError
from topwork.common.seeds import hashed
from topwork.ops.batch import Batch, Segment
from topwork.ops.bundles import LowRank
from topwork.ops.context import current_batch
from topwork.ops.dropout import Dropout, dropped
from topwork.ops.projection import Projection, projection_of
from topwork.ops.vectors import Gain, Shift


@dataclass(frozen=True)
class FusedTerms:
    """A part as `ops/project.py` takes it: low-rank terms, a gain on the outputs, what is added to them, and a gain on
    the inputs, for some rows of the batch."""

    terms: tuple[LowRank, ...] = ()
    gains: tuple[Gain, ...] = ()
    shifts: tuple[Shift, ...] = ()
    input_gains: tuple[Gain, ...] = ()


class AdapterModule(nn.Module):
    """One adapter's tensors at one module, in fp32: the masters that the optimizer steps.

    dropout     share of the input's values that its low-rank terms do not see while training
    merges      which of its module's tensors `merged` gives another value
    """

    dropout = 0.0
    frozen = False
    merges: tuple[str, ...] = ("weight", "bias")

    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:
        """Set the first weights; they depend on the module, the seed and its path alone."""

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
        """The plain-torch truth: y [n, out], what the base's module gives for x [n, ...], as this adapter has it. In
        training, `dropout` has gone over the x that it is given (not over the base's)."""
        raise NotImplementedError

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> FusedTerms | None:  # noqa: ARG002
        """The same for rows start:stop of a projection, but for dropout; None where it is no such thing, and runs by
        `forward`."""
        return None

    def hold(self) -> None:
        """Until `release` no weight changes (`models/held.py`), and what depends on these alone may be kept."""

    def release(self) -> None:
        """Weights may change from now on."""

    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:  # noqa: ARG002
        """From here on it is only run, beside this module of a base of `dtype`: it gives the same to the bit, may hold
        what it multiplies in that type, and can't be written or merged any more. Called once."""
        self.frozen = True
        self.requires_grad_(False)

    def held(self) -> Iterator[Tensor]:
        """Every tensor that it keeps in memory."""
        yield from self.parameters()
        yield from self.buffers()

    def tensors(self) -> dict[str, nn.Parameter]:
        """The learned tensors by what PEFT writes behind the module's path (`lora_A.weight`)."""
        return dict(self.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """What the adapter's file holds of it. That `load_state` reads again."""
        return {key: parameter.detach() for key, parameter in self.tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Set the tensors from what `state` gave; shapes have been checked."""
        for key, parameter in self.tensors().items():
            parameter.copy_(state[key])

    @property
    def setting(self) -> Any:
        """What it does by, besides its tensors: a scale, which tokens. Its config has to say the same (`Planned`)."""
        return None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        """The module's weight [out, in] (an embedding's [V, d]) and bias in fp32 with this part in them.

        Raises AdapterError where the method cannot be merged.
        """
        raise AdapterError(f"{type(self).__name__} cannot be merged into a weight")

    def merged_parameter(self, name: str, value: Tensor) -> Tensor:  # noqa: ARG002
        """A parameter of a module that is no linear layer and no embedding, of those that `merges` names, in fp32 with
        this part in it, laid out as it is held; it is written into `value`."""
        raise AdapterError(f"{type(self).__name__} cannot be merged into {name}")

    def merged_piece(self, name: str, value: Tensor, expert: int, part: int) -> Tensor:  # noqa: ARG002
        """The same of the matrix of one expert [out, in], or of the `part` of its rows that value holds: so many above
        it as it has itself for each part before."""
        raise AdapterError(f"{type(self).__name__} cannot be merged into {name}")


class AdaptedLayer(nn.Module):
    """A module of the base, held once, and by name the part that each adapter has there."""

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.input_key = input_key(path)
        self.adapters = nn.ModuleDict()

    @property
    def weight(self) -> Tensor:
        """The base layer's, for models that look at it (its type, its device)."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias  # type: ignore[return-value]

    def part(self, name: str | None) -> AdapterModule | None:
        """What the named adapter has here."""
        adapters = self.adapters
        return adapters[name] if name is not None and name in adapters else None  # type: ignore[return-value]

    def idle_base(self) -> nn.Module | None:
        """The base layer, where no row of the current batch goes through a part of this layer."""
        return None if self._touched(current_batch().segments) else self.base_layer

    def projection(self) -> Projection | None:
        """Base and parts as one projection of the current batch; None where one of them is more than that."""
        base_layer, batch = self.base_layer, current_batch()
        base = projection_of(base_layer)
        if base is None:
            return None
        terms: list[LowRank] = []
        gains: list[Gain] = []
        shifts: list[Shift] = []
        input_gains: list[Gain] = []
        for segment in batch.segments:
            if (part := self.part(segment.adapter)) is None:
                continue
            fused = part.fused_terms(segment.start, segment.stop, base_layer)
            if fused is None:
                return None
            dropout = self._dropout(part, batch, segment)
            terms += fused.terms if dropout is None else (replace(t, dropout=dropout) for t in fused.terms)
            gains += fused.gains
            shifts += fused.shifts
            input_gains += fused.input_gains
        return Projection(base.weight, base.bias, tuple(terms), tuple(gains), tuple(shifts), tuple(input_gains))

    def _dropout(self, part: AdapterModule, batch: Batch, segment: Segment) -> Dropout | None:
        if not (part.training and part.dropout):
            return None
        return batch.dropout(part.dropout, self.input_key, slice(segment.start, segment.stop))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if isinstance(y, tuple):
            return self._routed(y, x.flatten(0, -2))  # type: ignore[return-value]
        if x.dim() == 4:
            return self._by_head(y, x)
        lead = x.shape if x.dtype in (torch.int64, torch.int32) else x.shape[:-1]
        batch = current_batch().of_rows(lead.numel())
        if not self._touched(batch.segments):
            return y
        return self._by_segment(batch, y.flatten(0, len(lead) - 1), x.flatten(0, len(lead) - 1)).view_as(y)

    def _by_head(self, y: Tensor, x: Tensor) -> Tensor:
        """A module that is given heads: x [1, T, H, D], or [1, H, T, D] where a family turns it first
        (`models/head_norms.py`). Each head of a token is a row, and draws what the token does."""
        batch = current_batch()
        if not self._touched(batch.segments):
            return y
        heads_first: bool | None = getattr(self.base_layer, "heads_first", None)
        if heads_first is None:
            raise AdapterError(
                f"an adapted {type(self.base_layer).__name__} is given heads, {list(x.shape)}, and is no module of "
                "an attention whose layout was found when the base was made; leave it out with exclude_modules"
            )
        if heads_first:
            x, y = x.transpose(1, 2), y.transpose(1, 2)
        heads, seeds = x.shape[2], batch.dropout_seeds
        by_row = replace(
            batch,
            segments=tuple(Segment(heads * s.start, heads * s.stop, s.adapter) for s in batch.segments),
            dropout_seeds=None if seeds is None else seeds.repeat_interleave(heads),
        )
        found = self._by_segment(by_row, y.flatten(0, 2), x.flatten(0, 2)).view(y.shape)
        return found.transpose(1, 2) if heads_first else found

    def _routed(self, y: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """A router, which gives several tensors of each row; its parts do as well."""
        segments = current_batch().of_rows(len(x)).segments
        if not self._touched(segments):
            return y
        self.check_rows(segments, len(x))
        found: list[tuple[Tensor, ...]] = []
        for segment in segments:
            rows, part = slice(segment.start, segment.stop), self.part(segment.adapter)
            own = tuple(tensor[rows] for tensor in y)
            found.append(own if part is None else part.forward(own[0], x[rows], self.base_layer))  # type: ignore[arg-type]
        return tuple(torch.cat(parts) for parts in zip(*found)) if len(found) > 1 else found[0]

    def _touched(self, segments: Sequence[Segment]) -> bool:
        adapters = self.adapters
        return any(segment.adapter in adapters for segment in segments if segment.adapter is not None)

    @staticmethod
    def check_rows(segments: Sequence[Segment], count: int) -> None:
        """AdapterError where a layer is not given all of the batch's tokens."""
        if segments[-1].stop != count:
            raise AdapterError(
                f"an adapted layer was given {count} of the batch's {segments[-1].stop} tokens: this model "
                "routes tokens past it (experts), and no adapter can go there; leave such layers out with "
                "exclude_modules"
            )

    def _by_segment(self, batch: Batch, y: Tensor, x: Tensor) -> Tensor:
        """y [T, ...] with each segment's rows passed through its adapter's part."""
        segments = batch.segments
        self.check_rows(segments, y.shape[0])
        rows = [y[segment.start : segment.stop] for segment in segments] if len(segments) > 1 else [y]
        for at, segment in enumerate(segments):
            if (part := self.part(segment.adapter)) is not None:
                given, dropout = x[segment.start : segment.stop], self._dropout(part, batch, segment)
                rows[at] = part.forward(
                    rows[at], given if dropout is None else dropped(given, dropout), self.base_layer
                )
        return torch.cat(rows) if len(rows) > 1 else rows[0]


def hold_in(parameter: nn.Parameter, base_layer: nn.Module, dtype: torch.dtype) -> None:
    """For `AdapterModule.freeze`: a parameter in the type that `base_layer`, of a base of `dtype`, multiplies in."""
    weight = getattr(base_layer, "weight", None)
    own = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else dtype
    parameter.data = parameter.data.to(own)


INPUT_OF = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Modules that are given what another is."""


def input_key(path: str) -> int:
    """What dropout in the module at `path` depends on: its input, so that modules with one input drop the same of it,
    which is then dropped once for all of them."""
    parent, _, name = path.rpartition(".")
    return hashed(parent, INPUT_OF.get(name, name))


def path_seed(seed: int, path: str) -> int:
    """A seed for one layer."""
    return hashed(seed, path, bits=63)
