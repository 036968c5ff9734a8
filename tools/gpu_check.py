"""Runs the parts of `tools/gpu_check.sh` one after the other, and keeps the summary.

Each part is a process of its own with a limit of its own, so that one that hangs or crashes costs only itself; what a
part leaves unused goes to the next. Everything is written as it comes. Exit status 0: every part ran, and all that had
to hold held. This process stays free of torch.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpu import NOT_HELD, SECONDS
from gpu.summary import as_markdown, machine

from topwork.common.files import write_json, write_text

LIMITS = MappingProxyType({"kernels": 170, "smollm2": 75, "llama8b": 110, "adapters": 75, "memory": 15})
"""The parts in order of what they tell, and the seconds of each; together below DEADLINE."""
DEADLINE = 450
"""Seconds in all; unpacking what was carried comes before, the summary after: eight minutes together."""
TINY_LIMITS = MappingProxyType(dict.fromkeys(LIMITS, 240))
INTERPRETED = MappingProxyType({"TRITON_INTERPRET": "1", "TOPWORK_NO_NATIVE": "1", "CUDA_VISIBLE_DEVICES": ""})
"""All kernels in Triton's interpreter, on a CPU."""
SHOWN_LINES = 15


@dataclass
class Part:
    """What became of a part: passed, wrong (it ran through, and something did not hold), failed, timed out, or not
    reached; for the last lines of a log that ended badly see `end`."""

    name: str
    state: str = "not reached"
    seconds: float = 0.0
    limit: float = 0.0
    end: list[str] = field(default_factory=list)


@dataclass
class Check:
    """A run of the check: where its files go, and its parts."""

    out: Path
    parts: list[Part]
    machine: dict[str, Any]
    tiny: bool

    def write(self) -> str:
        """summary.json and summary.md; returns the latter."""
        record = {"machine": self.machine, "tiny": self.tiny, "parts": [asdict(part) for part in self.parts]}
        write_json(self.out / "summary.json", record)
        text = as_markdown(record, self.out)
        write_text(self.out / "summary.md", text)
        return text

    @property
    def passed(self) -> bool:
        """Whether every part was reached and passed."""
        return all(part.state == "passed" for part in self.parts)


def run_check(
    check: Check, limits: Mapping[str, float], deadline: float, commands: Mapping[str, Sequence[str]]
) -> Check:
    """Run the parts by their commands. `deadline` seconds are all that there is; a part gets its limit and what those
    before it left, never what those after it need."""
    end = time.monotonic() + deadline
    check.write()
    for number, part in enumerate(check.parts):
        later = sum(limits[other.name] for other in check.parts[number + 1 :])
        part.limit = round(max(limits[part.name] / 2, end - time.monotonic() - later), 1)
        if time.monotonic() + 1 > end:
            break
        part.limit = min(part.limit, end - time.monotonic())
        part.state = "running"
        check.write()
        print(f"{part.name}: at most {part.limit:.0f} s", flush=True)
        run_part(part, commands[part.name], check.out / "log.txt", check.tiny)
        print(f"{part.name}: {part.state} after {part.seconds:.0f} s", flush=True)
        check.write()
    return check


def run_part(part: Part, command: Sequence[str], log: Path, tiny: bool) -> None:
    """One part, killed with all that it started when its time is over. What it prints goes to the log."""
    environment = {**os.environ, **(INTERPRETED if tiny else {}), SECONDS: str(part.limit)}
    start = time.monotonic()
    with open(log, "ab", buffering=0) as file:
        file.write(f"\n== {part.name}\n".encode())
        before = file.tell()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(part.limit)
            part.state = {0: "passed", NOT_HELD: "wrong"}.get(code, f"failed (exit status {code})")
        except subprocess.TimeoutExpired:
            part.state = "timed out"
        finally:
            stop(process)
            part.seconds = round(time.monotonic() - start, 1)
    if part.state != "passed":
        part.end = last_lines(log, before)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process and what it started, also where it has ended itself."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path, start: int) -> list[str]:
    """The last lines of a log from a byte on."""
    with open(log, "rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()[-SHOWN_LINES:]


def commands_of(out: Path, tiny: bool) -> dict[str, list[str]]:
    """What runs each part."""
    more = ["--tiny"] if tiny else []
    return {name: [sys.executable, "-m", f"gpu.{name}", str(out / f"{name}.json"), *more] for name in LIMITS}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help=f"some of the parts, comma-separated: {','.join(LIMITS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, to try the script")
    given = parser.parse_args()
    given.only = given.only.split(",") if given.only else list(LIMITS)
    if unknown := sorted(set(given.only) - set(LIMITS)):
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(LIMITS)}")
    return given


def main() -> int:
    given = arguments()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in LIMITS if name in given.only]
    for old in ["summary.md", "summary.json", "log.txt", *(f"{name}.json" for name in names)]:
        (out / old).unlink(missing_ok=True)
    check = Check(out, [Part(name) for name in names], machine(), given.tiny)
    limits = TINY_LIMITS if given.tiny else LIMITS
    deadline = sum(limits.values()) if given.tiny else DEADLINE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part is ended with this process
    run_check(check, limits, deadline, commands_of(out, given.tiny))
    print(check.write())
    return 0 if check.passed else 1


if __name__ == "__main__":
    sys.exit(main())
