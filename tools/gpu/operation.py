"""What an operation of a layer is to the check: its inputs, its two forms, and what it costs at least."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""How far from its truth a result may be, relative, in norms (`tests/ops/triton_layer_cases.py`)."""
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """Of a Llama 3 of 8B, and of a pass."""

    tokens: int
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    head: int = 128
    vocabulary: int = 128256
    sequence: int = 4096


@dataclass(frozen=True)
class Operation:
    """One operation.

    make       fresh inputs
    ours       what the step calls; it may write to its inputs, and returns all that it wrote
    truth      the same in plain torch, by the same rules
    moved      bytes that it reads and writes at least
    flops      floating-point operations, where they are what it costs
    tolerance  of its results, relative
    """

    name: str
    make: Callable[[], Tensors]
    ours: Callable[..., Sequence[Tensor]]
    truth: Callable[..., Sequence[Tensor]]
    moved: float
    tolerance: float
    flops: float = 0.0


@dataclass(frozen=True)
class Maker:
    """Random tensors of one type."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def wide(self, *shape: int) -> Tensor:
        """The same in fp32."""
        return torch.randn(shape, device=self.device)

    @property
    def bytes(self) -> int:
        """Of a value."""
        return self.dtype.itemsize

    @property
    def tolerance(self) -> float:
        """Of results that are rounded once."""
        return TOLERANCE[self.dtype]
