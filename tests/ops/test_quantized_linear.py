"""A quantized layer against its dense twin: F.linear with the weight as it comes out of the packed one."""

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops import quantized_linear as module
from topwork.ops.packed import Packed, Packed4bit, pack_4bit, pack_int8
from topwork.ops.quantized_linear import PANEL_BYTES, input_gradient, output, quantized_linear
from topwork.quantization.linear import QuantizedEmbedding, QuantizedLinear

QUANTIZERS: dict[str, Callable[[Tensor], Packed]] = {
    "nf4": lambda weight: pack_4bit(weight, "nf4", 64, True),
    "fp4": lambda weight: pack_4bit(weight, "fp4", 128, False),
    "int8": pack_int8,
}
KINDS = pytest.mark.parametrize("kind", list(QUANTIZERS))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = [(200, 320), (130, 97)]


def both(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, leading: tuple[int, ...], bias: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and input gradient of the quantized layer, and of its dense twin."""
    packed = QUANTIZERS[kind]((torch.randn(shape) * 0.1).to(dtype))
    x = torch.randn(*leading, shape[1]).to(dtype)
    b = torch.randn(shape[0]).to(dtype) if bias else None
    dy = torch.randn(*leading, shape[0]).to(dtype)
    found = []
    for layer in (lambda x: quantized_linear(x, packed, b), lambda x: F.linear(x, packed.dense(), b)):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(dy)
        assert given.grad is not None
        found.append([y.detach(), given.grad])
    return found[0], found[1]


@KINDS
@DTYPES
@pytest.mark.parametrize("leading", [(50,), (3, 17), (1,), (0,), ()], ids=["rows", "3-D", "one row", "none", "vector"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_one_panel_is_the_dense_twin_bit_for_bit(kind: str, dtype: torch.dtype, leading, bias: bool) -> None:
    for shape in SHAPES:
        quantized, dense = both(kind, shape, dtype, leading, bias)
        assert torch.equal(quantized[0], dense[0])
        assert torch.equal(quantized[1], dense[1])


@KINDS
@DTYPES
@pytest.mark.parametrize("leading", [(50,), (3, 17), (0,)], ids=["rows", "3-D", "none"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_panels_round_as_the_dense_twin_does(monkeypatch, kind: str, dtype: torch.dtype, leading, bias: bool) -> None:
    monkeypatch.setitem(PANEL_BYTES, "cpu", 1)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.016, "atol": 0.016}
    for shape in SHAPES:
        quantized, dense = both(kind, shape, dtype, leading, bias)
        for found, expected in zip(quantized, dense, strict=True):
            torch.testing.assert_close(found, expected, **tolerance)


class Watched:
    """A packed weight that counts its panels and sees which still live. Not a `Packed`: it stands before one."""

    def __init__(self, packed: Packed) -> None:
        self.packed, self.shape, self.dtype = packed, packed.shape, packed.dtype
        self.panels: list[weakref.ref[Tensor]] = []
        self.most_bytes = 0
        self.most_alive = 0

    def panel(self, rows: slice, columns: slice) -> Tensor:
        made = self.packed.panel(rows, columns)
        self.panels.append(weakref.ref(made))
        self.most_bytes = max(self.most_bytes, made.nbytes)
        self.most_alive = max(self.most_alive, sum(panel() is not None for panel in self.panels))
        return made

    def dense(self) -> Tensor:
        return self.panel(slice(0, self.shape[0]), slice(0, self.shape[1]))


@KINDS
@pytest.mark.parametrize("budget", [1 << 30, 160 * 1024], ids=["one panel", "panels"])
def test_no_panel_outlives_its_product(monkeypatch, kind: str, budget: int) -> None:
    monkeypatch.setitem(PANEL_BYTES, "cpu", budget)
    watched = Watched(QUANTIZERS[kind](torch.randn(600, 448)))
    kept: list[Tensor] = []
    x = torch.randn(5, 448, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = quantized_linear(x, watched, torch.randn(600))  # type: ignore[arg-type]
    assert kept == []
    assert all(panel() is None for panel in watched.panels)
    forward_panels = len(watched.panels)
    y.backward(torch.ones_like(y))
    assert len(watched.panels) > forward_panels
    assert all(panel() is None for panel in watched.panels)
    assert watched.most_bytes <= budget
    assert watched.most_alive == 1
    several = budget < 600 * 448 * 4
    assert forward_panels == (-(-600 // 64) if several else 1)
    assert len(watched.panels) - forward_panels == (448 // 64 if several else 1)


def test_the_budget_counts_the_larger_of_both_types(monkeypatch) -> None:
    monkeypatch.setitem(PANEL_BYTES, "cpu", 64 * 512 * 4)
    for weight_type, input_type in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        watched = Watched(pack_4bit(torch.randn(512, 512).to(weight_type), "nf4", 64, False))
        output(torch.randn(2, 512).to(input_type), watched)  # type: ignore[arg-type]
        assert watched.most_bytes * (4 // watched.dtype.itemsize) == PANEL_BYTES["cpu"]


@KINDS
def test_gradients_are_the_slopes_of_the_output(monkeypatch, kind: str) -> None:
    """The layer is linear, so differences of any length are exact but for rounding."""
    monkeypatch.setitem(PANEL_BYTES, "cpu", 1)
    packed = QUANTIZERS[kind](torch.randn(150, 70))
    x, direction, dy = torch.randn(4, 70), torch.randn(4, 70), torch.randn(4, 150)
    slope = ((output(x + direction, packed) - output(x - direction, packed)) / 2 * dy).double().sum()
    along = (input_gradient(dy, packed) * direction).double().sum()
    torch.testing.assert_close(along, slope, rtol=1e-4, atol=1e-3)


@KINDS
def test_gradcheck_in_double_precision(monkeypatch, kind: str) -> None:
    monkeypatch.setitem(PANEL_BYTES, "cpu", 1)
    packed = QUANTIZERS[kind](torch.randn(70, 66))
    x = torch.randn(2, 66, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: quantized_linear(x, packed, bias), (x, bias))


def test_a_frozen_input_costs_no_backward_panel() -> None:
    watched = Watched(pack_int8(torch.randn(64, 64)))
    bias = torch.zeros(64, requires_grad=True)
    y = quantized_linear(torch.randn(3, 64), watched, bias)  # type: ignore[arg-type]
    made = len(watched.panels)
    y.sum().backward()
    assert len(watched.panels) == made
    assert bias.grad is not None
    assert bias.grad.eq(3).all()


def test_a_weight_in_another_type_than_the_input_is_taken_to_the_inputs() -> None:
    packed = pack_4bit(torch.randn(64, 64).half(), "nf4", 64, True)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(quantized_linear(x, packed), F.linear(x, packed.dense().bfloat16()))


def test_the_layer_is_its_dense_twin_and_its_packed_weight_follows_it() -> None:
    layer = QuantizedLinear(96, 64, torch.nn.Parameter(torch.randn(64)))
    with pytest.raises(RuntimeError, match="before its weight was read"):
        layer(torch.randn(2, 96))
    with pytest.raises(ValueError, match=r"\(96, 64\)"):
        layer.hold(pack_int8(torch.randn(96, 64)))
    layer.hold(pack_4bit(torch.randn(64, 96), "nf4", 64, True))
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), layer.dense(torch.float32)(x))
    cast = layer.to(torch.bfloat16)
    assert isinstance(cast.packed, Packed4bit)
    assert (cast.packed.codes.dtype, cast.packed.nested_absmax.dtype) == (torch.uint8, torch.float32)
    assert cast.packed.codes.data_ptr() == cast.weight.data_ptr()
    assert torch.equal(cast(x.bfloat16()), F.linear(x.bfloat16(), cast.packed.dense().bfloat16(), cast.bias))


def test_an_embedding_gives_rows_of_its_weight() -> None:
    packed = pack_4bit(torch.randn(50, 64), "nf4", 64, True)
    tokens = torch.tensor([[4, 49, 0], [4, 4, 1]])
    assert torch.equal(QuantizedEmbedding((50, 64)).hold(packed)(tokens), packed.dense()[tokens])


def test_panels_are_at_least_64_rows() -> None:
    packed = pack_int8(torch.randn(4, 4))
    assert module._panel(packed, 1 << 30, torch.empty(0)) == 64


@pytest.mark.parametrize("outputs", [96, 97])
def test_a_row_that_is_not_finite_keeps_its_gradient_to_itself(outputs: int) -> None:
    """As of a head with an odd vocabulary (on AMX torch's own product lets it reach the row before)."""
    torch.manual_seed(0)
    weight, dy = pack_int8(torch.randn(outputs, 64)), torch.randn(200, outputs).bfloat16()
    dy[100:] = torch.nan
    found = input_gradient(dy, weight)
    assert found[:100].isfinite().all()
    assert found[100:].isnan().all()
