"""Log-probabilities of target tokens from hidden states and the output head, never materialising [N, vocabulary].

    z = cap * tanh(scale * (h W' + b) / cap)        log p(target) = z[target] - logsumexp(z)

Work goes in chunks of rows. Where the caller knows the gradient of its loss with respect to the log-probabilities
beforehand (`gradient`, for any plain weighted sum), the hidden states' gradient is taken in the forward pass while a
chunk's logits are at hand: two products with the head and not three, and nothing kept but that gradient. One native
pass turns a chunk of logits into its log-probabilities and, in the same memory, into the gradient by the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topwork.ops.context import scratch_empty, scratch_scope
from topwork.ops.gain import multiply_
from topwork.ops.grouped import multiplied, multiplies_all
from topwork.ops.native import load as native
from topwork.ops.triton import load as triton

CHUNK_ROWS = {"cpu": 256, "cuda": 1 << 14}
CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}
"""What of the head's products is held at once, by device type: so many rows where they are no more bytes than that.
Fewer rows make slower products; a larger chunk has left the cache when it is read again (benchmarks/loss.py)."""


@dataclass(frozen=True)
class LogitRule:
    """What a family does to the head's products before the softmax."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """fp32 logits of a chunk."""
        logits = products.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def log_probabilities(self, products: Tensor, targets: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [n], and the gradient by the products [n, V], which may take their place."""
        if self.softcap is None:
            return logprob_slope_(products, targets, gradient, self.scale), products
        logits = self(products)
        bend = 1 - (logits / self.softcap) ** 2  # the slope of tanh
        logps = logprob_slope_(logits, targets, gradient)
        return logps, logits.mul_(bend).mul_(self.scale).to(products.dtype)


@dataclass(frozen=True)
class Head:
    """An output head by its products, and where it is frozen and carries no adapter, by their way back too."""

    vocabulary: int
    products: Callable[[Tensor, int], Tensor]
    """Hidden states [n, d], and the number of the first of them -> [n, V]."""
    input_gradient: Callable[[Tensor], Tensor] | None = None
    """[n, V] -> [n, d]. Without it gradients go by autograd through `products`, called a second time."""
    products_into: Callable[[Tensor, Tensor], Tensor] | None = None
    """The products written to memory [n, V] that is given: the chunks then share one buffer."""


def dense_head(weight: Tensor, bias: Tensor | None = None) -> Head:
    """From a weight [V, d] and a bias [V]; where one of them is trained, autograd gives its gradient."""

    def into(rows: Tensor, out: Tensor) -> Tensor:
        return multiplied(rows, weight.t(), out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)

    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    back = None if learns else lambda slope: multiplied(slope, weight)
    return Head(len(weight), lambda rows, _: torch.nn.functional.linear(rows, weight, bias), back, into)


GRAIN, AMX_ROWS = 16, 384
"""What the rows of a chunk are a multiple of on AMX, and how many there are at most: products are faster there, and
what is packed for one is worth more of them."""


def chunk_rows(vocabulary: int, device: torch.device, value_bytes: int = 4, on_amx: bool = False) -> int:
    """Rows of a chunk, at least 16, from the bytes of one product."""
    kind = device.type if device.type in CHUNK_BYTES else "cpu"
    most = AMX_ROWS if on_amx else CHUNK_ROWS[kind]
    return max(16, min(most, CHUNK_BYTES[kind] // (value_bytes * vocabulary)))


def log_probabilities(
    hidden: Tensor, head: Head, targets: Tensor, rule: LogitRule = LogitRule(), gradient: Tensor | None = None
) -> Tensor:
    """fp32 log-probabilities [N] of targets [N] from hidden [N, d].

    gradient [N]: the loss's derivative by each log-probability, up to one factor common to all. With it, and a head
    that tells its `input_gradient`, the backward pass costs nothing more; a backward pass that then arrives with
    another gradient raises RuntimeError (on a GPU, which is not waited for, it gives NaN). Else each chunk's logits are
    made again going backward.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states for {targets.shape[0]} targets")
    if not torch.is_grad_enabled():
        return _in_chunks(hidden, head, targets, rule, None)[0]
    if hidden.requires_grad and gradient is not None and head.input_gradient is not None and len(targets):
        return _InForward.apply(hidden, head, targets, rule, gradient)

    def chunk(rows: Tensor, wanted: Tensor, first: int) -> Tensor:
        logits = rule(head.products(rows, first))
        return logits.gather(-1, wanted[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)

    size = chunk_rows(head.vocabulary, hidden.device)
    parts = zip(hidden.split(size), targets.split(size), count(0, size))
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def _in_chunks(
    hidden: Tensor, head: Head, targets: Tensor, rule: LogitRule, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] and, where `gradient` is given, the gradient by hidden [N, d]."""
    logps, grads = hidden.new_empty(len(targets), dtype=torch.float32), torch.empty_like(hidden)
    weights = torch.zeros_like(logps) if gradient is None else gradient.float()
    on_amx = multiplies_all(hidden)
    chunks = -(-len(targets) // chunk_rows(head.vocabulary, hidden.device, hidden.element_size(), on_amx))
    size = -(-len(targets) // max(1, chunks))  # all chunks alike: a short last one would be slower by the row
    if on_amx:  # for a head that is packed or has a bias: a new size costs oneDNN more than some rows
        size = min(-(-size // GRAIN) * GRAIN, len(targets))
    into, back = head.products_into, None if gradient is None else head.input_gradient
    with scratch_scope():
        buffer = None if into is None else scratch_empty(hidden, size, head.vocabulary)
        for at in _chunks(len(targets), size):
            rows = hidden[at]
            products = (
                head.products(rows, at.start) if into is None or buffer is None else into(rows, buffer[: len(rows)])
            )
            logps[at], slope = rule.log_probabilities(products, targets[at], weights[at])
            if back is not None:
                grads[at] = back(slope)
    return logps, grads


def _chunks(rows: int, size: int) -> list[slice]:
    """All of one size: the last one looks at rows again, of which it makes the same."""
    starts = (min(start, rows - size) for start in range(0, rows, max(1, size)))
    return [slice(start, start + size) for start in starts]


class _InForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, rule, gradient):  # type: ignore[no-untyped-def]
        logps, grads = _in_chunks(hidden, head, targets, rule, gradient)
        ctx.save_for_backward(grads, gradient)
        return logps

    @staticmethod
    def backward(ctx, arrived):  # type: ignore[no-untyped-def]
        grads, promised = ctx.saved_tensors
        ratio = torch.dot(arrived, promised) / torch.dot(promised, promised).clamp_min(1e-30)
        largest = arrived.abs().max()
        apart = (arrived - ratio * promised).abs() > 1e-4 * (ratio * promised).abs() + 1e-6 * largest
        broken = apart.any() & largest.isfinite()  # not finite: the caller learns that its loss is not
        if not grads.is_cpu:  # to ask would be to wait
            return times_or_nan(grads, ratio, broken), None, None, None, None
        if broken:
            raise RuntimeError("the loss is not the plain sum that it announced; pass gradient=None")
        # times a plain number: as a tensor of the gradients' 16 bits it would be rounded first
        factor = float(ratio)
        return (grads if factor == 1 else grads * factor), None, None, None, None


def times_or_nan(grads: Tensor, factor: Tensor, broken: Tensor) -> Tensor:
    """grads [N, d] times a scalar in fp32, rounded once; NaN where `broken`, a bool scalar, is true. Nothing is waited
    for."""
    scaled = grads.clone()
    multiply_(scaled, torch.where(broken, torch.nan, factor).expand(grads.shape[1]).contiguous())
    return scaled


def logprob_slope_(logits: Tensor, targets: Tensor, gradient: Tensor, scale: float = 1.0) -> Tensor:
    """`logprob_slope_reference` by the fastest kernel for where the logits are: fp32 log-probabilities [n], and the
    logits [n, V] become the slope. Raises IndexError for a target beyond the vocabulary (CUDA: NaN, without a wait)."""
    rows, vocabulary = logits.shape
    if targets.shape != (rows,) or gradient.shape != (rows,):
        raise ValueError(f"{rows} rows of logits for {tuple(targets.shape)} targets, {tuple(gradient.shape)} gradients")
    if rows == 0:
        return logits.new_empty(0, dtype=torch.float32)
    if logits.device.type == "cpu" and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IndexError(f"targets {int(targets.min())}..{int(targets.max())} in a vocabulary of {vocabulary}")
    plain = _plain(logits, targets, gradient, scale)
    if plain and (kernels := triton.kernels("logprobs", logits)) is not None:
        return kernels.logprob_slope_(logits, targets, gradient, scale)
    library = native.kernels("logprobs", logits) if plain else None
    if library is None:
        logps, slope = logprob_slope_reference(logits, targets, gradient, scale)
        logits.copy_(slope)
        return logps
    logps = torch.empty(rows)
    library.topwork_logprob_slope(
        logits.data_ptr(), rows, vocabulary, logits.stride(0), native.KINDS[logits.dtype], targets.data_ptr(),
        gradient.data_ptr(), scale, logps.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return logps


def logprob_slope_reference(
    logits: Tensor, targets: Tensor, gradient: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The truth: log p = z[t] - log sum exp z of z = scale * logits [n, V], fp32 [n]; and its derivative by the logits
    times gradient [n], which is gradient * scale * (onehot(t) - softmax(z)), in the logits' type."""
    every = torch.log_softmax(logits.float() * scale, -1)
    slope = torch.exp(every).neg_().scatter_add_(-1, targets[:, None], torch.ones_like(every[:, :1]))
    return every.gather(-1, targets[:, None]).squeeze(-1), slope.mul_((gradient * scale)[:, None]).to(logits.dtype)


def _plain(logits: Tensor, targets: Tensor, gradient: Tensor, scale: float) -> bool:
    """Whether a kernel, which sees bare memory, may have these."""
    return (
        scale > 0
        and (targets.dtype, gradient.dtype) == (torch.int64, torch.float32)
        and logits.device == targets.device == gradient.device
        and targets.is_contiguous()
        and gradient.is_contiguous()
        and native.contiguous_rows(logits)
        and (logits.shape[0] == 1 or logits.stride(0) >= logits.shape[1])
    )
