"""Log-probabilities of target tokens from hidden states and the output head, never materialising [N, vocabulary].

    z = cap * tanh(scale * (h W' + b) / cap)        log p(target) = z[target] - logsumexp(z)

Work goes in chunks of rows. Where the caller knows the gradient of its loss with respect to the log-probabilities
beforehand (`gradient`, for any plain weighted sum), the hidden states' gradient is taken in the forward pass while a
chunk's logits are at hand: two products with the head and not three, and nothing kept but that gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""fp32 logits held at once, by device type."""


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

    def back(self, logits: Tensor, grad: Tensor) -> Tensor:
        """The products' gradient from the logits'; `grad` is overwritten."""
        if self.softcap is not None:
            grad = grad.mul_(1 - (logits / self.softcap) ** 2)
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose fp32 logits fit the chunk, at least 16."""
    return max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary))


def log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    rule: LogitRule = LogitRule(),
    gradient: Tensor | None = None,
) -> Tensor:
    """fp32 log-probabilities [N] of targets [N] from hidden [N, d] and the head's weight [V, d] and bias [V].

    gradient [N]: the loss's derivative by each log-probability, up to one factor common to all. With it the backward
    pass costs nothing more; a backward pass that then arrives with another gradient raises RuntimeError. The head's own
    gradient is computed where its weight or bias asks for one (then `gradient` is not used).
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states for {targets.shape[0]} targets")
    head_learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if hidden.requires_grad and gradient is not None and not head_learns and len(targets) and torch.is_grad_enabled():
        return _InForward.apply(hidden, weight, targets, bias, rule, gradient)
    return log_probabilities_through(
        lambda rows: torch.nn.functional.linear(rows, weight, bias), hidden, targets, weight.shape[0], rule
    )


def log_probabilities_through(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int, rule: LogitRule = LogitRule()
) -> Tensor:
    """The same through any head [n, d] -> [n, V], chunk by chunk; going backward each chunk's logits are made again."""

    def chunk(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = rule(head(rows))
        return logits.gather(-1, wanted[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)

    size = chunk_rows(vocabulary, hidden.device)
    parts = [
        checkpoint(chunk, rows, wanted, use_reentrant=False) if torch.is_grad_enabled() else chunk(rows, wanted)
        for rows, wanted in zip(hidden.split(size), targets.split(size))
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


class _InForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, rule, gradient):  # type: ignore[no-untyped-def]
        logps, grads = hidden.new_empty(len(targets), dtype=torch.float32), torch.empty_like(hidden)
        size = chunk_rows(weight.shape[0], hidden.device)
        for start in range(0, len(targets), size):
            at = slice(start, start + size)
            logits = rule(torch.nn.functional.linear(hidden[at], weight, bias))
            wanted = targets[at, None]
            total = torch.logsumexp(logits, -1, keepdim=True)
            logps[at] = (logits.gather(-1, wanted) - total).squeeze(-1)
            # d log p / d z = onehot - softmax
            slope = torch.exp(logits - total).neg_()
            slope.scatter_add_(-1, wanted, torch.ones_like(total))
            slope = rule.back(logits, slope.mul_(gradient[at, None]))
            torch.mm(slope.to(hidden.dtype), weight, out=grads[at])
        ctx.save_for_backward(grads, gradient)
        return logps

    @staticmethod
    def backward(ctx, arrived):  # type: ignore[no-untyped-def]
        grads, promised = ctx.saved_tensors
        factor = torch.dot(arrived, promised) / torch.dot(promised, promised).clamp_min(1e-30)
        largest = float(arrived.abs().max())
        finite = largest - largest == 0  # else the caller learns that its loss is not finite
        if finite and not torch.allclose(arrived, factor * promised, rtol=1e-4, atol=1e-6 * largest):
            raise RuntimeError("the loss is not the plain sum that it announced; pass gradient=None")
        return (grads if factor == 1 else grads * factor.to(grads.dtype)), None, None, None, None, None
