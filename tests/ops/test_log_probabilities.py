"""The log-probability op against log_softmax over the whole logit matrix, in float64."""

from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor

from reference.families import learning_batch, sequences, tiny_base
from reference.logprobs import log_probabilities_whole
from reference.measure import relative
from topwork.models.base import Base
from topwork.models.quantized import quantize_head
from topwork.ops import logprobs
from topwork.ops.batch import Batch
from topwork.ops.logprobs import Head, LogitRule, chunk_rows, dense_head, log_probabilities, times_or_nan

ROWS, WIDTH, VOCABULARY = 37, 12, 50
RULES = {
    "plain": LogitRule(),
    "scale": LogitRule(scale=0.3),
    "softcap": LogitRule(softcap=2.0),
    "scale and softcap": LogitRule(scale=0.3, softcap=2.0),
}


@dataclass(frozen=True)
class HiddenKnown(Base):
    """A base whose layers are left out."""

    states: Tensor

    def hidden(self, batch: Batch) -> Tensor:
        return self.states


@pytest.fixture(params=[1 << 25, 1], ids=["one chunk", "several chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", request.param)


def inputs(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """hidden, weight, targets, bias, and the weights of the sum that is the loss (some of them zero)."""
    hidden, weight = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(VOCABULARY, WIDTH).to(dtype)
    learned = -torch.rand(ROWS)
    learned[::5] = 0
    shift = torch.randn(VOCABULARY).to(dtype) if bias else None
    return hidden, weight, torch.randint(0, VOCABULARY, (ROWS,)), shift, learned


def test_a_large_vocabulary_makes_small_chunks() -> None:
    cpu = torch.device("cpu")
    assert chunk_rows(49152, cpu, 2) == 256
    assert 128256 * 2 * chunk_rows(128256, cpu, 2) <= 48 << 20
    assert chunk_rows(128256, cpu, 4) * 2 == chunk_rows(128256, cpu, 2)


def test_small_chunks_are_several() -> None:
    assert chunk_rows(1 << 20, torch.device("cpu")) == 16
    assert chunk_rows(VOCABULARY, torch.device("cpu")) > ROWS > 16


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not announced"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients(name: str, bias: bool, announced: bool) -> None:
    hidden, weight, targets, shift, learned = inputs(bias)
    hidden.requires_grad_()
    truth_hidden = hidden.detach().double().requires_grad_()
    found = log_probabilities(hidden, dense_head(weight, shift), targets, RULES[name], learned if announced else None)
    truth = log_probabilities_whole(truth_hidden, weight, targets, shift, **asdict(RULES[name]))
    assert found.dtype == torch.float32
    assert relative(found, truth) < 1e-6
    (found * learned * 3).sum().backward()  # a factor common to all is allowed
    (truth * learned * 3).sum().backward()
    assert relative(hidden.grad, truth_hidden.grad) < 2e-6
    assert weight.grad is None


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not announced"])
@pytest.mark.parametrize("name", RULES)
def test_a_head_that_is_trained_gets_its_gradient(name: str, announced: bool, trained: str) -> None:
    hidden, weight, targets, shift, learned = inputs(bias=True)
    hidden.requires_grad_()
    weight.requires_grad_(trained in ("weight", "both"))
    shift.requires_grad_(trained in ("bias", "both"))
    mine = [x for x in (hidden, weight, shift) if x.requires_grad]
    found = log_probabilities(hidden, dense_head(weight, shift), targets, RULES[name], learned if announced else None)
    truth = log_probabilities_whole(hidden, weight, targets, shift, **asdict(RULES[name]))
    ours = torch.autograd.grad((found * learned).sum(), mine)
    theirs = torch.autograd.grad((truth * learned).sum(), mine)
    for left, right in zip(ours, theirs, strict=True):
        assert relative(left, right) < 2e-6


@pytest.mark.usefixtures("_chunks")
def test_a_gradient_that_depends_on_the_result() -> None:
    """Not announced: any function of the log-probabilities goes, here one that squares them."""
    hidden, weight, targets, _, _ = inputs(bias=False)
    hidden.requires_grad_()
    truth_hidden = hidden.detach().double().requires_grad_()
    log_probabilities(hidden, dense_head(weight), targets).square().sum().backward()
    log_probabilities_whole(truth_hidden, weight, targets).square().sum().backward()
    assert relative(hidden.grad, truth_hidden.grad) < 2e-6


@pytest.mark.usefixtures("_chunks")
def test_through_any_head() -> None:
    hidden, _, targets, _, learned = inputs(bias=False)
    inner = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, VOCABULARY))
    hidden.requires_grad_()
    wanted = [hidden, *inner.parameters()]
    found = log_probabilities(hidden, Head(VOCABULARY, lambda rows, _: inner(rows)), targets)
    truth = torch.log_softmax(inner(hidden), -1)[torch.arange(ROWS), targets]
    assert relative(found, truth) < 1e-6
    ours, theirs = (torch.autograd.grad((x * learned).sum(), wanted) for x in (found, truth))
    for left, right in zip(ours, theirs, strict=True):
        assert relative(left, right) < 2e-6


class Counted:
    """A frozen head that counts its products."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.calls = weight, 0

    def __call__(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return rows @ self.weight.t()

    def input_gradient(self, slope: Tensor) -> Tensor:
        self.calls += 1
        return slope @ self.weight


@pytest.mark.parametrize("name", RULES)
def test_a_frozen_head_of_two_functions_makes_two_products(name: str) -> None:
    hidden, weight, targets, _, learned = inputs(bias=False)
    hidden.requires_grad_()
    truth_hidden = hidden.detach().double().requires_grad_()
    inner = Counted(weight)
    head = Head(VOCABULARY, lambda rows, _: inner(rows), inner.input_gradient)
    found = log_probabilities(hidden, head, targets, RULES[name], learned)
    truth = log_probabilities_whole(truth_hidden, weight, targets, **asdict(RULES[name]))
    assert relative(found, truth) < 1e-6
    (found * learned).sum().backward()
    (truth * learned).sum().backward()
    assert relative(hidden.grad, truth_hidden.grad) < 2e-6
    assert inner.calls == 2


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("name", RULES)
def test_without_gradients(name: str) -> None:
    hidden, weight, targets, shift, learned = inputs(bias=True)
    hidden.requires_grad_()
    with torch.no_grad():
        found = log_probabilities(hidden, dense_head(weight, shift), targets, RULES[name], learned)
    assert not found.requires_grad
    assert relative(found, log_probabilities_whole(hidden, weight, targets, shift, **asdict(RULES[name]))) < 1e-6


@pytest.mark.parametrize("kind", ["16bit", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_base_knows_its_frozen_head(family: str, kind: str) -> None:
    """Dense and packed, the gradient that is announced is the one that autograd finds."""
    base = tiny_base(family)
    if kind != "16bit":
        quantize_head(base.module, kind)
    batch = learning_batch(sequences())
    hidden = torch.randn(len(batch.tokens), base.head.in_features)
    weight = base.head.weight if kind == "16bit" else base.head.packed.dense()
    results = []
    for announced in (-batch.labels.loss_weights, None):
        own = hidden.clone().requires_grad_()
        known = HiddenKnown(**vars(base), states=own)
        found = known.log_probabilities(batch, announced)
        assert (type(found.grad_fn).__name__ == "_InForwardBackward") == (announced is not None)
        (-batch.labels.loss_weights * found).sum().backward()
        results.append((found.detach(), own.grad))
    rule = asdict(base.logit_rule)
    assert (
        relative(
            results[0][0],
            log_probabilities_whole(hidden[batch.labels.positions], weight, batch.labels.targets, **rule),
        )
        < 1e-6
    )
    for left, right in zip(*results, strict=True):
        assert relative(left, right) < 2e-6


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not announced"])
def test_no_rows(announced: bool) -> None:
    """A pass in which nothing is learned costs nothing and breaks nothing."""
    hidden, weight = torch.empty(0, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH)
    nothing = torch.empty(0)
    none = torch.empty(0, dtype=torch.int64)
    found = log_probabilities(hidden, dense_head(weight), none, gradient=nothing if announced else None)
    assert found.shape == (0,)
    assert found.dtype == torch.float32
    (found * nothing).sum().backward()
    assert hidden.grad.shape == (0, WIDTH)


def test_rows_that_all_weigh_nothing() -> None:
    hidden, weight, targets, _, _ = inputs(bias=False)
    hidden.requires_grad_()
    zero = torch.zeros(ROWS)
    (log_probabilities(hidden, dense_head(weight), targets, gradient=zero) * zero).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(ROWS, WIDTH))


def test_another_gradient_than_announced_raises() -> None:
    hidden, weight, targets, _, learned = inputs(bias=False)
    hidden.requires_grad_()
    found = log_probabilities(hidden, dense_head(weight), targets, gradient=learned)
    with pytest.raises(RuntimeError, match="not the plain sum that it announced"):
        (found * learned).square().sum().backward()
    found = log_probabilities(hidden, dense_head(weight), targets, gradient=torch.zeros(ROWS))
    with pytest.raises(RuntimeError, match="not the plain sum that it announced"):
        (found * learned).sum().backward()


def test_bfloat16_within_its_rounding() -> None:
    """The logits are rounded to bf16 by the head's product, the softmax is fp32."""
    hidden, weight, targets, _, learned = inputs(bias=False, dtype=torch.bfloat16)
    hidden.requires_grad_()
    truth_hidden = hidden.detach().double().requires_grad_()
    found = log_probabilities(hidden, dense_head(weight), targets, gradient=learned)
    truth = log_probabilities_whole(truth_hidden, weight, targets)
    assert relative(found, truth) < 6e-3
    (found * learned).sum().backward()
    (truth * learned).sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert relative(hidden.grad, truth_hidden.grad) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_common_factor_is_not_rounded(dtype: torch.dtype) -> None:
    """Single values are rounded to either side, their norm is not: 1 / 61.3 in bf16 would move it by 3e-3."""
    hidden, weight, targets, _, learned = inputs(bias=False, dtype=dtype)
    hidden.requires_grad_()
    total = (log_probabilities(hidden, dense_head(weight), targets, gradient=learned) * learned).sum()
    (whole,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (shared,) = torch.autograd.grad(total / 61.3, hidden)
    assert shared.dtype == dtype
    assert abs(float(61.3 * shared.double().norm() / whole.double().norm()) - 1) < 2e-4
    assert relative(shared, whole.double() / 61.3) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("vocabulary", [96, 97])
def test_a_row_that_is_not_finite_keeps_its_gradient_to_itself(vocabulary: int) -> None:
    """Of an adapter that diverges, beside others' rows (on AMX torch's own product lets it reach the row before)."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(200, 32).bfloat16(), torch.randint(vocabulary, (200,))
    hidden[100:] = torch.nan
    head = dense_head(torch.randn(vocabulary, 32).bfloat16())
    _, grads = logprobs._in_chunks(hidden, head, targets, LogitRule(), torch.ones(200))
    assert grads[:100].isfinite().all()
    assert grads[100:].isnan().all()


def test_lengths_that_differ_are_refused() -> None:
    hidden, weight, targets, _, _ = inputs(bias=False)
    with pytest.raises(ValueError, match="37 hidden states for 36 targets"):
        log_probabilities(hidden, dense_head(weight), targets[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_way_of_a_gpu_scales_in_fp32_and_poisons_a_gradient_that_was_not_announced(dtype: torch.dtype) -> None:
    grads, factor = torch.randn(5, 7).to(dtype), torch.tensor(1.0039)
    found = times_or_nan(grads, factor, torch.tensor(False))
    assert torch.equal(found, (grads.float() * factor).to(dtype))
    assert times_or_nan(grads, factor, torch.tensor(True)).isnan().all()
