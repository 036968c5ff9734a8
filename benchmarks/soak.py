"""Ten thousand requests by sixteen clients while adapters are loaded, swapped and unloaded, on one server.

    python benchmarks/soak.py [--requests 10000] [--warm-up 8000] [--clients 16] [--adapters 200] [--changing 16]
        [--versions 48] [--resident N] [--out OUT]

Adapters of all methods on a tiny random base; each signs its answers, so that one which was given by another version
than at its admission is seen, as is one over keys and values of another (`soak_adapters.py`). Some clients go away in
the middle. The server's resident memory is looked at twice a second once so many requests have warmed it up.
Exits with 1 where anything was lost or wrong. Writes OUT.json and OUT.md
(benchmarks/results/soak).
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from server_process import ServerProcess, ask, connected
from soak_adapters import KINDS, Signed, Signers, make_base
from soak_clients import Soak
from workers import resident_mib

from common import BENCHMARKS, surroundings, surroundings_text, table, write_record

LOOK_SECONDS = 0.5
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


class Memory:
    """A process's, from its beginning to its end: (seconds, MiB)."""

    def __init__(self, process: int) -> None:
        self.seen: list[tuple[float, float]] = []
        self._process, self._over, self._began = process, threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def quarters(self) -> list[float]:
        """The median of each quarter of the time."""
        values = [mib for _, mib in self.seen]
        cuts = [len(values) * at // 4 for at in range(5)]
        return [round(median(values[start:stop] or [0.0]), 1) for start, stop in zip(cuts, cuts[1:])]

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self.seen.append((round(time.monotonic() - self._began, 1), round(resident_mib(self._process), 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=8000, help="requests of the same kind before these")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=200, help="loaded from the beginning to the end")
    parser.add_argument("--changing", type=int, default=16, help="names that are loaded, swapped and unloaded")
    parser.add_argument("--versions", type=int, default=48, help="adapters that these stand for in turn")
    parser.add_argument("--resident", type=int, help="so many adapters stay in memory; left out, all do")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "soak", help="without its ending")
    given = parser.parse_args()
    asked = {
        key: getattr(given, key)
        for key in ("requests", "warm_up", "clients", "adapters", "changing", "versions", "resident")
    }
    record: dict[str, Any] = {"question": asked, "surroundings": surroundings(), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as work:
        record |= soaked(given, Path(work))
    write_record(given.out, record, text(record))
    print(text(record))
    sys.exit(1 if record["wrong"] else 0)


def soaked(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The server, loaded to the full, asked, and looked at."""
    base = make_base(work / "base")
    signers = Signers(base)
    signed = signers.make(work / "adapters", given.adapters + given.versions)
    print(f"{len(signed)} adapters of {len(KINDS)} kinds were made", flush=True)
    options = [str(base), "--dtype", "float32", "--adapters-folder", str(work / "adapters")]
    # answers are remembered for votes on them, 50,000 if nobody says so: fewer, and it is soon as full as it gets
    options += ["--set", "engine.max_waiting=512", "--set", "feedback.answers_remembered=1000"]
    options += ["--set", f"engine.resident_adapters={given.resident}"] if given.resident else []
    server = ServerProcess(options)
    try:
        soak = Soak(server.address, signed, base.name, signers.base_answers)
        memory = [round(resident_mib(server.process), 1)]
        steady = load_all(soak, signed[: given.adapters])
        memory.append(round(resident_mib(server.process), 1))
        soak.signed = signed[given.adapters :]
        changing = [f"c{number}" for number in range(given.changing)]
        connection = connected(server.address)
        for name in changing:
            soak.load(name, soak.signed[0], connection)
        soak.run(given.warm_up, given.clients, changing)
        watched, begun = Memory(server.process), time.perf_counter()
        soak.run(given.requests, given.clients, changing, seed=1)
        seconds = time.perf_counter() - begun
        watched.close()
        soak.check_all(steady)
        connection = connected(server.address)  # the server has closed what was idle meanwhile
        gauges = balance(connection)
        for name in [*steady, *(name for name in changing if soak.names.loaded(name))]:
            soak.unload(name, connection)
        memory.append(round(resident_mib(server.process), 1))
        wrong = soak.told.wrong + [f"{name} is {value} in the end" for name, value in gauges.items() if value]
        code = server.ended(signal.SIGTERM)
        wrong += [f"the server ended with {code}"] if code else []
    finally:
        server.kill()
    return {
        "seconds": seconds, "requests": dict(soak.told.requests), "changes": dict(soak.told.changes),
        "wrong": wrong[:50],
        "memory_mib": dict(zip(("begun", "with all adapters", "with none again"), memory)),
        "quarters_mib": watched.quarters(), "seen": watched.seen[:: max(1, len(watched.seen) // 60)],
    }  # fmt: skip


def load_all(soak: Soak, signed: list[Signed]) -> list[str]:
    """Under names of their own, each asked once."""
    connection = connected(soak.address)
    names = [f"n{number}" for number in range(len(signed))]
    for name, one in zip(names, signed):
        soak.load(name, one, connection)
    soak.check_all(names)
    connection.close()
    return names


def balance(connection: Any) -> dict[str, float]:
    """The server's own figures of what runs and is held, a moment after the last answer."""
    told, until = {}, time.monotonic() + 10
    while time.monotonic() < until:
        _, _, page = ask(connection, "/metrics")
        told = {
            name: sum(float(value) for value in re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE))
            for name in GAUGES
        }
        if not any(told.values()):
            break
        time.sleep(0.1)
    return told


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    asked, quarters = record["question"], record["quarters_mib"]
    changes = ", ".join(f"{count:,} {what}" for what, count in sorted(record["changes"].items()))
    stay = f"{asked['resident']} adapters in memory at once" if asked["resident"] else "all of them in memory"
    memory = ", ".join(f"{name} {value:,.0f}" for name, value in record["memory_mib"].items())
    parts = [
        f"# {asked['requests']:,} requests by {asked['clients']} clients while adapters come and go",
        f"{asked['adapters']} adapters of all methods that stay loaded, {stay}, and {asked['changing']} names that "
        f"stand for {asked['versions']} others in turn: {changes}, with {asked['warm_up']:,} requests of the same kind "
        f"before. {record['seconds']:.0f} seconds; load average {record['load_before']:.1f} before.",
        table(["requests, all", ""], [[what, f"{count:,}"] for what, count in sorted(record["requests"].items())]),
        f"Lost, or answered by another version than at its admission: {len(record['wrong'])}.",
        f"Resident memory, MiB: {memory}; by quarters of the {asked['requests']:,} requests "
        f"{', '.join(f'{value:,.1f}' for value in quarters)}.",
        *(["\n".join(f"- {wrong}" for wrong in record["wrong"])] if record["wrong"] else []),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
