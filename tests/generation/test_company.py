"""What an answer says depends on its own request alone: the same tokens by itself, in any company and order, however
prompts are cut into passes, after giving way, and where its prompt begins with what is cached."""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from generation.test_module_runner import CONFIGS, WILD
from reference.families import randomise, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import RequestError
from topwork.generation import runners
from topwork.generation.engine import Engine, EngineSettings
from topwork.generation.module_runner import ModuleRunner
from topwork.generation.native_runner import NativeRunner
from topwork.generation.requests import Request
from topwork.generation.sampling import Sampling
from topwork.models.base import Base
from topwork.ops.native import load as native
from topwork.ops.paged import BLOCK

pytestmark = pytest.mark.slow

NAMES = [None, "lora", "dora", "ia3", "prefix", "prompt", "saved"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALONE = EngineSettings(batch_size=1)
SETTINGS = {
    "together": EngineSettings(),
    "three at once": EngineSettings(batch_size=3, max_batch_tokens=70),
    "few tokens a pass": EngineSettings(max_batch_tokens=3),
}


RUNNERS = ["native", "modules", "both"]
"""Both: some adapters by the one, others by the other."""


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who runs rows, whatever this machine would choose."""
    if request.param != "modules" and native.compiled("decode") is None:
        pytest.skip("no C compiler, or TOPWORK_NO_NATIVE")
    if request.param == "modules":
        monkeypatch.setattr(runners, "native_runner", lambda *_: None)
    if request.param == "both":
        can = NativeRunner.can_run
        monkeypatch.setattr(
            NativeRunner, "can_run", lambda own, name: name not in {"dora", "prefix"} and can(own, name)
        )
    return str(request.param)


@lru_cache
def mixed(kind: str) -> Base:
    base = tiny_base("llama", DTYPES[kind], max_position_embeddings=256, **WILD)
    adapters = Adapters(base.module)
    for seed, name in enumerate(filter(None, NAMES)):
        adapters.add(name, AdapterConfig.model_validate(CONFIGS[name]), seed)
        randomise(adapters, name, seed)
    return base


def requests() -> list[Request]:
    """Of each adapter a greedy one and a drawn one; most begin alike."""
    draw, common, found = random.Random(1), [random.Random(0).randrange(3, 99) for _ in range(70)], []
    for number, name in enumerate(NAMES * 2):
        prompt = common[: draw.choice([0, 40, 70])] + [draw.randrange(3, 99) for _ in range(draw.choice([1, 5, 12]))]
        drawn = Sampling(draw.choice([6, 20, 30]), temperature=1.2, seed=number, repetition_penalty=1.1)
        sampling = drawn if number >= len(NAMES) else replace(drawn, temperature=0.0)
        found.append(Request(prompt, name, {11}, sampling))
    return found


def answers(engine: Engine, given: Sequence[Request]) -> list[list[int]]:
    """In the order of the requests."""
    ids = [engine.submit(request) for request in given]
    found: dict[int, list[int]] = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            assert event.ended != "failed", event.error
            if event.token is not None:
                found[event.id].append(event.token)
        engine._scheduler.blocks.check()
    return [found[id] for id in ids]


@lru_cache
def alone(kind: str, runner: str) -> list[list[int]]:
    """Each by an engine of its own. (The runners round otherwise, so each has its own.)"""
    assert isinstance(Engine(mixed(kind))._runner, ModuleRunner) is (runner == "modules")
    found = [answers(Engine(mixed(kind), ALONE), [request])[0] for request in requests()]
    assert len({tuple(tokens) for tokens in found}) == len(found)
    assert len({token for tokens in found for token in tokens}) > 20
    return found


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", DTYPES)
def test_company_changes_nothing(kind: str, settings: str, runner: str) -> None:
    engine, given, expected = Engine(mixed(kind), SETTINGS[settings]), requests(), alone(kind, runner)
    order = random.Random(settings).sample(range(len(given)), len(given))
    found = answers(engine, [given[number] for number in order])
    assert found == [expected[number] for number in order]


@pytest.mark.parametrize("kind", DTYPES)
def test_giving_way_changes_nothing(kind: str, runner: str) -> None:
    """Long answers over few blocks: what they have said so far is read again as a text."""
    given = [
        Request([3 + number] * 9, name, sampling=Sampling(80, temperature=1.2 * (number % 2), seed=number))
        for number, name in enumerate(["lora", "dora", None, "prefix", "lora"])
    ]
    expected = [answers(Engine(mixed(kind), ALONE), [request])[0] for request in given]
    engine = Engine(mixed(kind), EngineSettings(kv_tokens=6 * BLOCK))
    assert answers(engine, given) == expected
    assert engine.statistics().preemptions > 0


@pytest.mark.parametrize("kind", DTYPES)
def test_a_beginning_that_is_cached_changes_nothing(kind: str, runner: str) -> None:
    contents = {name: f"the content of {name}" for name in NAMES if name is not None}
    engine, expected = Engine(mixed(kind), contents=contents), alone(kind, runner)
    for hits in (False, True):
        before = engine.statistics().prefix_hits
        assert [answers(engine, [request])[0] for request in requests()] == expected
        assert engine.statistics().prefix_hits - before > (500 if hits else -1)
    assert answers(engine, requests()[::-1]) == expected[::-1]


def test_requests_that_come_and_go_meanwhile_change_nothing(runner: str) -> None:
    """New ones at any step, some of which are given up."""
    kind, draw = "bf16", random.Random(3)
    engine, given, expected = Engine(mixed(kind), EngineSettings(4, 20, 12 * BLOCK)), requests(), alone(kind, runner)
    waiting = draw.sample(range(len(given)), len(given))
    given_up: list[int] = []
    number_of: dict[int, int] = {}
    found: dict[int, list[int]] = {number: [] for number in waiting}
    while engine.busy or waiting:
        if waiting and draw.random() < 0.3:
            number = waiting.pop()
            number_of[engine.submit(given[number])] = number
            strange = engine.submit(replace(given[draw.randrange(len(given))], salt="another's"))
            given_up.append(strange)
        if given_up and draw.random() < 0.2:
            with suppress(RequestError):  # it had ended
                engine.cancel(given_up.pop(0))
        for event in engine.step():
            if event.token is not None and event.id in number_of:
                found[number_of[event.id]].append(event.token)
    assert [found[number] for number in range(len(given))] == expected
