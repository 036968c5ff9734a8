"""Experts with low-rank terms of several adapters: values and gradients against autograd through dense W + s B A."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.measure import relative
from topwork.ops.experts import Experts, ExpertTerm, Terms, run_experts

T, D, INNER, E, K = 23, 12, 10, 5, 2


def silu_gate(u: Tensor) -> Tensor:
    gate, up = u.chunk(2, -1)
    return F.silu(gate) * up


def clamped_gate(u: Tensor) -> Tensor:
    """As gpt-oss has it: interleaved."""
    gate, up = u[..., ::2].clamp(max=1.0), u[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


GATES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "silu": (silu_gate, 2 * INNER), "gpt_oss": (clamped_gate, 2 * INNER), "no gate": (F.gelu, INNER),
}  # fmt: skip


def frozen(gate: str, bias: bool) -> Experts:
    function, width = GATES[gate]
    first, last = torch.randn(E, width, D).transpose(1, 2), torch.randn(E, INNER, D)  # one each way round
    if not bias:
        return Experts(first / 3, last / 3, None, None, function)
    return Experts(first / 3, last / 3, torch.randn(E, width), torch.randn(E, D), function)


def term(inputs: int, outputs: int, r: int) -> ExpertTerm:
    a, b = torch.randn(r * E, inputs).requires_grad_(), torch.randn(outputs, r * E).requires_grad_()
    return ExpertTerm(a, b, E, 0.4)


def dense(one: ExpertTerm | None) -> Tensor | float:
    """s A' B' [E, in, out] of every expert, by PEFT's formula."""
    if one is None:
        return 0.0
    a, b = one.a.reshape(E, -1, one.a.shape[1]), one.b.reshape(len(one.b), -1, E)
    return one.scaling * torch.einsum("ore,eri->eio", b, a)


def by_autograd(
    x: Tensor, indices: Tensor, weights: Tensor, experts: Experts, adapters: list[Terms], numbers: Tensor
) -> Tensor:  # fmt: skip
    """Token by token."""
    changes = [(dense(one.first), dense(one.last)) for one in adapters] + [(0.0, 0.0)]
    whole = [(experts.first + first, experts.last + last) for first, last in changes]
    rows = []
    for t, number in enumerate(numbers.tolist()):
        found = torch.zeros(D)
        for e, share in zip(indices[t].tolist(), weights[t]):
            u = x[t] @ whole[number][0][e] + (0.0 if experts.first_bias is None else experts.first_bias[e])
            y = experts.gate(u) @ whole[number][1][e] + (0.0 if experts.last_bias is None else experts.last_bias[e])
            found = found + share * y
        rows.append(found)
    return torch.stack(rows)


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.randn(T, E)
    weights, indices = scores.softmax(-1).topk(K)
    return torch.randn(T, D).to(dtype).requires_grad_(), indices, weights.detach().requires_grad_()


WIDTHS = {name: width for name, (_, width) in GATES.items()}


def adapters_of(gate: str) -> list[Terms]:
    """Both sides at unlike ranks, the first alone, the last alone."""
    width = WIDTHS[gate]
    return [
        Terms(term(D, width, 3), term(INNER, D, 2)), Terms(term(D, width, 1), None), Terms(None, term(INNER, D, 4)),
    ]  # fmt: skip


@pytest.mark.parametrize("bias", [False, True], ids=["bare", "biases"])
@pytest.mark.parametrize("gate", GATES)
def test_values_and_gradients_are_autograds(gate: str, bias: bool) -> None:
    torch.manual_seed(0)
    experts, adapters = frozen(gate, bias), adapters_of(gate)
    x, indices, weights = given()
    numbers = torch.tensor([0] * 7 + [1] * 5 + [3] * 4 + [2] * 7)  # 3: the bare base
    learned = [p for one in adapters for t in one if t is not None for p in (t.a, t.b)]
    found = run_experts(x, indices, weights, experts, adapters, numbers)
    expected = by_autograd(x, indices, weights, experts, adapters, numbers)
    assert relative(found, expected) < 1e-6
    slope = torch.randn(T, D)
    ours = torch.autograd.grad((found * slope).sum(), [x, weights, *learned])
    theirs = torch.autograd.grad((expected * slope).sum(), [x, weights, *learned])
    for own, other in zip(ours, theirs):
        assert relative(own, other) < 2e-6


def test_in_16_bits_it_is_as_near_as_16_bits_are() -> None:
    torch.manual_seed(0)
    experts, adapters = frozen("silu", False), adapters_of("silu")
    x, indices, weights = given()
    numbers = torch.tensor([0] * 10 + [1] * 13)
    expected = by_autograd(x, indices, weights, experts, adapters, numbers)
    halved = Experts(experts.first.bfloat16(), experts.last.bfloat16(), None, None, experts.gate)
    found = run_experts(x.bfloat16(), indices, weights, halved, adapters, numbers)
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) < 2e-2
    slope = torch.randn(T, D)
    learned = [p for one in adapters[:2] for t in one if t is not None for p in (t.a, t.b)]
    ours = torch.autograd.grad((found.float() * slope).sum(), [x, weights, *learned])
    theirs = torch.autograd.grad((expected * slope).sum(), [x, weights, *learned])
    assert all(own.dtype == other.dtype for own, other in zip(ours, theirs))
    for own, other in zip(ours, theirs):
        assert relative(own, other) < 3e-2


def test_a_term_that_is_zero_changes_no_bit() -> None:
    torch.manual_seed(0)
    experts = frozen("silu", False)
    x, indices, weights = given()
    none = run_experts(x, indices, weights, experts, [], torch.zeros(T, dtype=torch.int64))
    idle = Terms(term(D, 2 * INNER, 3), term(INNER, D, 2))
    with torch.no_grad():
        for one in idle:
            assert one is not None
            one.b.zero_()
    assert torch.equal(run_experts(x, indices, weights, experts, [idle], torch.zeros(T, dtype=torch.int64)), none)


def test_gradients_that_nobody_asks_for_are_left_out() -> None:
    torch.manual_seed(0)
    experts, adapters = frozen("silu", False), adapters_of("silu")[:1]
    x, indices, weights = given()
    out = run_experts(x.detach(), indices, weights.detach(), experts, adapters, torch.zeros(T, dtype=torch.int64))
    out.sum().backward()
    assert adapters[0].first is not None
    assert adapters[0].first.a.grad is not None
    assert x.grad is None
