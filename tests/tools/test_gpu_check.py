"""tools/gpu_check.sh: a part that hangs or crashes costs only itself; all of it runs through on a CPU."""

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path

import pytest

PARTS = {
    "kernels": "print('looking'); raise SystemExit('the compiler is gone')",
    "smollm2": "import subprocess; subprocess.run(['sh', '-c', f'exec 3>{sys.argv[1]}.held; sleep 60'])",
    "llama8b": 'open(sys.argv[1], \'w\').write(\'{"checks": [{"name": "a loss", "found": 2.0, "limit": 1.0, '
    '"held": false}], "failed": {"chats": "OutOfMemoryError: none left"}}\'); sys.exit(3)',
    "adapters": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "memory": "import os; print(os.environ['GPU_CHECK_SECONDS'])",
}
"""What each part does here, in the place of its own."""


@pytest.fixture
def driver(scripts):
    return import_module("gpu_check")


def test_a_part_that_hangs_or_crashes_costs_only_itself(driver, tmp_path: Path) -> None:
    commands = {
        name: [sys.executable, "-c", f"import sys; {code}", str(tmp_path / f"{name}.json")]
        for name, code in PARTS.items()
    }
    held = tmp_path / "smollm2.json.held"
    os.mkfifo(held)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    limits = {"kernels": 60.0, "smollm2": 2.0, "llama8b": 60.0, "adapters": 60.0, "memory": 60.0}
    check = driver.Check(tmp_path, [driver.Part(name) for name in PARTS], driver.machine(), tiny=True)
    driver.run_check(check, limits, sum(limits.values()) - limits["kernels"], commands)  # so little is handed on
    states = {part.name: part.state for part in check.parts}
    assert states == {
        "kernels": "failed (exit status 1)", "smollm2": "timed out", "llama8b": "wrong",
        "adapters": "failed (exit status -11)", "memory": "passed",
    }  # fmt: skip
    assert not check.passed
    text = (tmp_path / "summary.md").read_text("utf-8")
    assert "the compiler is gone" in text
    assert "llama8b: a loss: 2, at most 1" in text
    assert "OutOfMemoryError: none left" in text
    record = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert [part["state"] for part in record["parts"]] == list(states.values())
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert float(log.splitlines()[-1]) == record["parts"][-1]["limit"]
    assert nobody_writes(reader)  # what the part that hung had started is ended too


def nobody_writes(reader: int) -> bool:
    """Whether the last process that held a FIFO open for writing ends within seconds."""
    for _ in range(100):
        try:
            return os.read(reader, 1) == b""
        except BlockingIOError:
            time.sleep(0.1)
    return False


def test_a_part_gets_what_those_before_it_left_and_never_what_those_after_it_need(driver, tmp_path: Path) -> None:
    names = ("kernels", "smollm2", "llama8b")
    check = driver.Check(tmp_path, [driver.Part(name) for name in names], driver.machine(), tiny=True)
    commands = {name: [sys.executable, "-c", ""] for name in names}
    driver.run_check(check, {"kernels": 30.0, "smollm2": 20.0, "llama8b": 10.0}, 60.0, commands)
    first, second, third = (part.limit for part in check.parts)
    assert 28 < first <= 30
    assert 40 < second <= 50
    assert 50 < third <= 60
    assert check.passed


def test_after_the_deadline_nothing_begins(driver, tmp_path: Path) -> None:
    check = driver.Check(tmp_path, [driver.Part("kernels")], driver.machine(), tiny=True)
    driver.run_check(check, {"kernels": 30.0}, 0.5, {"kernels": ["false"]})
    assert check.parts[0].state == "not reached"
    assert "| kernels | not reached |" in (tmp_path / "summary.md").read_text("utf-8")


def test_the_limits_fit_into_eight_minutes(driver) -> None:
    assert sum(driver.LIMITS.values()) <= driver.DEADLINE <= 450
    assert {f"gpu.{name}" for name in driver.LIMITS} == {
        command[2] for command in driver.commands_of(Path("out"), tiny=False).values()
    }


def test_both_sides_call_the_exit_status_and_the_limit_alike(driver) -> None:
    result = import_module("gpu.result")
    assert (driver.NOT_HELD, driver.SECONDS) == (result.NOT_HELD, result.SECONDS)


def test_a_figure_that_is_no_number_does_not_hold(scripts, tmp_path: Path) -> None:
    import torch

    card = import_module("gpu.card").Card(torch.device("cpu"))
    result = import_module("gpu.result").Result(tmp_path / "part.json", card, tiny=True)
    assert not result.held  # nothing was looked at
    result.check("a loss", 1.0, 1.0)
    assert result.held
    with result.section("one that fails"):
        raise ValueError("no room")
    result.check("another", float("nan"), 1.0)
    assert not result.held
    written = json.loads((tmp_path / "part.json").read_text("utf-8"))
    assert [check["held"] for check in written["checks"]] == [True, False]
    assert written["checks"][1]["found"] == "nan"
    assert written["failed"] == {"one that fails": "ValueError: no room"}


def test_what_there_is_no_time_for_is_not_begun(scripts, monkeypatch, tmp_path: Path) -> None:
    import torch

    module = import_module("gpu.result")
    monkeypatch.setenv(module.SECONDS, "20")
    result = module.Result(tmp_path / "part.json", import_module("gpu.card").Card(torch.device("cpu")), tiny=True)
    assert result.in_time("a short one", 5)
    assert not result.in_time("a long one", 16)
    assert json.loads((tmp_path / "part.json").read_text("utf-8"))["told"] == ["not reached: a long one"]


REPORT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_a" name="one"/>
<testcase classname="tests.ops.test_a" name="two"><failure message="assert 1 == 2&#10;more">…</failure></testcase>
<testcase classname="" name="tests.data.test_b"><error message="collection failure">
E   ModuleNotFoundError: No module named 'datasets'</error></testcase>
<testcase classname="tests.ops.test_c" name="three"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


def test_a_test_file_that_lacks_a_package_is_left_out_and_no_failure(scripts) -> None:
    found = import_module("gpu.marked").outcome(REPORT)
    assert found == {
        "run": 2, "failed": ["tests.ops.test_a::two: assert 1 == 2"],
        "lacking": ["tests.data.test_b was left out: datasets is not installed"], "skipped": {"no CUDA device": 1},
    }  # fmt: skip


def test_every_file_of_cases_is_found(scripts, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(scripts / "tests"))
    runs = import_module("gpu.marked").case_runs()
    assert {"triton_cases", "triton_grouped_cases", "triton_layer_cases:loss"} <= set(runs)
    files = {run.partition(":")[0] for run in runs}
    for file in (scripts / "tests" / "ops").glob("triton_*cases.py"):
        assert (file.stem in files) == ("device: torch.device" in file.read_text("utf-8"))


def test_time_in_which_the_card_had_work(scripts) -> None:
    covered = import_module("gpu.profile").covered
    assert covered([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
    assert covered([]) == 0


@pytest.mark.slow
def test_all_of_it_runs_through_on_a_cpu(scripts, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUT": str(tmp_path / "unused")}
    command = ["bash", str(scripts / "tools" / "gpu_check.sh"), str(tmp_path / "out"), "--tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    parts = ["adapters", "kernels", "llama8b", "memory", "smollm2"]
    assert files == sorted([*(f"out/{name}.json" for name in (*parts, "summary")), "out/log.txt", "out/summary.md"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert {part["name"]: part["state"] for part in summary["parts"]} == dict.fromkeys(parts, "passed")
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text("utf-8")) for name in parts}
    assert not any(part["measured"] or part["failed"] for part in found.values())
    assert {"ceilings", "operations", "cases", "grouped", "tests"} <= found["kernels"].keys()
    assert {"golden_steps", "chats", "chats_memory"} <= found["smollm2"].keys()
    tables = {f"{held}{table}" for held in ("lora", "qlora") for table in ("", "_profile", "_memory")}
    assert tables | {"chats"} <= found["llama8b"].keys()
    assert len(found["llama8b"]["lora_profile"]["top"]) == 10
    assert {"members", "generation"} <= found["adapters"].keys()
    assert {"llama8b, lora_memory", "llama8b, qlora_memory", "smollm2, chats_memory"} <= found["memory"].keys()
    assert "Tiny shapes on a CPU" in done.stdout
    assert done.stdout.count("not measured") == 5  # the goals


def test_where_a_card_is_waited_for_is_told(scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of it in a mode of its own, which is left again."""
    import torch

    found = import_module("gpu.profile")
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    card = import_module("gpu.card").Card(torch.device("cuda"))

    def step() -> None:
        assert modes == ["warn"]
        for text in ("called a synchronizing CUDA operation", "something else"):
            warnings.warn(text, stacklevel=1)
        raise KeyError

    def broken() -> None:
        with contextlib.suppress(KeyError):
            step()

    assert [place.partition(":")[0] for place in found.waits(card, broken)] == ["test_gpu_check.py"]
    assert modes == ["warn", "default"]
    modes.clear()
    with pytest.raises(KeyError):
        found.waits(card, step)
    assert modes == ["warn", "default"]
