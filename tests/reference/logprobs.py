"""Log-probabilities from the whole logit matrix, float64."""

import torch
from torch import Tensor


def log_probabilities_whole(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None,
    scale: float = 1.0, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """[N] in float64 from hidden [N, d], the head's weight [V, d] and bias [V], and targets [N]."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
