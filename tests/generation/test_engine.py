"""The engine's promises: who waits, who runs, who leaves, and that `generate` over it gives what it gave before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generation.cases import CALLS, NAMES, NEW, called, mixed_base
from reference.families import added, logits, sequences, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.methods.lora.dora import Dora
from topwork.common.errors import RequestError
from topwork.generation import engine as module
from topwork.generation.engine import Engine, Event, Request, generate
from topwork.generation.sampling import Sampling
from topwork.models.base import Base
from topwork.ops.batch import batch_of

BEFORE = json.loads(Path(__file__).with_name("before.json").read_text())


def greedy(count: int) -> Sampling:
    return Sampling(max_new_tokens=count)


def drained(engine: Engine) -> dict[int, list[Event]]:
    """All events by request, until the engine is idle."""
    found: dict[int, list[Event]] = {}
    while engine.busy:
        for event in engine.step():
            found.setdefault(event.id, []).append(event)
    return found


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def prompts(*lengths: int) -> list[list[int]]:
    return [part.tolist() for part in sequences(lengths)]


def alone(base: Base, request: Request) -> list[int]:
    """What a request gets in an engine of its own."""
    engine = Engine(base)
    id = engine.submit(request)
    return tokens_of(drained(engine)[id])


@pytest.mark.parametrize("name", CALLS)
def test_generate_gives_what_it_gave_before_there_was_an_engine(name: str) -> None:
    """The tokens, and the callbacks in their order."""
    values, batch_size = CALLS[name]
    sampling = Sampling(max_new_tokens=NEW, **values)
    assert called(generate, mixed_base(), sampling, batch_size) == BEFORE[name]


def test_requests_differ_in_all_that_they_may() -> None:
    """Adapters, stop tokens, lengths and ways to draw in one batch: each as alone, where its seed is its own."""
    base = mixed_base()
    given = prompts(9, 1, 17, 4, 6)
    free = alone(base, Request(given[0], "lora", sampling=greedy(12)))
    requests = [
        Request(given[0], "lora", {free[3]}, greedy(12)),
        Request(given[1], None, {free[3]}, Sampling(8, temperature=0.8, top_p=0.9, seed=1)),
        Request(given[2], "prefix", sampling=greedy(3)),
        Request(given[3], "dora", sampling=Sampling(10, temperature=1.3, seed=2)),
        Request(given[4], "prefix", sampling=greedy(1)),
    ]
    engine = Engine(base)
    ids = [engine.submit(request) for request in requests]
    found = drained(engine)
    assert [tokens_of(found[id]) for id in ids] == [alone(base, request) for request in requests]
    assert found[ids[0]][-1] == Event(ids[0], None, "stop")
    assert tokens_of(found[ids[0]]) == free[: free.index(free[3])]
    assert found[ids[2]][-1] == Event(ids[2], tokens_of(found[ids[2]])[-1], "length")
    assert [len(found[id]) for id in ids[2:]] == [3, 10, 1]


def test_requests_of_one_seed_share_its_draws_until_none_is_left() -> None:
    """An engine that is idle keeps nothing: the same requests draw the same again."""
    base = tiny_base("llama")
    hot = Sampling(6, temperature=1.0, seed=3)
    engine = Engine(base, batch_size=2)

    def drawn() -> list[list[int]]:
        ids = [engine.submit(Request([5, 6, 7], sampling=hot)) for _ in range(3)]
        found = drained(engine)
        return [tokens_of(found[id]) for id in ids]

    first = drawn()
    assert len({tuple(row) for row in first}) == 3  # the last, in a batch of its own, does not begin the seed anew
    assert drawn() == first


def test_what_comes_while_a_batch_runs_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    engine = Engine(base, batch_size=2)
    read: list[int] = []
    plain = module._read_prompts

    def counted(base: Base, prompts: Any, *others: Any) -> torch.Tensor:
        read.append(len(prompts))
        return plain(base, prompts, *others)

    monkeypatch.setattr(module, "_read_prompts", counted)
    assert not engine.busy
    assert engine.step() == []
    given = prompts(4, 9, 2, 7)
    ids = [engine.submit(Request(given[at], sampling=greedy(count))) for at, count in enumerate((1, 3, 2))]
    steps = [{event.id for event in engine.step()}]
    ids.append(engine.submit(Request(given[3], sampling=greedy(1))))
    while engine.busy:
        steps.append({event.id for event in engine.step()})
    assert ids == [0, 1, 2, 3]
    assert steps == [{0, 1}, {1}, {1}, {2, 3}, {2}]
    assert read == [2, 2]
    assert not engine.busy


def test_cancelled_requests_leave_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = mixed_base()
    widths: list[int] = []
    plain = module._one_token

    def counted(base: Base, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        widths.append(len(tokens))
        return plain(base, tokens, *others)

    monkeypatch.setattr(module, "_one_token", counted)
    requests = [Request(prompt, name, sampling=greedy(6)) for prompt, name in zip(prompts(9, 1, 17, 4), NAMES)]
    engine = Engine(base, batch_size=3)
    first, second, third, waiting = (engine.submit(request) for request in requests)
    head = engine.step()
    engine.cancel(second)
    engine.cancel(waiting)
    told = engine.step()
    assert told[:2] == [Event(second, ended="cancelled"), Event(waiting, ended="cancelled")]
    assert {event.id for event in told[2:]} == {first, third}
    rest = drained(engine)
    assert widths == [2] * 5
    for id, request in ((first, requests[0]), (third, requests[2])):
        own = [event for event in (*head, *told) if event.id == id] + rest[id]
        assert tokens_of(own) == alone(base, request)
    assert rest.keys() == {first, third}


def test_a_batch_whose_requests_are_all_cancelled_makes_way() -> None:
    base = tiny_base("llama")
    engine = Engine(base, batch_size=1)
    first, second = (engine.submit(Request(prompt, sampling=greedy(4))) for prompt in prompts(5, 8))
    engine.step()
    engine.cancel(first)
    found = drained(engine)
    assert found[first] == [Event(first, ended="cancelled")]
    assert tokens_of(found[second]) == alone(base, Request(prompts(5, 8)[1], sampling=greedy(4)))
    last = engine.submit(Request([3], sampling=greedy(4)))
    engine.cancel(last)
    assert engine.busy  # it has this to tell
    assert engine.step() == [Event(last, ended="cancelled")]
    assert not engine.busy


def test_what_cannot_be_cancelled_or_run() -> None:
    engine = Engine(tiny_base("llama"))
    id = engine.submit(Request([3, 4], sampling=greedy(1)))
    with pytest.raises(RequestError, match="request 1 cannot be cancelled: it was never given out"):
        engine.cancel(id + 1)
    drained(engine)
    with pytest.raises(RequestError, match="request 0 cannot be cancelled: it has ended already"):
        engine.cancel(id)
    with pytest.raises(RequestError, match="the prompt has 0 tokens; the context of tiny is 64, and a prompt must"):
        engine.submit(Request([]))
    with pytest.raises(RequestError, match="the prompt has 64 tokens"):
        engine.submit(Request([3] * 64))
    with pytest.raises(RequestError, match="max_new_tokens is 0; give at least 1"):
        engine.submit(Request([3], sampling=greedy(0)))
    with pytest.raises(RequestError, match="batch_size is 0; give at least 1"):
        Engine(tiny_base("llama"), batch_size=0)
    assert not engine.busy


def test_an_adapter_that_drops_out_is_refused_until_it_evaluates() -> None:
    base = tiny_base("llama")
    adapters = added(base, a=AdapterConfig(r=4, lora_dropout=0.5))
    engine = Engine(base)
    request = Request([3, 4, 5], "a", sampling=greedy(5))
    expected = alone(base, request)
    adapters.train("a")
    id = engine.submit(request)
    with pytest.raises(RuntimeError, match="switch dropout off"):
        engine.step()
    with adapters.evaluating("a"):
        assert tokens_of(drained(engine)[id]) == expected


def test_what_weights_alone_decide_is_held_from_beginning_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's row lengths: once a batch, however it ends, and anew in the next."""
    base = tiny_base("llama")
    adapters = added(base, a=AdapterConfig(r=4, use_dora=True))
    count = 0
    plain = Dora._computed_lengths

    def counted(part: Dora, base_layer: nn.Module) -> Tensor:
        nonlocal count
        count += 1
        return plain(part, base_layer)

    monkeypatch.setattr(Dora, "_computed_lengths", counted)
    engine, request, parts = Engine(base), Request([3, 4, 5], "a", sampling=greedy(6)), len(adapters.parts("a"))
    id = engine.submit(request)
    before = tokens_of(drained(engine)[id])
    assert count == parts
    id = engine.submit(request)
    engine.step()
    engine.cancel(id)
    assert count == 2 * parts
    for passes in (3, 4):  # nothing is held where nothing runs
        logits(base, batch_of(sequences(), "a"))
        assert count == passes * parts
    with torch.no_grad():
        for parameter in adapters.parameters("a").values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    again = engine.submit(request)
    changed = tokens_of(drained(engine)[again])
    assert count == 5 * parts
    assert changed != before


def test_no_gradient_is_taken() -> None:
    base = tiny_base("llama")
    adapters = added(base, a=AdapterConfig(r=4))
    engine = Engine(base)
    engine.submit(Request([3, 4], "a", sampling=greedy(2)))
    with torch.enable_grad():
        drained(engine)
    assert all(parameter.grad is None for parameter in adapters.parameters("a").values())


def test_a_step_that_fails_loses_what_ran_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    engine = Engine(base, batch_size=1)
    lost, second = (engine.submit(Request(prompt, sampling=greedy(4))) for prompt in prompts(5, 8))
    failures = iter([RuntimeError("not a number"), None, RuntimeError("not a number")])
    choose = engine._sampler.choose

    def failing(*given: Any) -> torch.Tensor:
        if (failure := next(failures, None)) is not None:
            raise failure
        return choose(*given)

    monkeypatch.setattr(engine._sampler, "choose", failing)
    with pytest.raises(RuntimeError, match="not a number"):
        engine.step()
    with pytest.raises(RequestError, match=f"request {lost} cannot be cancelled: it has ended already"):
        engine.cancel(lost)
    engine.step()
    with pytest.raises(RuntimeError, match="not a number"):
        engine.step()
    assert not engine.busy
    third = engine.submit(Request(prompts(5, 8)[1], sampling=greedy(4)))
    assert third > second
    assert tokens_of(drained(engine)[third]) == alone(base, Request(prompts(5, 8)[1], sampling=greedy(4)))
