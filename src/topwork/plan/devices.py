"""Cards: their memory, speed and price, from `devices.yaml` or a file of a user's own. Free of torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from topwork.common.errors import RequestError, did_you_mean
from topwork.common.options import Options
from topwork.common.os_errors import why
from topwork.common.paths import is_there, missed
from topwork.recipe.recipe import parse_yaml

MIB = 1 << 20
SHIPPED = "devices.yaml"
_WORDS = ("nvidia", "geforce", "gpu", "rtx", "tesla")
"""What may be left out of a card's name."""

Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]


@dataclass(frozen=True)
class Quoted:
    """A number, where it is from and when it was read there."""

    value: float
    source: str
    date: date


@dataclass(frozen=True)
class Device:
    """A card. `flops_per_second` are dense products of `dtype` summed in fp32; `utilization` is the share of them that
    the base's products reach in training (`time.py`); `price_per_hour` is in US dollars, None where nobody is known to
    rent it out."""

    name: str
    aliases: tuple[str, ...]
    dtype: Literal["bfloat16", "float16"]
    memory: Quoted
    flops: Quoted
    bandwidth: Quoted
    utilization: Quoted
    price: Quoted | None = None
    where: str | None = None

    @property
    def memory_bytes(self) -> int:
        """All of the card's memory that its driver reports."""
        return int(self.memory.value)

    @property
    def flops_per_second(self) -> float:
        """The peak of dense products."""
        return self.flops.value

    @property
    def bytes_per_second(self) -> float:
        """The peak of the card's memory."""
        return self.bandwidth.value

    @property
    def price_per_hour(self) -> float | None:
        """US dollars for one card, on demand."""
        return None if self.price is None else self.price.value


class _Source(Options):
    source: str = Field(min_length=1)
    date: date


class _Value(Options):
    value: Positive
    origin: str = Field(alias="from")


class _Share(_Value):
    value: Positive = Field(le=1)


class _Price(_Value):
    where: str = Field(min_length=1)


class _Entry(Options):
    """A device as a file has it."""

    aliases: list[str] = Field(default_factory=list)
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    memory_mib: _Value
    tflops: _Value
    bandwidth_gb: _Value
    utilization: _Share
    price_per_hour: _Price | None = None


class _File(Options):
    sources: dict[str, _Source]
    devices: dict[str, _Entry]


@cache
def shipped_devices() -> Mapping[str, Device]:
    """The cards of `devices.yaml` by name."""
    return _devices(files("topwork.plan").joinpath(SHIPPED).read_text("utf-8"), SHIPPED)


def read_devices(path: Path | str) -> Mapping[str, Device]:
    """A user's cards by name, then the shipped ones that it does not name. Raises RequestError saying which entry and
    which key is wrong."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = "" if is_there(Path(path)) else missed(path)
        raise RequestError(
            f"{path} could not be read as a file of devices: {why(error)}{near}; its form is that of "
            f"topwork/plan/{SHIPPED}"
        ) from error
    own = _devices(text, str(path))
    taken = {_key(name) for device in own.values() for name in (device.name, *device.aliases)}
    return {**own, **{name: one for name, one in shipped_devices().items() if _key(name) not in taken}}


def find_device(name: str, devices: Mapping[str, Device] | None = None) -> Device:
    """A card by its name or one that people call it by; case, spaces, dashes and the maker's words do not matter.

    Raises RequestError naming the nearest, or those that a name may mean (A100 is of 40 or of 80 GB).
    """
    known = shipped_devices() if devices is None else devices
    key = _key(name)
    for device in known.values():
        if key and key in map(_key, (device.name, *device.aliases)):
            return device
    several = [device.name for device in known.values() if key and _key(device.name).startswith(key)]
    if len(several) > 1:
        raise RequestError(f"the device {name!r} may be {' or '.join(several)}; name one of them")
    near = did_you_mean(key, [_key(device.name) for device in known.values()])
    for device in known.values():
        near = near.replace(repr(_key(device.name)), repr(device.name))
    raise RequestError(
        f"there is no device {name!r}; there are {', '.join(known)}{near or ';'} Others go into a file of your own: "
        "--devices FILE, or say how much memory there is: --memory 24GB"
    )


def _key(name: str) -> str:
    words = re.findall(r"[a-z]+|[0-9]+", name.lower())
    return "".join(word for word in words if word not in _WORDS)


def _devices(text: str, called: str) -> dict[str, Device]:
    if text.lstrip()[:1] in ("", "[", "-"):
        raise RequestError(
            f"{called} holds no mapping; expected sources: and devices:, as topwork/plan/{SHIPPED} has them"
        )
    try:
        read = _File.model_validate(parse_yaml(text, called))
    except ValidationError as error:
        raise RequestError(f"{called}: {_told(error)}") from error
    devices = {str(name): _device(str(name), entry, read.sources, called) for name, entry in read.devices.items()}
    owners: dict[str, str] = {}
    for device in devices.values():
        for name in (device.name, *device.aliases):
            before = owners.setdefault(_key(name), device.name)
            if before != device.name or not _key(name):
                raise RequestError(f"{called}: {device.name} and {before} both go by {name!r}; give each its own names")
    return devices


def _device(name: str, entry: _Entry, sources: Mapping[str, _Source], called: str) -> Device:
    def quoted(key: str, factor: float) -> Quoted:
        value: _Value = getattr(entry, key)
        if value.origin not in sources:
            raise RequestError(
                f"{called}: devices.{name}.{key}.from is {value.origin!r}, and sources has no such entry"
                f"{did_you_mean(value.origin, sources)}"
            )
        source = sources[value.origin]
        number = value.value * factor
        if not math.isfinite(number):
            raise RequestError(f"{called}: devices.{name}.{key} is {value.value}; give a number that is not so large")
        return Quoted(number, source.source, source.date)

    price = entry.price_per_hour
    return Device(
        name,
        tuple(entry.aliases),
        entry.dtype,
        memory=quoted("memory_mib", MIB),
        flops=quoted("tflops", 1e12),
        bandwidth=quoted("bandwidth_gb", 1e9),
        utilization=quoted("utilization", 1.0),
        price=None if price is None else quoted("price_per_hour", 1.0),
        where=None if price is None else price.where,
    )


def _told(error: ValidationError) -> str:
    """The first problem: which entry and key, what is there, what is expected."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{place} is missing; give it, as topwork/plan/{SHIPPED} does"
    if problem["type"] == "extra_forbidden":
        kind = _Entry if len(problem["loc"]) == 3 else _Value if len(problem["loc"]) == 4 else _File
        known = [field.alias or name for name, field in kind.model_fields.items()]
        return f"{place} is no key that is known here{did_you_mean(str(problem['loc'][-1]), known)}"
    if problem["type"] in ("model_type", "dict_type"):
        return f"{place} is {problem['input']!r}; expected keys under it, as topwork/plan/{SHIPPED} has them"
    if problem["loc"][-1:] == ("[key]",):
        return f"{place.removesuffix('.[key]')} is a number and no name; put it in quotes"
    message = str(problem["msg"]).replace("Input should be", "expected", 1)
    return f"{place or 'the file'} is {problem['input']!r}; {message[:1].lower()}{message[1:]}"
