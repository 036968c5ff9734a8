"""What Linux's control groups still let the process take, of memory and of processors: those of containers, services
and batch systems.

Both versions are read, and both at once where a machine mounts them so: a process has a path in each
(/proc/self/cgroup), and a hierarchy is seen where it is mounted (/proc/self/mountinfo), which in a container is often
the container's own part of it. Every group above counts too. What cannot be read says nothing.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 62
"""Bytes. Version 1 writes "no limit" as the largest number of pages."""


@dataclass(frozen=True)
class Limit:
    """Bytes that a group may hold, and those that it holds and cannot give up."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class _Mount:
    """A hierarchy that tells of what is asked for: which part of it (`part`) is seen in which folder."""

    version: int
    part: str
    folder: Path


def cgroup_limits(root: Path = Path("/")) -> list[Limit]:
    """Every limit on memory that the process is under; none where there is none or it cannot be read."""
    paths = _paths(root)
    found: list[Limit] = []
    for version, read in ((2, _version_2), (1, _version_1)):
        mounts = [mount for mount in _mounts(root) if mount.version == version]
        if version in paths:
            found += [limit for folder in _folders(paths[version], mounts) for limit in read(folder)]
    return found


def cgroup_cores(root: Path = Path("/")) -> float | None:
    """How many cores' time the process may take, by the narrowest group that says so; None where none does."""
    paths, found = _paths(root, "cpu"), []
    for version, read in ((2, _cores_2), (1, _cores_1)):
        mounts = [mount for mount in _mounts(root, "cpu") if mount.version == version]
        if version in paths:
            found += [cores for folder in _folders(paths[version], mounts) if (cores := read(folder)) is not None]
    return min(found, default=None)


def _cores_2(group: Path) -> float | None:
    """Microseconds in each period, and the period; "max" is no limit."""
    told = "".join(_lines(group / "cpu.max")[:1]).split()
    return int(told[0]) / int(told[1]) if len(told) == 2 and all(map(_is_number, told)) and int(told[1]) else None


def _cores_1(group: Path) -> float | None:
    quota, period = (_number(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))  # -1 is no limit
    return quota / period if quota and period else None


def _paths(root: Path, controller: str = "memory") -> dict[int, str]:
    """The process's path by version, of version 1 that of one controller."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found[2] = path or "/"
        elif controller in controllers.split(","):
            found[1] = path or "/"
    return found


def _mounts(root: Path, controller: str = "memory") -> list[_Mount]:
    found, lines = [], _lines(root / "proc/self/mountinfo")
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        part, place = (_unescaped(field) for field in fields[3:5])
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and controller in kind[2].split(",")):
            found.append(_Mount(2 if kind[0] == "cgroup2" else 1, part, root / place.lstrip("/")))
    if any(map(str.strip, lines)):
        return found
    usual = {2: "sys/fs/cgroup", 1: f"sys/fs/cgroup/{controller}"}  # where nothing tells of mounts
    return [_Mount(version, "/", root / place) for version, place in usual.items()]


def _folders(path: str, mounts: list[_Mount]) -> Iterator[Path]:
    """The process's own group and all above it, as far as they are mounted. A path that is below no mount is that of
    another namespace: a mount then shows the process's own group as its top."""
    within = [(mount.folder, inner) for mount in mounts if (inner := _below(path, mount.part)) is not None]
    for folder, inner in within or [(mount.folder, PurePosixPath()) for mount in mounts]:
        yield folder / inner
        yield from (folder / above for above in inner.parents if above != inner)


def _below(path: str, part: str) -> PurePosixPath | None:
    try:
        inner = PurePosixPath(path.removesuffix(" (deleted)")).relative_to(part)
    except ValueError:
        return None
    return None if ".." in inner.parts else inner


def _version_2(group: Path) -> Iterator[Limit]:
    """Above memory.high the kernel takes memory back and slows the process down, above memory.max it kills."""
    used = (_number(group / "memory.current") or 0) - _reclaimable(_stat(group), "")
    for name in ("memory.max", "memory.high"):
        limit = _number(group / name)
        if limit is not None:
            yield Limit(limit, max(0, used))


def _version_1(group: Path) -> Iterator[Limit]:
    stat = _stat(group)
    reclaimable = _reclaimable(stat, "total_")
    for kind in ("memory", "memory.memsw"):  # the second counts what is swapped out too
        limit = _number(group / f"{kind}.limit_in_bytes")
        if limit is not None:
            yield Limit(limit, max(0, (_number(group / f"{kind}.usage_in_bytes") or 0) - reclaimable))
    above = stat.get("hierarchical_memory_limit")  # the least of the groups above, also of those that are not seen
    if above is not None and above < UNLIMITED:
        yield Limit(above, max(0, (_number(group / "memory.usage_in_bytes") or 0) - reclaimable))


def _reclaimable(stat: Mapping[str, int], prefix: str) -> int:
    """Cached files' bytes, but for those that programs have mapped: they hold code and weights that are in use; and the
    kernel's notes on files (names, inodes), of which a container that read many may hold gigabytes."""
    kept = [stat.get(prefix + name, 0) for name in ("inactive_file", "active_file")]
    mapped = stat.get(prefix + ("mapped_file" if prefix else "file_mapped"), 0)
    return max(0, sum(kept) - mapped) + stat.get("slab_reclaimable", 0)


def _stat(group: Path) -> dict[str, int]:
    pairs = (line.split() for line in _lines(group / "memory.stat"))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and _is_number(pair[1])}


def _number(path: Path) -> int | None:
    """None where there is no limit, or no number that says so."""
    text = "".join(_lines(path)).strip()
    return int(text) if _is_number(text) and int(text) < UNLIMITED else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 25


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()
    except (OSError, ValueError):
        return []


def _unescaped(field: str) -> str:
    """mountinfo writes a space, a tab, a line's end and a backslash as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
