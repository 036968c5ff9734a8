"""Between the host and a GPU that is still busy with what it was given before.

A GPU works through a queue. Whoever asks it for a number waits for all that stands before the number, and while the
host waits nobody fills the queue. So a step sends without waiting, and reads once, at its end
(tests/training/test_on_a_card.py counts).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, without a wait: CUDA takes them out of pinned memory when their turn comes."""
    if values.device == device or values.device.type != "cpu":
        return values.to(device)
    held = values.pin_memory() if device.type == "cuda" else values
    return held.to(device, non_blocking=True)


def read(values: Sequence[Tensor | float]) -> list[float]:
    """Numbers on the host, for which it waits once; those that are there already are as they were."""
    away = [value.detach().double().reshape(()) for value in values if isinstance(value, Tensor) and not value.is_cpu]
    came = iter(torch.stack(away).cpu().tolist() if away else ())
    return [next(came) if isinstance(value, Tensor) and not value.is_cpu else float(value) for value in values]
