"""Where a run is planned for: a card by its name, so much memory, or the machine at hand. Free of torch."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from topwork.common.errors import RequestError
from topwork.common.memory import free_host_memory
from topwork.plan.devices import Device, find_device
from topwork.plan.speeds import cpu_speed, speed_of
from topwork.plan.time import Speed

_UNITS = {
    "": 10**9, "b": 1, "k": 10**3, "kb": 10**3, "kib": 2**10, "m": 10**6, "mb": 10**6, "mib": 2**20, "g": 10**9,
    "gb": 10**9, "gib": 2**30, "t": 10**12, "tb": 10**12, "tib": 2**40,
}  # fmt: skip
_LEAST_BYTES = 10**6
_DRIVER = Path("proc/driver/nvidia/gpus")
_ASK = ("nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits")
_ASK_SECONDS = 2.0


@dataclass(frozen=True)
class Place:
    """Where a run is planned for.

    name            for people: "RTX 4090", "24 GB of a card's memory", "this machine's CPU"
    memory_bytes    that may be taken
    of              what that is, behind "of the …": "24 GB on the RTX 4090", "5.7 GB free on this machine"
    speed           None where only memory is known
    price_per_hour  US dollars
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    of: str
    speed: Speed | None = None
    price_per_hour: float | None = None
    assumed: str = ""


def find_place(
    device: str | None, memory: str | None, wanted: str, devices: Mapping[str, Device] | None = None
) -> Place:
    """What was asked for, or the machine at hand.

    wanted  `model.device` of the recipe, which tells whose memory `memory` is

    Raises RequestError for an unknown device, for memory that is none, and for both of them.
    """
    if device is not None and memory is not None:
        raise RequestError(
            f"--device {device!r} has memory of its own, and --memory {memory!r} says another; give one of them"
        )
    if device is not None:
        return card_place(find_device(device, devices))
    if memory is not None:
        return _so_much(memory_bytes(memory), wanted)
    return _here(wanted, devices)


def card_place(card: Device) -> Place:
    """A card that is there for the run alone."""
    of = f"{gigabytes(card.memory_bytes)} on the {card.name}"
    return Place(card.name, "cuda", card.memory_bytes, of, speed_of(card), card.price_per_hour)


def memory_bytes(text: str) -> int:
    """`24GB`, `24GiB`, `24000MB`, or 24, which is GB. Raises RequestError for what is none, and for none at all."""
    found = re.fullmatch(r"\s*(\d+(?:[.,]\d+)?|\.\d+)\s*([kmgt]?i?b?)\s*", text, re.IGNORECASE)
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None:
        raise RequestError(f"--memory is {text!r}; expected a size such as 24GB, 24GiB, 24000MB, or 24 for 24 GB")
    size = round(float(found[1].replace(",", ".")) * unit)
    if not _LEAST_BYTES <= size < 10**18:
        raise RequestError(
            f"--memory is {text!r}, which is {size:,} bytes; expected a machine's, such as 24GB, 24GiB, 24000MB, or 24"
        )
    return size


def gigabytes(size: int) -> str:
    """`24.6 GB`, `512 MB`: in thousands, as memory is sold."""
    if abs(size) < 10**9:
        return f"{size / 10**6:,.0f} MB"
    return f"{size / 10**9:,.1f} GB" if abs(size) < 10**11 else f"{size / 10**9:,.0f} GB"


def _so_much(size: int, wanted: str) -> Place:
    """A recipe that says cpu means the CPU's; else so much memory is a card's."""
    if wanted == "cpu":
        return Place(
            "a CPU", "cpu", size, f"{gigabytes(size)} of memory", assumed="a CPU's memory: model.device is cpu"
        )
    return Place("a card", "cuda", size, f"{gigabytes(size)} of a card's memory", assumed="a card's memory")


def _here(wanted: str, devices: Mapping[str, Device] | None) -> Place:
    cards = [] if wanted in ("cpu", "mps") else _cards()
    number = int(wanted.partition(":")[2] or 0) if wanted.startswith("cuda") else 0
    if number < len(cards):
        name, size = cards[number]
        of = f"{gigabytes(size)} free on this machine's {name}"
        try:
            card = find_device(name, devices)
        except RequestError:
            return Place(name, "cuda", size, of, assumed="a card that no speed is known of")
        return Place(card.name, "cuda", size, of, speed_of(card), assumed="this machine's card")
    free = free_host_memory()
    limit = f" of {free.source}" if free.limited else " on this machine"
    return Place("this machine's CPU", "cpu", free.bytes, f"{gigabytes(free.bytes)} free{limit}", cpu_speed())


def _cards(root: Path = Path("/")) -> list[tuple[str, int]]:
    """(name, free bytes) of the machine's cards. The driver is asked where it is loaded, with a limit of time: torch
    would know too, in seconds."""
    if not (root / _DRIVER).is_dir():
        return []
    try:
        told = subprocess.run(_ASK, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.rsplit(",", 1) for line in told.splitlines() if "," in line)
    return [(name.strip(), int(free) << 20) for name, free in rows if free.strip().isdigit()]
