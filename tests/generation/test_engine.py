"""The engine over a model: who runs, who leaves, what is held meanwhile, and that `generate` gives what it gave before.

Who runs when is asked without a model in test_scheduling.py; that company changes nothing, in test_company.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generation.cases import CALLS, NAMES, NEW, called, mixed_base
from reference.families import CONTEXT, added, logits, sequences, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.methods.lora.dora import Dora
from topwork.common.errors import AdapterError, RequestError, RunError
from topwork.generation import engine as module
from topwork.generation import pool
from topwork.generation.engine import Engine, EngineSettings, generate
from topwork.generation.pool import pool_blocks, token_bytes
from topwork.generation.requests import Event, Request
from topwork.generation.sampling import Sampling, choose
from topwork.models.base import Base
from topwork.ops.batch import batch_of
from topwork.ops.paged import BLOCK

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
def test_generate_gives_what_it_gave_before(name: str) -> None:
    """The tokens; greedy ones as they were before there was an engine, drawn ones since draws are a function of seed
    and place. How many run at once changes none of them. Each is told once, in its order, and every end."""
    values, batch_size = CALLS[name]
    sampling = Sampling(max_new_tokens=NEW, **values)
    found = called(generate, mixed_base(), sampling, batch_size)
    assert found["tokens"] == BEFORE[name.partition(",")[0]]
    told = [entry for entry in found["told"] if isinstance(entry, list)]
    assert [[token for at, token in told if at == index] for index in range(len(NAMES))] == found["tokens"]
    assert sum(entry for entry in found["told"] if isinstance(entry, int)) == len(NAMES)


def test_a_prompt_that_is_given_again_draws_anew() -> None:
    base = tiny_base("llama")
    hot = Sampling(6, temperature=1.0, seed=3)
    same = generate(base, [[5, 6, 7]] * 3, [None] * 3, (), hot)
    assert len({tuple(row) for row in same}) == 3
    assert generate(base, [[5, 6, 7]] * 3, [None] * 3, (), hot, batch_size=1) == same
    assert alone(base, Request([5, 6, 7], sampling=hot)) == same[0]


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


def test_requests_come_and_go_at_any_step() -> None:
    base = tiny_base("llama")
    engine = Engine(base, EngineSettings(batch_size=2))
    assert not engine.busy
    assert engine.step() == []
    given = prompts(4, 9, 2, 7)
    ids = [engine.submit(Request(given[at], sampling=greedy(count))) for at, count in enumerate((1, 3, 2))]
    steps = [[event.id for event in engine.step()]]
    ids.append(engine.submit(Request(given[3], sampling=greedy(1))))
    while engine.busy:
        steps.append([event.id for event in engine.step()])
    assert ids == [0, 1, 2, 3]
    assert steps == [[0, 1], [1, 2], [1, 2], [3]]


def test_cancelled_requests_leave_at_once() -> None:
    base = mixed_base()
    requests = [Request(prompt, name, sampling=greedy(6)) for prompt, name in zip(prompts(9, 1, 17, 4), NAMES)]
    engine = Engine(base, EngineSettings(batch_size=3))
    first, second, third, waiting = (engine.submit(request) for request in requests)
    head = engine.step()
    used = engine.statistics().blocks_total - engine.statistics().blocks_free
    engine.cancel(second)
    engine.cancel(waiting)
    assert engine.statistics().blocks_total - engine.statistics().blocks_free == used - 1
    told = engine.step()
    assert told[:2] == [Event(second, ended="cancelled"), Event(waiting, ended="cancelled")]
    assert {event.id for event in told[2:]} == {first, third}
    rest = drained(engine)
    for id, request in ((first, requests[0]), (third, requests[2])):
        own = [event for event in (*head, *told) if event.id == id] + rest[id]
        assert tokens_of(own) == alone(base, request)
    assert rest.keys() == {first, third}


def test_where_all_are_cancelled_the_next_runs() -> None:
    base = tiny_base("llama")
    engine = Engine(base, EngineSettings(batch_size=1))
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
    with pytest.raises(
        AdapterError, match="no adapter 'support' is on tiny; there are none, and None is the bare base"
    ):
        engine.submit(Request([3], "support"))
    for strange in (-1, 99, 10**30):
        with pytest.raises(
            RequestError, match=rf"the prompt has token {strange}, and tiny has 99 tokens, 0 to 98; was "
        ):
            engine.submit(Request([3, strange]))
    with pytest.raises(RequestError, match="the bias names token 99"):
        engine.submit(Request([3], sampling=Sampling(bias=((99, 1.0),))))
    assert not engine.busy


def test_an_adapter_that_drops_out_is_refused_until_it_evaluates() -> None:
    base = tiny_base("llama")
    adapters = added(base, a=AdapterConfig(r=4, lora_dropout=0.5))
    engine = Engine(base)
    request = Request([3, 4, 5], "a", sampling=greedy(5))
    expected = alone(base, request)
    adapters.train("a")
    engine.submit(request)
    with pytest.raises(RuntimeError, match="switch dropout off"):
        engine.step()
    with adapters.evaluating("a"):
        id = engine.submit(request)
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


def test_weights_that_give_no_number_end_in_a_sentence() -> None:
    base = tiny_base("llama")
    with torch.no_grad():
        next(base.module.parameters()).fill_(torch.nan)
    with pytest.raises(RunError, match=r"prompt 0: the model's logits are not finite \(nan\)"):
        generate(base, [[5, 6, 7]], [None], (), greedy(2))


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
    engine = Engine(base, EngineSettings(batch_size=1))
    lost, second = (engine.submit(Request(prompt, sampling=greedy(4))) for prompt in prompts(5, 8))
    failures = iter([RuntimeError("not a number"), None, RuntimeError("not a number")])

    def failing(*given: Any) -> Any:
        if (failure := next(failures, None)) is not None:
            raise failure
        return choose(*given)

    monkeypatch.setattr(module, "choose", failing)
    with pytest.raises(RuntimeError, match="not a number"):
        engine.step()
    assert engine.statistics().blocks_free == engine.statistics().blocks_total
    with pytest.raises(RequestError, match=f"request {lost} cannot be cancelled: it has ended already"):
        engine.cancel(lost)
    engine.step()
    with pytest.raises(RuntimeError, match="not a number"):
        engine.step()
    assert not engine.busy
    third = engine.submit(Request(prompts(5, 8)[1], sampling=greedy(4)))
    assert third > second
    assert tokens_of(drained(engine)[third]) == alone(base, Request(prompts(5, 8)[1], sampling=greedy(4)))


def test_an_idle_engine_holds_no_memory_but_what_is_cached() -> None:
    base = tiny_base("llama")
    added(base, a=AdapterConfig(r=4))
    engine = Engine(base)
    for name, kept in (("a", 0), ("a", 0), (None, 1)):
        request = Request(prompts(40)[0], name, sampling=greedy(3))
        id = engine.submit(request)
        head = engine.step()
        assert engine._pool._layers
        assert tokens_of([*head, *drained(engine)[id]]) == alone(base, request)
        assert engine.statistics().blocks_cached == kept
        assert bool(engine._pool._layers) is bool(kept)


def test_a_pool_is_as_large_as_needed_and_no_larger_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of two heads of 16 values in fp32, keys and values: 512 bytes a token."""
    base = tiny_base("llama")
    assert token_bytes(base) == 512
    assert pool_blocks(base, 3) == 3 * CONTEXT // BLOCK
    for free, expected in ((40 * 512 * BLOCK, 10), (0, CONTEXT // BLOCK)):
        monkeypatch.setattr(pool, "free_memory_bytes", lambda _, free=free: free)
        assert pool_blocks(base, 64) == expected
    assert [pool_blocks(base, 64, tokens) for tokens in (1, 64, 100)] == [1, 2, 3]


class Swinging:
    """A choice that changes at every look."""

    def __init__(self, most: int) -> None:
        self.most = self.count = most
        self.looks = 0

    def look(self) -> str | None:
        self.looks += 1
        self.count = 1 + self.looks % self.most
        return "changed"


@pytest.mark.parametrize("native", [True, False])
def test_threads_that_change_while_answers_are_written_change_none(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    base, asked = mixed_base(), [Request(prompt, name, frozenset(), greedy(6)) for prompt, name in
                                 zip(prompts(5, 30, 3), (None, NAMES[0], NAMES[1]))]  # fmt: skip
    if not native:
        monkeypatch.setattr("topwork.generation.runners.native_runner", lambda *_: None)
    expected = [alone(base, request) for request in asked]
    monkeypatch.setattr("topwork.ops.threads.paying_threads", lambda most: most)
    monkeypatch.setattr("topwork.ops.threads.ThreadChoice", Swinging)
    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(3)
    try:
        engine = Engine(base)
        for again in (False, True):
            ids = [engine.submit(request) for request in asked]
            events: dict[int, list[Event]] = {}
            while engine.busy:
                for event in engine.step():
                    events.setdefault(event.id, []).append(event)
                if engine.busy:
                    seen.add(torch.get_num_threads())
            assert [tokens_of(events[id]) for id in ids] == expected
            assert torch.get_num_threads() == 3, again
        assert seen == {1, 2, 3}
    finally:
        torch.set_num_threads(before)
