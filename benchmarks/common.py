"""What the benchmarks share: the job both sides do, the rows, one measurement as one JSON line, and the record.

A measurement is one fresh process (`python -m peers.NAME JOB.json`, in this folder), because resident memory has only a
process-wide peak. The process that starts them must stay free of torch: on Linux a child begins with the peak of the
process it was forked from.
"""

import csv
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
WARM_UP = 2
"""Steps that are not counted."""
MAX_ROWS = 2000
INTENT = "Classify the intent of this banking query: "
PACKAGES = (
    "topwork", "torch", "transformers", "tokenizers", "peft", "trl", "bitsandbytes", "accelerate", "datasets",
    "xllamacpp",
)  # fmt: skip

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Job:
    """The same work for every system.

    rows     a file of chats, the rows in the order of the data set
    ordered  the same chats in the order in which Topwork's seed visits them
    initial  a PEFT folder with the adapter's first weights
    tokens_per_pass  how many tokens Topwork runs at a time; the rows of a step then fill one pass
    """

    model_name: str
    model_dir: str
    rows: str
    ordered: str
    initial: str
    steps: int
    batch: int
    tokens_per_pass: int | None = None
    seed: int = 0
    r: int = 16
    lora_alpha: int = 32
    learning_rate: float = 2e-4
    max_length: int = 512
    max_grad_norm: float = 1.0

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str) -> "Job":
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def read_rows(name: str, data_dir: Path) -> list[Chat]:
    """The first 2,000 rows of gsm8k or banking77 (shuffled, since its file is sorted by intent) as chats."""
    if name == "gsm8k":
        with open(data_dir / "gsm8k" / "train.jsonl", encoding="utf-8") as lines:
            pairs = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    else:
        with open(data_dir / "banking77" / "train.csv", encoding="utf-8", newline="") as lines:
            pairs = [(INTENT + row["text"], row["category"]) for row in csv.DictReader(lines)]
        random.Random(0).shuffle(pairs)
    return [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in pairs[:MAX_ROWS]
    ]


def write_chats(path: Path, chats: Sequence[Chat]) -> None:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")


def read_chats(path: str | Path) -> list[Chat]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line in lines]


def measurement(
    losses: Sequence[float], grad_norms: Sequence[float], tokens: Sequence[int], seconds: Sequence[float], **more: Any
) -> dict[str, Any]:
    """One process's figures, from lists with an entry per step. `tokens` counts real ones, never padding."""
    counted = sum(tokens[WARM_UP:]) / sum(seconds[WARM_UP:])
    return {
        "tokens_per_second": round(counted, 1),
        "peak_mib": peak_mib(),
        "tokens": list(tokens),
        "seconds": [round(value, 4) for value in seconds],
        "losses": list(losses),
        "grad_norms": list(grad_norms),
        **more,
    }


def peak_mib() -> int:
    """The largest resident size that this process had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def model_argument(model: str) -> str:
    """An alias or Hub id as it is, a folder so that processes in another folder find it."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def model_title(name: str) -> str:
    """How a record calls a model: a folder by its name alone."""
    return Path(name).name if Path(name).is_dir() else name


def threads() -> int:
    """How many threads every measured process gets: all cores, or what OMP_NUM_THREADS asks for."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def run_process(module: str, *arguments: str, variables: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Run `python -m module`, and read the last line it prints as JSON. {"error": …} where it failed.

    `variables` are set in its environment beside those of this process.
    """
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads()), **variables}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=BENCHMARKS, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        told = done.stderr.strip().splitlines()
        return {"error": f"exit code {done.returncode}: {told[-1] if told else 'no output'}"}
    return json.loads(lines[-1])


def run_processes(module: str, options: Sequence[str], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`python -m module OPTIONS --process NAME` for each name, one after the other. Exits with what failed."""
    done = {name: run_process(module, *options, "--process", name) for name in names}
    failed = [f"{name}: {result['error']}" for name, result in done.items() if "error" in result]
    if failed:
        sys.exit("\n".join(failed))
    return done


def surroundings() -> dict[str, Any]:
    """What a figure depends on: versions, machine, commit and date."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "memory_gib": _memory_gib(), "threads": threads()},
    }


def surroundings_text(around: dict[str, Any]) -> str:
    """The same as a paragraph."""
    machine, versions = around["hardware"], around["versions"]
    return (
        f"{around['date']}, commit {around['commit']}. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['threads']} threads. "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + "."
    )


def write_record(out: Path, record: dict[str, Any], text: str) -> None:
    """OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # lists of figures on one line each, so that the file can be read
    figures = re.compile(r"\[\s+([-+\d.,eE\s]+?)\s+\]")
    plain = figures.sub(lambda match: f"[{' '.join(match[1].split())}]", json.dumps(record, indent=1))
    out.with_name(out.name + ".json").write_text(plain + "\n", encoding="utf-8")
    out.with_name(out.name + ".md").write_text(text, encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _commit() -> str:
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=BENCHMARKS, capture_output=True, text=True).stdout.strip()
        except OSError:  # it is not installed
            return ""

    # results of earlier measurements are no part of what is measured
    changed = git("status", "--porcelain", "--", ":/src", ":/benchmarks/*.py", ":/benchmarks/peers")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" and uncommitted changes" if changed else "")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
