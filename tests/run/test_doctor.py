"""`topwork doctor`: what is told of a machine, what of it is wrong, and that no secret is among it."""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from reference.compiler import needs_compiler
from run.fixtures import Said
from topwork.ops.native import build, load, proof
from topwork.ops.native.proof import Verdict
from topwork.ops.native.variants import Variant
from topwork.run import doctor as module
from topwork.run.doctor import Report, doctor
from topwork.run.examined import machine, software
from topwork.run.examined.kernels import Kernel, Refused

Command = Callable[..., Said]
SECTIONS = ("versions", "system", "processor", "memory", "disks", "GPU", "kernels", "environment")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and no temporary files; one small file of kernels; nothing chosen in the environment, and no
    network."""
    for name in (build.OFF, build.MARCH, build.AMX):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "SIGNATURES", {"logprobs": load.SIGNATURES["logprobs"]})
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    return tmp_path / "cache"


def told(*verdicts: Verdict) -> Any:
    """In the place of `proof.trial`: verdicts without a process."""
    left = iter(verdicts)

    class Trial:
        def of(self, library: Path) -> Verdict:
            return next(left)

    @contextmanager
    def trial(name: str, off: str) -> Iterator[Trial]:
        yield Trial()

    return trial


def wrong(report: Report) -> str:
    return "\n".join(f"{problem.what} -> {problem.do}" for problem in report.problems)


# As a whole


def test_what_stands_where_nothing_was_compiled(topwork: Command, cache: Path) -> None:
    said = topwork("doctor", "--quick")
    titles = [line for line in said.out.splitlines() if line in SECTIONS]
    assert titles == list(SECTIONS)
    for name in ("topwork", "python", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"):
        assert any(line.split()[:1] == [name] for line in said.out.splitlines()), name
    assert "not compiled and tried yet: logprobs; topwork doctor without --quick does that" in said.out
    assert "loading torch" in said.err
    assert not cache.exists(), "nothing was compiled, and nothing made"


@needs_compiler
def test_kernels_are_compiled_and_tried(topwork: Command, cache: Path) -> None:
    said = topwork("doctor", "--json")
    assert "compiling and trying C kernels" in said.err
    found = json.loads(said.out)
    (kernel,) = found["kernels"]
    assert kernel["name"] == "logprobs"
    assert kernel["compiled"] == "for this processor"
    assert kernel["proved"].endswith("Z")
    assert kernel["refused"] == []
    assert Path(kernel["path"]).parent == cache / "native"
    assert said.code == int(bool(found["problems"]))
    assert found["memory"]["free_bytes"] <= found["memory"]["total_bytes"]
    again = topwork("doctor", "--quick")
    assert f"logprobs.c               compiled for this processor, proved right {kernel['proved']}".split() == next(
        line.split() for line in again.out.splitlines() if "logprobs.c" in line
    )


@needs_compiler
def test_what_was_refused_is_told_with_its_reason_and_tried_again_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "trial", told(Verdict("refused", "computes wrong sums"), Verdict("right")))
    for quick in (False, True):
        report = doctor(quick)
        assert report.exit_code == 1
        assert (
            "logprobs.c compiled for this processor is not used: it computes wrong sums -> topwork doctor --again"
            in (wrong(report))
        )
        assert report.kernels[0].compiled is not None
        assert report.kernels[0].compiled != "for this processor"
        assert "not for this processor: it computes wrong sums" in report.as_text()
    monkeypatch.setattr(proof, "trial", told(Verdict("right")))
    assert doctor(again=True).kernels[0].compiled == "for this processor"
    assert "logprobs" not in wrong(doctor(quick=True))


@needs_compiler
def test_kernels_among_temporary_files_are_seen_and_tried_again_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(proof, "trial", told(Verdict("refused", "computes wrong sums"), Verdict("right")))
    first = doctor().kernels[0]
    assert first.compiled is not None
    assert Path(str(first.path)).is_relative_to(tmp_path / f"topwork-{os.getuid()}")
    (kernel,) = doctor(quick=True).kernels
    assert (kernel.compiled, kernel.path, kernel.proved) == (first.compiled, first.path, first.proved)
    assert [refused.why for refused in kernel.refused] == ["computes wrong sums"]
    assert f"it lies in {Path(str(first.path)).parent}, for want of a cache" in kernel.note
    monkeypatch.setattr(proof, "trial", told(Verdict("right")))
    assert doctor(again=True).kernels[0].compiled == "for this processor"
    assert doctor(quick=True).kernels[0].refused == ()


@needs_compiler
def test_all_that_was_refused_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind a way of which nothing is known: the operating system may have begun to allow AMX."""
    ways = [Variant(name, (f"-D{name}",)) for name in ("one", "two", "three")]
    monkeypatch.setattr(build, "variants", lambda _: ways[1:])
    monkeypatch.setattr(proof, "trial", told(Verdict("refused", "is wrong"), Verdict("right")))
    assert doctor().kernels[0].compiled == "three"
    monkeypatch.setattr(build, "variants", lambda _: ways)
    monkeypatch.setattr(proof, "trial", told(Verdict("refused", "is wrong"), Verdict("right")))
    assert doctor(again=True).kernels[0].compiled == "two"


def test_options_that_contradict_each_other(topwork: Command) -> None:
    said = topwork("doctor", "--quick", "--again")
    assert said.code == 2
    assert "give one of them" in said.err


# What is wrong


def test_without_a_compiler(topwork: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    said = topwork("doctor")
    assert said.code == 1
    assert "wrong: there is no C compiler that runs" in said.out
    assert "apt install gcc" in said.out
    assert said.out.count("wrong: ") == said.out.count("what to do: ")
    assert "plain torch does its work" in said.out


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo mycc 1.0 && exit 0\necho "no room for it" >&2; exit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    report = doctor()
    assert report.facts["compiler"]["version"] == "mycc 1.0"
    assert "logprobs.c cannot be compiled or loaded: no room for it -> Set TOPWORK_CACHE" in wrong(report)


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "file" / "below"))
    report = doctor(quick=True)
    assert f"the cache {tmp_path / 'file' / 'below'} cannot be written -> Set TOPWORK_CACHE" in wrong(report)


def test_what_topwork_amx_may_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.AMX, "on")
    assert "TOPWORK_AMX is 'on', expected off or emulated -> unset it" in wrong(doctor(quick=True))


def test_kernels_that_were_switched_off_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.OFF, "1")
    report = doctor()
    assert report.kernels == [Kernel("logprobs", None, note="switched off by TOPWORK_NO_NATIVE")]
    assert "logprobs" not in wrong(report)


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    report = doctor()
    assert report.exit_code == 1
    assert "torch cannot be imported (ModuleNotFoundError" in wrong(report)
    assert "GPU" not in report.as_text().splitlines()
    json.dumps(report.as_json())


def test_a_hub_that_cannot_be_imported(topwork: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for damaged in ("huggingface_hub", "huggingface_hub.constants"):
        with monkeypatch.context() as changed:
            changed.setitem(sys.modules, damaged, None)
            said = topwork("doctor", "--quick")
        assert said.code == 1
        assert "wrong: huggingface_hub cannot be imported (ModuleNotFoundError" in said.out
        assert "Hub's cache" not in said.out
        assert "logprobs.c" in said.out


def test_a_compiler_that_is_named_with_spaces_alone_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    usual = doctor(quick=True).facts["compiler"]
    monkeypatch.setenv("CC", " ")
    report = doctor(quick=True)
    assert report.facts["compiler"] == usual
    assert not report.kernels[0].error or usual["command"] is None


FACTS: dict[str, Any] = {
    "versions": dict.fromkeys(software.NEEDED, "1"),
    "compiler": {"command": "cc", "version": "cc 1", "why": ""},
    "disks": [{"what": "cache", "path": "/c", "is_there": True, "writable": True, "free_bytes": 1 << 40}],
    "processor": {"quota_cores": None},
    "threads": 8,
}
CARD = {"cards": [], "torch_built_for": "CUDA 12.8", "driver": None, "seen": True, "why": ""}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ""),
        ({"versions": {**FACTS["versions"], "transformers": None}}, "transformers is not installed"),
        ({"disks": [{**FACTS["disks"][0], "free_bytes": 10**6}]}, "the disk of the cache (/c) has 1 MB left"),
        ({"processor": {"quota_cores": 1.5}}, ""),
        ({"gpu": CARD}, "has an NVIDIA GPU that torch cannot use: its driver is not loaded"),
        ({"gpu": {**CARD, "driver": "550.1", "why": "too old"}}, "has an NVIDIA GPU that torch cannot use (too old)"),
        ({"gpu": {**CARD, "torch_built_for": "CPUs alone"}}, "has an NVIDIA GPU, and torch is built for CPUs alone"),
        ({"gpu": {**CARD, "seen": False}}, ""),
        ({"gpu": {**CARD, "cards": [{"name": "H200"}]}}, ""),
    ],
)
def test_each_fault_alone(changed: dict[str, Any], expected: str) -> None:
    found = [problem.what for problem in module._problems({**FACTS, **changed}, [])]
    assert len(found) == int(bool(expected))
    assert expected in "".join(found)


def test_a_gpu_build_without_any_gpu_is_told_and_no_fault() -> None:
    notes = list(module._notes({**FACTS, "gpu": {**CARD, "seen": False}}, []))
    assert notes == ["torch is built for CUDA 12.8, and no GPU is seen here; everything runs on the processor"]
    assert list(module._notes({**FACTS, "gpu": {**CARD, "seen": False, "torch_built_for": "CPUs alone"}}, [])) == []


@pytest.mark.parametrize(("quota", "told"), [(None, False), (8.0, False), (7.5, False), (1.5, True)])
def test_more_threads_than_a_container_has_time_for_are_told_and_no_fault(quota: float | None, told: bool) -> None:
    notes = list(module._notes({**FACTS, "processor": {"quota_cores": quota}}, []))
    assert len(notes) == int(told)
    if told:
        assert "torch would use 8 threads, where this container has 1.5 cores' time" in notes[0]
        assert "OMP_NUM_THREADS=2" in notes[0]


def test_amx_that_is_refused_by_the_system_has_a_cure_of_its_own() -> None:
    refused = Refused("for AMX", "may not use AMX's registers: the operating system refuses them to this process (x)")
    (problem,) = module._problems(FACTS, [Kernel("grouped", "otherwise", refused=(refused,))])
    assert "TOPWORK_AMX=off" in problem.do


# What is told


def test_secrets_are_not_told() -> None:
    given = {
        "HF_TOKEN": "hf_abc", "HUGGING_FACE_HUB_TOKEN": "hf_abc", "TOPWORK_SERVE_KEY": "k", "HF_HOME": "/data/hf",
        "https_proxy": "http://me:hf_abc@proxy:3128", "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "2", "AWS_SECRET_ACCESS_KEY": "k", "HOME": "/root",
    }  # fmt: skip
    found = software.environment(given)
    assert "hf_abc" not in str(found)
    assert found == {
        "HF_HOME": "/data/hf", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "set", "HUGGING_FACE_HUB_TOKEN": "set",
        "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true", "TOPWORK_SERVE_KEY": "set",
        "https_proxy": "http://…@proxy:3128",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "Ftp_Proxy"]
)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("user:secret@proxy:3128", "…@proxy:3128"),
        ("secret@proxy", "…@proxy"),
        ("http://user:secret@proxy:3128/", "http://…@proxy:3128/"),
        ("http://user:secret@secret@proxy", "http://…@proxy"),
        ("user:secret@secret@proxy", "…@proxy"),
        ("http://user:secret/secret@proxy", "http://…@proxy"),
        ("http://user:secret secret@proxy", "http://…@proxy"),
        ("user:secret://secret@proxy", "…@proxy"),
        ("socks5h://:secret@[::1]:1080", "socks5h://…@[::1]:1080"),
        ("http://proxy:3128", "http://proxy:3128"),
        ("proxy:3128", "proxy:3128"),
    ],
)
def test_of_a_proxy_neither_user_nor_password_is_told(name: str, value: str, expected: str) -> None:
    assert software.environment({name: value}) == {name: expected}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://user:secret@mirror/simple", "https://…@mirror/simple"),
        ("https://user:secret@secret@mirror/simple", "https://…@mirror/simple"),
        ("https://user:secret/secret@mirror", "https://…@mirror"),
        ("https://secret@mirror https://me:secret@other", "https://…@mirror https://…@other"),
        ("user:secret@mirror", "…@mirror"),
        ("https://mirror:8080/simple", "https://mirror:8080/simple"),
        ("/opt/gcc@12/lib:/opt/openssl@3/lib", "/opt/gcc@12/lib:/opt/openssl@3/lib"),
    ],
)
def test_nor_of_another_address(value: str, expected: str) -> None:
    for name in ("HF_ENDPOINT", "TORCH_INDEX_URL", "LD_LIBRARY_PATH"):
        assert software.environment({name: value}) == {name: expected}


def test_hosts_without_a_proxy_are_told() -> None:
    for name in ("no_proxy", "NO_PROXY"):
        assert software.environment({name: "localhost,.here"}) == {name: "localhost,.here"}


def test_every_variable_that_topwork_reads_is_told() -> None:
    for name in ("TOPWORK_CACHE", "TOPWORK_AMX", "TOPWORK_MARCH", "TOPWORK_NO_NATIVE", "TOPWORK_ATTENTION", "CC"):
        assert software.environment({name: "x"}) == {name: "x"}


def test_a_token_in_the_environment_is_in_no_output(topwork: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    for form in ([], ["--json"]):
        said = topwork("doctor", "--quick", *form)
        assert "HF_TOKEN" in said.out
        assert "hf_abcdef" not in said.out + said.err


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


INTEL = (
    "processor\t: 0\nmodel name\t: Xeon 9\nflags\t\t: avx2 fma hypervisor avx512f amx_tile amx_bf16\n\nprocessor\t: 1\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU implementer\t: 0x41\n"


def test_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = "sys/devices/system/cpu/cpu0/topology/thread_siblings_list"
    files = {"proc/cpuinfo": INTEL, siblings: "0,64\n", ".dockerenv": "", "sys/class/dmi/id/product_name": "KVM\n"}
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    found = machine.processor(written(tmp_path / "intel", files))
    assert (found["name"], found["threads_per_core"], found["virtual"]) == ("Xeon 9", 2, True)
    assert (found["machine"], found["container"], found["quota_cores"]) == ("KVM", "docker", None)
    assert found["features"] == {"AVX2": True, "FMA": True, "AVX-512": False, "AVX-512 BF16": False, "AMX": True}
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    found = machine.processor(written(tmp_path / "arm", {"proc/cpuinfo": ARM, siblings: "0-3\n"}))
    assert (found["threads_per_core"], found["virtual"]) == (4, False)
    assert found["features"] == {"SVE": True, "bf16": True}
    nothing = machine.processor(tmp_path / "nothing")
    assert (nothing["features"], nothing["threads_per_core"]) == ({}, None)
    assert nothing["logical"] == os.cpu_count()


def test_a_gpu_that_torch_does_not_see(tmp_path: Path) -> None:
    assert not machine.cards(tmp_path)["seen"]
    other = {"sys/bus/pci/devices/0/vendor": "0x1002", "sys/bus/pci/devices/0/class": "0x030000"}
    sound = {"sys/bus/pci/devices/0/vendor": "0x10de", "sys/bus/pci/devices/0/class": "0x040300"}
    for number, files in enumerate((other, sound)):
        assert not machine.cards(written(tmp_path / str(number), files))["seen"]
    for number, files in enumerate(({**other, "sys/bus/pci/devices/0/vendor": "0x10de"}, {"dev/nvidia0": ""}), 2):
        assert machine.cards(written(tmp_path / str(number), files))["seen"]
    version = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2026\nGCC version: 12\n"
    )
    assert machine.cards(written(tmp_path / "4", {"proc/driver/nvidia/version": version}))["driver"] == "550.54.15"


def test_memory_and_disks(tmp_path: Path) -> None:
    meminfo = "MemTotal:       16000 kB\nMemAvailable:   4000 kB\n"
    found = machine.memory(written(tmp_path, {"proc/meminfo": meminfo}))
    assert (found["total_bytes"], found["free_bytes"], found["cgroup_limit_bytes"]) == (16_384_000, 4_096_000, None)
    place = machine.disk("cache", tmp_path / "not" / "there")
    assert (place["is_there"], place["writable"]) == (False, True)
    assert place["free_bytes"] > 0
