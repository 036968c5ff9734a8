"""The C kernels that this machine runs on, and why others are not used, for `topwork doctor`."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from topwork.common.errors import RequestError


@dataclass(frozen=True)
class Refused:
    """A way to compile that is not used; `at` is when that was found out."""

    compiled: str
    why: str
    at: str | None = None


@dataclass(frozen=True)
class Kernel:
    """A file of kernels.

    compiled  how; None where plain torch does the work
    proved    when, in UTC
    note      what else there is to say of it
    error     why nothing could be compiled
    """

    name: str
    compiled: str | None
    path: str | None = None
    proved: str | None = None
    note: str = ""
    error: str = ""
    refused: tuple[Refused, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return asdict(self)


def kernels(quick: bool, again: bool) -> list[Kernel]:
    """All files. With `quick` only what was found out before; with `again` nothing of it that was refused. Raises
    RequestError where TOPWORK_AMX says what nobody knows."""
    from topwork.ops.native import build
    from topwork.ops.native.load import SIGNATURES

    if os.environ.get(build.OFF):
        return [Kernel(name, None, note=f"switched off by {build.OFF}") for name in SIGNATURES]
    return [_kernel(name, quick, again) for name in SIGNATURES]


def _kernel(name: str, quick: bool, again: bool) -> Kernel:
    from topwork.ops.native import build

    try:
        if again:
            forget(name)
        found = build.looked_up(name) if quick else build.built(name)
    except RequestError:
        raise
    except OSError as error:
        return Kernel(name, None, error=str(error))
    return Kernel(
        name,
        found.variant.name if found.variant else None,
        str(found.path) if found.path else None,
        found.mark.at if found.mark else None,
        "; ".join(filter(None, (found.note, found.elsewhere))),
        build.told(found.error) if found.error else "",
        tuple(
            Refused(variant.name, str(refused), refused.known.at if refused.known else None)
            for variant, refused in found.refused
        ),
    )


def forget(name: str) -> None:
    """Leave no mark of what was refused of a file."""
    from topwork.ops.native import build

    for mark in build.refusals(name):
        mark.path.unlink(missing_ok=True)
