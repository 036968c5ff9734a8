"""One call under torch's profiler: its most expensive kernels, how much is launched, waited for and copied, how long
the card had nothing to do."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.card import Card

KINDS = {
    "stream_waits": r"^cudaStreamSynchronize",
    "device_waits": r"^(cudaDeviceSynchronize|cudaEventSynchronize)",
    "copies": r"^cudaMemcpy",
    "launches": r"^(cuda|cu)Launch(Cooperative)?Kernel",
    "allocations": r"^cudaMalloc",
}
"""What the CPU asks the driver for, by its calls' names."""


def profiled(card: Card, call: Callable[[], Any], top: int = 10) -> dict[str, Any]:
    """Of a call that was made before, so that nothing is compiled in it. On a CPU the operators stand for kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.measured else [])]
    with profile(activities=activities) as profiler:
        seconds = card.timed(call)
    events = profiler.events() or []
    on_card = card_events(events)
    spans = [(event.time_range.start, event.time_range.end) for event in on_card]
    spent: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in on_card if card.measured else events:
        spent[event.name] += event.time_range.elapsed_us() if card.measured else event.self_cpu_time_total
        times[event.name] += 1
    called = Counter(event.name for event in events if event.device_type == DeviceType.CPU)
    whole = (max(end for _, end in spans) - min(start for start, _ in spans)) if spans else 0
    all_spent = sum(spent.values())
    return {
        "seconds": seconds,
        **{kind: sum(count for name, count in called.items() if re.match(rule, name)) for kind, rule in KINDS.items()},
        "kernels": sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_card),
        "busy_seconds": covered(spans) / 1e6, "idle_share": 1 - covered(spans) / whole if whole else 0.0,
        "top": [
            {"name": name[:120], "milliseconds": micros / 1e3, "times": times[name], "share": micros / all_spent}
            for name, micros in spent.most_common(top)
        ],
    }  # fmt: skip


def waits(card: Card, call: Callable[[], Any]) -> list[str]:
    """Where in the code a call waits for the card, as torch tells it; nothing on a CPU."""
    if not card.measured:
        return []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchronizing" in str(w.message)]


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much of the time line lies in any of these spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kernel_names(card: Card, call: Callable[[], Any]) -> list[str]:
    """The kernels that a call runs, in order; none on a CPU."""
    if not card.measured:
        return []
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize(card.device)
    events = sorted(card_events(profiler.events() or []), key=lambda event: event.time_range.start)
    return [event.name[:80] for event in events]


def card_events(events: Sequence[Any]) -> list[Any]:
    """Kernels, copies and fills; ranges that have a name (an optimizer's step) span them and are none."""
    on_card = [event for event in events if event.device_type == DeviceType.CUDA]
    return [event for event in on_card if not getattr(event, "is_user_annotation", False)]
