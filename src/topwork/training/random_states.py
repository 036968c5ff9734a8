"""The states of the random generators that training draws from, as tensors of bytes."""

import json
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Of torch's generators (CPU, every CUDA device) and of Python's, as uint8 by name."""
    python = bytearray(json.dumps(random.getstate()).encode())
    states = {"torch.cpu": torch.get_rng_state(), "python": torch.frombuffer(python, dtype=torch.uint8)}
    if torch.cuda.is_available():
        states |= {f"torch.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def python_state(states: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Python's of them, as `random.setstate` takes it. Raises ValueError, KeyError or TypeError where it is none."""
    version, numbers, gauss = json.loads(bytes(states["python"].tolist()))
    return version, tuple(numbers), gauss


def restore_random(states: Mapping[str, Tensor], python: tuple[Any, ...]) -> None:
    """Set the generators that are there to what `random_states` gave, Python's to what `python_state` made of it."""
    torch.set_rng_state(states["torch.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"torch.cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"torch.cuda.{index}"], index)
    random.setstate(python)
