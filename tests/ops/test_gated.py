"""The gated unit: transformers' modules, fp64 autograd, views and places to write into, C beside the plain truth."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from topwork.ops import gated as module
from topwork.ops.gated import KINDS, gated, gated_backward
from topwork.ops.native import load

HF_NAMES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}
SIZES = [(5, 1), (5, 7), (1, 48), (5, 576), (0, 48), (5, 8195), (3, 0)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
ALL = pytest.mark.parametrize("kind", KINDS)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, count: int = 3) -> list[Tensor]:
    return [(torch.randn(shape) * 3).to(dtype) for _ in range(count)]


def alike(one: Tensor, other: Tensor) -> bool:
    """Equal, in fp32 up to what another loop rounds differently: torch has several, by where the values lie."""
    loose = {torch.float32: 1e-5}.get(one.dtype, 0.0)
    return torch.allclose(one, other, rtol=loose, atol=loose)


def exact(x: Tensor, kind: str) -> Tensor:
    """The activation in fp64, without the cancellation of 1 + tanh and 1 + erf left of zero."""
    x = x.double()
    if kind == "gelu":
        return x * torch.erfc(-x * 0.5**0.5) / 2
    return x * torch.sigmoid(x if kind == "silu" else 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@ALL
@DTYPES
def test_it_is_transformers_unit(layer_backend, kind: str, dtype: torch.dtype) -> None:
    """The rule: fp32 within 1e-6 of the factors; 16 bits equal in all but one of 200 values, left of -1 (where torch
    takes one from nearly one) within 1e-6 of the factors besides their last place."""
    theirs = LlamaMLP(
        LlamaConfig(hidden_size=2, intermediate_size=1, num_attention_heads=1, hidden_act=HF_NAMES[kind])
    ).act_fn
    for tokens, f in SIZES:
        gate, up, _ = drawn(tokens, f, dtype=dtype)
        h, expected = gated(gate, up, kind), theirs(gate) * up
        assert h.shape == expected.shape
        assert h.dtype == dtype
        assert h.is_contiguous()
        last_place = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * expected.abs().float()
        assert ((h.float() - expected.float()).abs() <= 1e-6 * (gate * up).abs().float() + last_place).all()
        if dtype != torch.float32 and h.numel():
            differ = (h != expected) & (gate > -1)
            assert differ.float().mean() <= 0.005 or differ.sum() <= 1


@ALL
def test_the_activation_is_exact(layer_backend, kind: str) -> None:
    gate = torch.linspace(-5, 30, 20001)[None]
    found = gated(gate, torch.ones_like(gate), kind).double()
    true = exact(gate, kind)
    assert ((found - true).abs() <= 1e-6 * gate.abs()).all()
    if load.compiled("layer") is not None:  # the truth forms 1 + tanh and 1 + erf
        bound = {"silu": 3e-7, "gelu_tanh": 4e-6, "gelu": 4e-6}[kind]  # u and x^2 are rounded before the exponential
        assert ((found - true).abs() <= bound * true.abs()).all()


@ALL
@DTYPES
def test_gradients_are_autograds(layer_backend, kind: str, dtype: torch.dtype) -> None:
    for tokens, f in SIZES:
        dh, gate, up = drawn(tokens, f, dtype=dtype)
        x, u = gate.double().requires_grad_(), up.double().requires_grad_()
        (exact(x, kind) * u).backward(dh.double())
        ours = gated_backward(dh, gate, up, kind)
        eps = 2e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
        for found, true, size in zip(ours, (x.grad, u.grad), ((dh * up).abs().double(), (dh * gate).abs().double())):
            assert found.shape == gate.shape
            assert found.dtype == dtype
            tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype == torch.float16 else 0
            assert ((found - true).abs() <= eps * true.abs() + 4e-6 * size + tiny).all(), (tokens, f)


@ALL
def test_the_formulas_are_the_derivatives(kind: str) -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    h = module.gated_reference(gate, up, kind)
    dh = torch.randn_like(h)
    h.backward(dh)
    dgate, dup = gated_backward(dh, gate.detach(), up.detach(), kind)
    assert torch.allclose(dgate, gate.grad)
    assert torch.allclose(dup, up.grad)


@ALL
@DTYPES
def test_views_and_places_to_write_into(layer_backend, kind: str, dtype: torch.dtype) -> None:
    both, out = drawn(6, 2 * 40, dtype=dtype, count=2)
    wide = drawn(6, 50, dtype=dtype)[0]
    dh, gate, up = wide[:, 3:43], both[:, :40], both[:, 40:]
    expected = gated_backward(dh.contiguous(), gate.contiguous(), up.contiguous(), kind)
    assert alike(gated(gate, up, kind), gated(gate.contiguous(), up.contiguous(), kind))
    assert all(alike(*pair) for pair in zip(gated_backward(dh, gate, up, kind), expected))

    halves = out[:, :40], out[:, 40:]
    given = gated_backward(dh, gate, up, kind, into=halves)
    assert given[0] is halves[0]
    assert given[1] is halves[1]
    assert alike(out, torch.cat(expected, 1))

    turned = torch.empty(40, 6, dtype=dtype).T, torch.empty(6, 80, dtype=dtype)[:, ::2]
    gated_backward(dh.T.contiguous().T, gate, up, kind, into=turned)
    assert all(alike(*pair) for pair in zip(turned, expected)), "values that do not lie side by side"

    once = gated(gate, up, kind)
    for again in (torch.empty(6, 40, dtype=dtype), torch.empty(40, 6, dtype=dtype).T):
        found = gated_backward(dh, gate, up, kind, h=again)
        assert alike(again, once)
        assert all(alike(*pair) for pair in zip(found, expected))

    again = torch.empty(6, 40, dtype=dtype)
    gated_backward(dh, gate, up, kind, (gate, up), again)
    assert alike(both, torch.cat(expected, 1)), "over gate and up themselves"
    assert alike(again, once), "the unit's output before they are overwritten"


def test_a_new_pair_is_one_buffer(layer_backend) -> None:
    dgate, dup = gated_backward(*drawn(5, 8), "silu")
    assert dgate.stride() == dup.stride() == (16, 1)
    assert dup.data_ptr() == dgate.data_ptr() + 8 * 4


@ALL
@DTYPES
def test_nan_infinity_and_large_values_go_as_in_torch(layer_backend, kind: str, dtype: torch.dtype) -> None:
    special = [float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 200.0, -200.0, 0.0, -0.0, 88.8, -88.8, -14.5, 11.0]
    gate = torch.tensor(special, dtype=dtype).repeat(2)[None]
    if dtype != torch.float16:
        gate = torch.cat([gate, torch.tensor([[1e13, -1e13, 1e-30, -1e-30]], dtype=dtype)], 1)
    if kind == "gelu":  # to which torch's own answers NaN
        gate = gate[~gate.isposinf()][None]
    up, dh = torch.ones_like(gate), torch.ones_like(gate)
    pairs = [(gated(gate, up, kind), exact(gate, kind).to(dtype))]
    pairs += zip(gated_backward(dh, gate, up, kind), module.gated_backward_reference(dh, gate, up, kind))
    for ours, truth in pairs:
        assert torch.equal(ours.isnan(), truth.isnan())
        assert torch.allclose(ours.float(), truth.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


@ALL
def test_the_number_of_threads_changes_nothing(kind: str) -> None:
    dh, gate, up = drawn(100, 600, dtype=torch.bfloat16)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([gated(gate, up, kind), *gated_backward(dh, gate, up, kind)])
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for parts in found[1:] for one, other in zip(parts, found[0], strict=True))


def test_the_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if load.compiled("layer") is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(module, "gated_reference", None)
    monkeypatch.setattr(module, "gated_backward_reference", None)
    for dtype in (torch.float32, torch.bfloat16):
        dh, gate, up = drawn(3, 48, dtype=dtype)
        gated(gate, up, "silu")
        gated_backward(dh, gate, up, "gelu", into=(gate, up))
    with pytest.raises(TypeError):
        gated(gate.half(), up.half(), "silu")


def test_what_does_not_fit_is_refused() -> None:
    dh, gate, up = drawn(5, 8)
    with pytest.raises(ValueError, match="unknown kind 'relu' of a gated unit, expected silu, gelu_tanh, gelu"):
        gated(gate, up, "relu")
    for wrong in (gate[0], gate.long(), gate[None]):
        with pytest.raises(ValueError, match=r"gate is .*expected floats"):
            gated(wrong, wrong, "silu")
    for wrong in (up[:4], up[:, :7], up.bfloat16(), up.to("meta")):
        with pytest.raises(ValueError, match=r"up is .*expected one like gate"):
            gated(gate, wrong, "silu")
        with pytest.raises(ValueError, match="dh is"):
            gated_backward(wrong, gate, up, "silu")
        with pytest.raises(ValueError, match=r"into\[1\] is"):
            gated_backward(dh, gate, up, "silu", into=(dh, wrong))
    with pytest.raises(RuntimeError):  # rows that share memory
        gated_backward(dh, gate, up, "silu", into=(dh, torch.empty(1, 8).expand(5, 8)))


def test_a_slope_is_that_of_torchs_activation() -> None:
    gate, one = torch.linspace(-6, 6, 97, dtype=torch.float64, requires_grad=True), torch.ones(1, 97).double()
    torches = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    for kind in KINDS:
        (expected,) = torch.autograd.grad(torches[kind](gate).sum(), gate)
        assert torch.allclose(gated_backward(one, gate.detach()[None], one, kind)[0][0], expected)
