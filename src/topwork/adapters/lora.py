"""LoRA: h = W x + s * B (A dropout(x)), A [r, in], B [out, r] (Hu et al., arXiv 2106.09685).

s = alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, arXiv 2312.03732). B begins at zero, so a fresh adapter
changes nothing. A layer holds its base once and any number of named adapters; the active stream's segments say which
tokens go through which.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from topwork.common.errors import AdapterError
from topwork.ops.project import LowRank, Projection, projection_of
from topwork.ops.stream import Segment, active_stream


class LoraWeights(nn.Module):
    """One adapter's A and B for one layer, in fp32: the masters that the optimizer steps."""

    def __init__(self, in_features: int, out_features: int, r: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.scaling = scaling
        self.dropout = dropout

    def reset(self, seed: int, path: str, gaussian: bool) -> None:
        """Draw A, zero B. The draw depends on the seed and the layer's path alone, not on the other targets."""
        generator = torch.Generator().manual_seed(path_seed(seed, path))
        with torch.no_grad():
            a = torch.empty(self.lora_A.shape)
            if gaussian:
                a.normal_(std=1 / a.shape[0], generator=generator)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            self.lora_A.copy_(a)
            self.lora_B.zero_()

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s B A dropout(x) for x [n, in] and y [n, out]; A and B are multiplied in x's type."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return torch.addmm(y, F.linear(x, a), b.t(), alpha=self.scaling)

    def term(self, start: int, stop: int) -> LowRank:
        """The same for rows start:stop of a stream, as `ops/project.py` takes it."""
        return LowRank(start, stop, self.lora_A, self.lora_B, self.scaling, self.dropout if self.training else 0.0)

    def delta(self) -> Tensor:
        """s B A [out, in] in fp32: what merging adds to the base weight."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())


class AdaptedLayer(nn.Module):
    """A base layer, held once, and by name what each of its adapters adds or puts in its place."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()

    @property
    def weight(self) -> Tensor:
        """The base layer's, for models that look at it (its type, its device)."""
        return self.base_layer.weight  # type: ignore[return-value]

    def idle_base(self) -> nn.Module | None:
        """The base layer, where no token of the active stream goes through an adapter of this layer."""
        idle = not any(_has(self.adapters, segment) for segment in active_stream().segments)
        return self.base_layer if idle else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        segments = active_stream().segments_of(y.shape[:-1].numel())
        return self.adapted(segments, y, x) if any(_has(self.adapters, segment) for segment in segments) else y

    def adapted(self, segments: Sequence[Segment], y: Tensor, x: Tensor) -> Tensor:
        """y, the base layer's output for x, with each segment's rows as its adapter has them."""
        raise NotImplementedError


class LoraLinear(AdaptedLayer):
    """A linear layer with any number of LoRA adapters around it."""

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias  # type: ignore[return-value]

    def projection(self) -> Projection | None:
        """Base and adapters as one projection of the active stream; None where the base layer is none."""
        base = projection_of(self.base_layer)
        return base and replace(
            base,
            terms=tuple(
                self.adapters[str(segment.adapter)].term(segment.start, segment.stop)  # type: ignore[operator]
                for segment in active_stream().segments
                if _has(self.adapters, segment)
            ),
        )

    def adapted(self, segments: Sequence[Segment], y: Tensor, x: Tensor) -> Tensor:
        flat = by_segment(
            segments, y.flatten(0, -2), x.flatten(0, -2), self.adapters, lambda w, ys, xs: w.add_to(ys, xs)
        )
        return flat.view_as(y)


class SavedModule(AdaptedLayer):
    """A module of `modules_to_save`: each adapter has a whole copy of its own, in fp32, run in the base's type."""

    def adapted(self, segments: Sequence[Segment], y: Tensor, x: Tensor) -> Tensor:
        lead = x.shape if x.dtype in (torch.int64, torch.int32) else x.shape[:-1]
        flat_x = x.reshape(math.prod(lead), *x.shape[len(lead) :])
        flat_y = y.reshape(math.prod(lead), *y.shape[len(lead) :])
        return by_segment(
            segments, flat_y, flat_x, self.adapters, lambda copy, ys, xs: _run_in(copy, xs, ys.dtype)
        ).view_as(y)


def _run_in(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    weights = {name: parameter.to(dtype) for name, parameter in module.named_parameters()}
    return functional_call(module, weights, (x,))


def by_segment(
    segments: Sequence[Segment],
    y: Tensor,
    x: Tensor,
    adapters: nn.ModuleDict,
    apply: Callable[..., Tensor],
) -> Tensor:
    """y [T, ...] with each segment's rows passed through its adapter: `apply(adapter, y rows, x rows)`."""
    if segments[-1].stop != y.shape[0]:
        raise AdapterError(
            f"an adapted layer was given {y.shape[0]} of the stream's {segments[-1].stop} tokens: this model routes "
            "tokens past it (experts), and no adapter can go there; leave such layers out with exclude_modules"
        )
    if len(segments) == 1:
        return apply(adapters[str(segments[0].adapter)], y, x)
    parts = []
    for segment in segments:
        rows = y[segment.start : segment.stop]
        if _has(adapters, segment):
            rows = apply(adapters[str(segment.adapter)], rows, x[segment.start : segment.stop])
        parts.append(rows)
    return torch.cat(parts)


def _has(adapters: nn.ModuleDict, segment: Segment) -> bool:
    return segment.adapter is not None and segment.adapter in adapters


def path_seed(seed: int, path: str) -> int:
    """A seed for one layer."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:8], "big") >> 1
