"""The processors that this process may use, and how busy they are. Free of torch.

Linux says both (affinity, control groups, /sys, /proc/stat); elsewhere all CPUs are usable, and of load nothing is
known.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from topwork.common.cgroups import cgroup_cores

TICK_SECONDS = 0.01
"""/proc/stat counts in hundredths of a second on every Linux (USER_HZ)."""
NOT_COUNTED = 0.5
"""Where the counters of some CPUs come to less than so much of the time that has passed, they do not count."""


def usable_cpus() -> frozenset[int]:
    """The CPUs that the process may run on, by number: its affinity."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores(cpus: Iterable[int], root: Path = Path("/")) -> int:
    """How many cores some CPUs are: two halves of one (SMT) share its arithmetic. A CPU of which nothing is known is a
    core of its own."""
    return max(1, len({_siblings(cpu, root) for cpu in cpus}))


def _siblings(cpu: int, root: Path) -> str:
    """The CPUs of a CPU's core, as the kernel lists them: `0,32`."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second before Linux 5.3
        if told := _text(topology / name).strip():
            return told
    return f"cpu{cpu}"


def asked_threads(environment: Mapping[str, str] = os.environ) -> int:
    """How many threads the environment asks for (OMP_NUM_THREADS), else one for each usable CPU."""
    asked = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) else len(usable_cpus())


def paying_threads(asked: int | None = None, root: Path = Path("/"), cpus: Iterable[int] | None = None) -> int:
    """The most threads that pay on an idle machine: as many as were asked for (left out, `asked_threads`), but no more
    than the usable CPUs have cores, and than a container's quota has time for, rounded up."""
    most = asked_threads() if asked is None else asked
    if most == 1:
        return 1
    quota = cgroup_cores(root)
    cores = physical_cores(usable_cpus() if cpus is None else cpus, root)
    return max(1, min(most, cores, cores if quota is None else math.ceil(quota)))


@dataclass(frozen=True)
class Usage:
    """Counters at a moment, in seconds: of the usable CPUs together (`cpus` many), and of this process's own time on
    them, with that of its children that have ended."""

    at: float
    cpus: int
    counted: float
    idle: float
    stolen: float
    own: float


@dataclass(frozen=True)
class Load:
    """What usable CPUs did between two moments, in CPUs: 1.0 is one of them, all the time.

    free    idle, or used by this process: what other work leaves to it
    others  used by other processes, the system, and what a host took from a virtual machine (`stolen`)
    """

    cpus: int
    free: float
    others: float
    stolen: float
    seconds: float


def usage(root: Path = Path("/"), cpus: Iterable[int] | None = None) -> Usage | None:
    """The counters now, of the usable CPUs unless others are named; None where not all of them are counted. A
    container's own /proc/stat (lxcfs) numbers CPUs from 0, whatever the host's numbers are that affinity has."""
    wanted = {f"cpu{cpu}" for cpu in (usable_cpus() if cpus is None else cpus)}
    lines = (line.split() for line in _text(root / "proc/stat").splitlines())
    found = [line for line in lines if line and line[0] in wanted]
    return _usage(found) if len(found) == len(wanted) else None


def _usage(lines: list[list[str]]) -> Usage | None:
    """Of lines `cpu0 user nice system idle iowait irq softirq steal guest guest_nice`; guests' time is in user's."""
    try:
        ticks = [[int(number) for number in line[1:9]] for line in lines]
    except ValueError:
        return None
    if not ticks or any(len(each) < 4 for each in ticks):
        return None
    idle, stolen = (sum(sum(each[part]) for each in ticks) for part in (slice(3, 5), slice(7, 8)))
    spent = os.times()
    return Usage(
        at=time.monotonic(),
        cpus=len(ticks),
        counted=sum(map(sum, ticks)) * TICK_SECONDS,
        idle=idle * TICK_SECONDS,
        stolen=stolen * TICK_SECONDS,
        own=time.process_time() + spent.children_user + spent.children_system,
    )


def load_between(before: Usage, after: Usage) -> Load | None:
    """What was done from one moment to the other; None where the counters stand still, as some sandboxes' do, or where
    CPUs have come or gone."""
    seconds, cpus = after.at - before.at, after.cpus
    if seconds <= 0 or cpus != before.cpus or after.counted - before.counted < NOT_COUNTED * cpus * seconds:
        return None
    free = min(float(cpus), (after.idle - before.idle + after.own - before.own) / seconds)
    stolen = max(0.0, after.stolen - before.stolen) / seconds
    return Load(cpus, free, cpus - free, min(stolen, cpus - free), seconds)


def _text(path: Path) -> str:
    """A file of the kernel's; empty where it cannot be read."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
