"""Limits of control groups, read from made-up trees of every kind that machines and containers have."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from topwork.common.cgroups import Limit, cgroup_cores, cgroup_limits

V2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
NO_LIMIT = "9223372036854771712"


def tree(root: Path, cgroup: str, mounts: str, groups: Mapping[str, Mapping[str, object]]) -> list[Limit]:
    """What is read where the process has these lines and the folders below /sys/fs/cgroup these files."""
    told = {"proc/self": {"cgroup": cgroup, "mountinfo": mounts}}
    told |= {f"sys/fs/cgroup/{name}": files for name, files in groups.items()}  # type: ignore[misc]
    for folder, files in told.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / folder / name).write_text(f"{text}\n", "utf-8")
    return cgroup_limits(root)


def test_version_2(tmp_path: Path) -> None:
    own = {"memory.max": 1000, "memory.high": "max", "memory.current": 400, "memory.stat": "anon 300\ninactive_file 60"}
    assert tree(tmp_path, "0::/job", V2, {"job": own}) == [Limit(1000, 340)]


def test_what_the_kernel_notes_of_files_is_given_up(tmp_path: Path) -> None:
    stat = "anon 100\ninactive_file 60\nactive_file 20\nfile_mapped 90\nslab_reclaimable 300\nslab_unreclaimable 50"
    own = {"memory.max": 1000, "memory.current": 700, "memory.stat": stat}
    assert tree(tmp_path, "0::/job", V2, {"job": own}) == [Limit(1000, 400)]


def test_a_limit_above_the_own_group_and_the_one_that_slows_down(tmp_path: Path) -> None:
    groups = {
        "a/b/c": {"memory.max": "max", "memory.high": "max", "memory.current": 10},
        "a/b": {"memory.max": 900, "memory.high": 700, "memory.current": 500},
        "a": {"memory.max": 800, "memory.current": 790},
        "": {"memory.stat": "anon 1"},  # the top has no limits
    }
    found = tree(tmp_path, "0::/a/b/c", V2, groups)
    assert found == [Limit(900, 500), Limit(700, 500), Limit(800, 790)]


def test_version_1(tmp_path: Path) -> None:
    own = {
        "memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 700, "memory.memsw.limit_in_bytes": 1200,
        "memory.memsw.usage_in_bytes": 900,
        "memory.stat": f"inactive_file 1\ntotal_inactive_file 100\nhierarchical_memory_limit {NO_LIMIT}",
    }  # fmt: skip
    top = {"memory.limit_in_bytes": NO_LIMIT, "memory.usage_in_bytes": 5000}
    found = tree(tmp_path, "5:cpu,memory:/job\n2:cpu:/x\n0::/", V1, {"memory/job": own, "memory": top})
    assert found == [Limit(1000, 600), Limit(1200, 800)]


def test_a_group_above_that_is_not_seen(tmp_path: Path) -> None:
    own = {
        "memory.limit_in_bytes": NO_LIMIT, "memory.usage_in_bytes": 300,
        "memory.stat": "total_inactive_file 100\nhierarchical_memory_limit 800",
    }  # fmt: skip
    seen = V1.replace("0:32 / ", "0:32 /kube/pod ")
    assert tree(tmp_path, "5:memory:/kube/pod", seen, {"memory": own}) == [Limit(800, 200)]


def test_both_versions_at_once(tmp_path: Path) -> None:
    groups = {
        "memory/job": {"memory.limit_in_bytes": 500, "memory.usage_in_bytes": 1},
        "unified/job": {"memory.pressure": "some"},  # no controller is there
    }
    assert tree(tmp_path, "4:memory:/job\n0::/job", f"{V1}\n{HYBRID}", groups) == [Limit(500, 1)]
    assert Limit(300, 0) in tree(
        tmp_path, "4:memory:/job\n0::/job", f"{V1}\n{HYBRID}", {"unified": {"memory.max": 300}}
    )


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/abc", "/docker/abc"),  # the machine's namespace, and the container's part is mounted
        ("/docker/abc", "/docker/other"),
        ("/../../elsewhere", "/"),
        ("/gone (deleted)", "/"),
    ],
)
def test_in_a_container_the_top_of_the_mount_is_the_own_group(tmp_path: Path, path: str, part: str) -> None:
    mount = V2.replace("0:30 / ", f"0:30 {part} ")
    assert tree(tmp_path, f"0::{path}", mount, {"": {"memory.max": 600, "memory.current": 50}}) == [Limit(600, 50)]


def test_another_group_that_is_mounted_too_says_nothing(tmp_path: Path) -> None:
    other = "36 24 0:30 /other /sys/fs/cgroup/elsewhere rw - cgroup2 cgroup2 rw"
    groups = {"job": {"memory.max": 700, "memory.current": 0}, "elsewhere": {"memory.max": 1, "memory.current": 0}}
    assert tree(tmp_path, "0::/job", f"{other}\n{V2}", groups) == [Limit(700, 0)]


def test_a_place_with_a_space(tmp_path: Path) -> None:
    mount = V2.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/my\040groups")
    assert tree(tmp_path, "0::/a:b", mount, {"my groups/a:b": {"memory.max": 9, "memory.current": 2}}) == [Limit(9, 2)]


def test_files_that_are_cached_are_free_and_those_that_are_mapped_are_not(tmp_path: Path) -> None:
    stat = "inactive_file 300\nactive_file 200\nfile_mapped 150\nslab_unreclaimable 5"
    own = {"memory.max": 1000, "memory.current": 600, "memory.stat": stat}
    assert tree(tmp_path, "0::/", V2, {"": own}) == [Limit(1000, 250)]
    assert tree(tmp_path, "0::/", V2, {"": {"memory.stat": "inactive_file 900"}}) == [Limit(1000, 0)]


@pytest.mark.parametrize("value", ["", "max", "-1", "nan", "1e9", "twelve", "9" * 5000, NO_LIMIT, "1 2", "\u0663"])
def test_what_is_no_number_is_no_limit(tmp_path: Path, value: str) -> None:
    assert tree(tmp_path, "0::/job", V2, {"job": {"memory.max": value, "memory.current": 1}}) == []


def test_a_usage_that_cannot_be_read_leaves_the_limit(tmp_path: Path) -> None:
    assert tree(tmp_path, "0::/job", V2, {"job": {"memory.max": 77}}) == [Limit(77, 0)]


def test_nothing_to_read(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == []
    assert tree(tmp_path, "no lines: of such\n\x00\n::", "half a line\n1 2 - cgroup2", {}) == []
    (tmp_path / "sys/fs/cgroup/memory.max").mkdir(parents=True)  # a folder in a file's place
    assert tree(tmp_path, "0::/", V2, {}) == []


def test_without_mounts_the_usual_places_are_read(tmp_path: Path) -> None:
    groups = {"memory/job": {"memory.limit_in_bytes": 50}, "job": {"memory.max": 60}}
    assert set(tree(tmp_path, "0::/job\n4:memory:/job", "", groups)) == {Limit(50, 0), Limit(60, 0)}


# Processors


def test_cores_of_version_2(tmp_path: Path) -> None:
    groups = {"a/b": {"cpu.max": "max 100000"}, "a": {"cpu.max": "150000 100000"}, "": {}}
    tree(tmp_path, "0::/a/b", V2, groups)
    assert cgroup_cores(tmp_path) == 1.5


def test_cores_of_version_1(tmp_path: Path) -> None:
    mounts = "35 31 0:32 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"
    groups = {
        "cpu/job": {"cpu.cfs_quota_us": 400000, "cpu.cfs_period_us": 100000},
        "cpu": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000},
    }
    tree(tmp_path, "5:memory:/other\n2:cpu,cpuacct:/job\n0::/", mounts, groups)
    assert cgroup_cores(tmp_path) == 4


@pytest.mark.parametrize("told", ["max 100000", "", "a b", "1000", "1000 0", "-1 100000"])
def test_no_limit_of_cores(told: str, tmp_path: Path) -> None:
    tree(tmp_path, "0::/job", V2, {"job": {"cpu.max": told}})
    assert cgroup_cores(tmp_path) is None
    assert cgroup_cores(tmp_path / "nowhere") is None
