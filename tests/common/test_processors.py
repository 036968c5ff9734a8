"""What a machine's own files say of its processors and of their load, on made-up machines of every kind."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from topwork.common import processors
from topwork.common.processors import (
    Usage,
    asked_threads,
    load_between,
    paying_threads,
    physical_cores,
    usable_cpus,
    usage,
)

V2 = "35 24 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = "35 31 0:32 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"


def machine(root: Path, siblings: Mapping[int, str], name: str = "core_cpus_list") -> Path:
    """A machine whose CPUs have these siblings."""
    for cpu, told in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / name).write_text(f"{told}\n", "ascii")
    return root


def quota(root: Path, cgroup: str, mounts: str, files: Mapping[str, str]) -> Path:
    """The same in control groups with these files."""
    told = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts}
    for name, text in {**told, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n", "ascii")
    return root


def stat(root: Path, *lines: str) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 0 0", *lines, "ctxt 5"]) + "\n", "ascii")
    return root


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_two_halves_of_a_core_are_one(tmp_path: Path, name: str) -> None:
    root = machine(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, name)
    assert physical_cores(range(4), root) == 2
    assert physical_cores([0, 2], root) == 1
    assert physical_cores([0, 1], root) == 2


def test_cpus_that_are_offline_or_say_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, {0: "0", 1: "1,5"})  # 5 is offline, and 7 has no files
    assert physical_cores([0, 1, 7], root) == 3
    assert physical_cores([], root) == 1
    assert physical_cores(range(3), tmp_path / "nowhere") == 3


@pytest.mark.parametrize(
    ("asked", "cpus", "expected"),
    [(8, range(4), 2), (4, range(4), 2), (2, range(4), 2), (1, range(4), 1), (4, [1, 3], 1), (4, [0, 3], 2)],
)
def test_no_more_threads_than_cores_nor_than_asked(tmp_path: Path, asked: int, cpus: list[int], expected: int) -> None:
    root = machine(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert paying_threads(asked, root, cpus) == expected


@pytest.mark.parametrize(
    ("told", "expected"), [("150000 100000", 2), ("200000 100000", 2), ("50000 100000", 1), ("max 100000", 4)]
)
def test_a_containers_quota_is_rounded_up(tmp_path: Path, told: str, expected: int) -> None:
    root = quota(tmp_path, "0::/job", V2, {"job/cpu.max": told})
    assert paying_threads(4, root, range(4)) == expected


def test_the_quota_of_a_group_above_counts_too(tmp_path: Path) -> None:
    files = {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}
    assert paying_threads(4, quota(tmp_path, "0::/a/b", V2, files), range(4)) == 3


@pytest.mark.parametrize(("told", "expected"), [("120000", 2), ("-1", 4), ("many", 4), ("0", 4)])
def test_a_quota_of_version_1(tmp_path: Path, told: str, expected: int) -> None:
    files = {"cpu,cpuacct/job/cpu.cfs_quota_us": told, "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}
    root = quota(tmp_path, "4:memory:/other\n3:cpu,cpuacct:/job\n0::/", V1, files)
    assert paying_threads(4, root, range(4)) == expected


def test_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "usable_cpus", lambda: frozenset(range(6)))
    assert asked_threads({"OMP_NUM_THREADS": "3"}) == 3
    assert asked_threads({"OMP_NUM_THREADS": "4,2"}) == 4  # a level of nesting each
    assert (
        asked_threads({"OMP_NUM_THREADS": "many"}) == asked_threads({"OMP_NUM_THREADS": "0"}) == asked_threads({}) == 6
    )


def test_counters_of_the_usable_cpus_alone(tmp_path: Path) -> None:
    lines = ["cpu0 100 10 50 1000 20 5 5 30 9 9", "cpu1 7 0 0 300 0 0 0 0 0 0", "cpu2 9 9 9 9 9 9 9 9 0 0"]
    found = usage(stat(tmp_path, *lines), [0, 1])
    assert found is not None
    assert (found.cpus, found.counted) == (2, pytest.approx(12.20 + 3.07))
    assert (found.idle, found.stolen) == (pytest.approx(10.2 + 3.0), pytest.approx(0.3))
    assert found.own > 0


def test_where_some_of_the_cpus_are_not_counted_nothing_is_known(tmp_path: Path) -> None:
    """As in a container that may use the host's CPUs 2 to 5, and counts them from 0."""
    root = stat(tmp_path, *(f"cpu{cpu} 7 0 0 300 0 0 0 0 0 0" for cpu in range(4)))
    assert usage(root, range(2, 6)) is None
    assert usage(root, range(4)) is not None


def test_an_old_kernel_counts_less(tmp_path: Path) -> None:
    found = usage(stat(tmp_path, "cpu0 100 10 50 1000"), [0])
    assert found is not None
    assert (found.idle, found.stolen) == (10.0, 0.0)


@pytest.mark.parametrize("lines", [(), ("cpu0 1 2",), ("cpu0 many 1 2 3 4",), ("cpu7 1 2 3 4 5",)])
def test_counters_that_tell_nothing(tmp_path: Path, lines: tuple[str, ...]) -> None:
    assert usage(stat(tmp_path, *lines), [0]) is None
    assert usage(tmp_path / "nowhere", [0]) is None


def counters(
    at: float, idle: float, own: float, stolen: float = 0.0, cpus: int = 2, counted: float | None = None
) -> Usage:
    return Usage(at, cpus, at * cpus if counted is None else counted, idle, stolen, own)


def test_what_is_free_is_idle_or_our_own() -> None:
    load = load_between(counters(10.0, 5.0, 1.0), counters(12.0, 5.5, 3.5, 0.3))
    assert load is not None
    assert (load.free, load.others, load.seconds) == (1.5, 0.5, 2.0)
    assert load.stolen == pytest.approx(0.15)


def test_counters_by_the_tick_never_come_to_more_than_there_is() -> None:
    load = load_between(counters(10.0, 5.0, 1.0), counters(11.0, 6.01, 2.0, 0.01))
    assert load is not None
    assert (load.free, load.others, load.stolen) == (2.0, 0.0, 0.0)


def test_counters_that_stand_still_or_change_their_kind_say_nothing() -> None:
    before = counters(10.0, 5.0, 1.0)
    assert load_between(before, counters(12.0, 5.0, 3.0, counted=before.counted)) is None
    assert load_between(before, counters(12.0, 5.0, 3.0, cpus=1)) is None
    assert load_between(before, before) is None


def test_this_machine() -> None:
    cpus = usable_cpus()
    assert cpus
    assert 1 <= physical_cores(cpus) <= len(cpus)
    assert 1 <= paying_threads(2) <= 2
