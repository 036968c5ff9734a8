"""Hundreds of requests while adapters of all methods come, are swapped and go: none is lost, none is answered by
another version than at its admission, nothing stays of what went. `benchmarks/soak.py` has ten thousand."""

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.live import Live, check_balance, live

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REQUESTS, CLIENTS, STEADY, OTHERS = 400, 16, 8, 8


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A base, and adapters that sign what they say."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import soak_adapters

    signers = soak_adapters.Signers(soak_adapters.make_base(tmp_path / "base"))
    signers.signed = signers.make(tmp_path / "adapters", STEADY + OTHERS)
    yield signers
    for name in {"common", "soak_adapters", "soak_clients", "server_process"} - before:
        sys.modules.pop(name, None)


def parts_of(served: Live) -> list[Any]:
    """What stands in the base for adapters, looked at weakly."""
    adapters = served.registry.adapters
    return [weakref.ref(part) for name in adapters.configs for part in adapters.parts(name).values()]


@pytest.mark.parametrize("resident", [None, 6])
def test_adapters_come_and_go_under_load(made: Any, tmp_path: Path, resident: int | None) -> None:
    from server_process import connected
    from soak_clients import Soak

    steady, others = made.signed[:STEADY], made.signed[STEADY:]
    with live({
        "model": {"model_name_or_path": made.base.name, "dtype": "float32", "device": "cpu"},
        "served_model_name": "base", "adapters_folder": str(tmp_path / "adapters"),
        "engine": {"resident_adapters": resident, "max_waiting": 512},
    }) as served:  # fmt: skip
        soak = Soak(served.address, others, "base", made.base_answers)
        soak.room_may_lack = resident is not None
        soak.answers = {**soak.answers, **{one.content: one.answers for one in steady}}
        connection = connected(served.address)
        for number, one in enumerate(steady):
            soak.load(f"n{number}", one, connection)
        changing = [f"c{number}" for number in range(4)]
        for name in changing:
            soak.load(name, others[0], connection)
        soak.run(REQUESTS, CLIENTS, changing)
        assert not soak.told.wrong
        assert sum(soak.told.requests.values()) == REQUESTS
        assert soak.told.requests["answered"] > REQUESTS // 2
        assert min(soak.told.changes[how] for how in ("loaded", "swapped", "unloaded")) > 0
        check_balance(served)
        parts = parts_of(served)
        assert len(served.registry.versions()) <= (resident or STEADY + OTHERS)
        for name in soak.names.all():
            if soak.names.loaded(name):
                soak.unload(name, connection)
        connection.close()
        check_balance(served)
        assert not served.registry.versions()
        assert served.registry.memory_bytes == 0
        gc.collect()
        assert parts
        assert not [part for part in parts if part() is not None]
