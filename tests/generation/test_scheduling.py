"""Who runs when, over a runner without a model: any order of coming and going gives every request its own answer."""

from collections import Counter
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from generation.pretended import PretendedRunner, answer_to, logits_after
from reference.families import added, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.common.errors import AdapterError, RequestError
from topwork.generation import engine as module
from topwork.generation.answer import Answer
from topwork.generation.engine import Engine, EngineSettings
from topwork.generation.requests import Event, Request
from topwork.generation.sampling import Row, Sampling
from topwork.generation.waiting import PASSED_OVER, Lines
from topwork.models.base import Base
from topwork.ops.paged import BLOCK

NAMES = ["one", "two"]


@pytest.fixture(scope="module")
def base() -> Base:
    base = tiny_base("llama", max_position_embeddings=512)
    added(base, **{name: AdapterConfig(r=1, target_modules=["q_proj"]) for name in NAMES})
    return base


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "runner_for", lambda base, pool, _frozen: PretendedRunner(base, pool))


def engine_of(base: Base, contents: Any = None, **values: Any) -> Engine:
    return Engine(base, EngineSettings(**values), contents)


def asking(prompt: list[int], adapter: str | None = None, count: int = 5, **values: Any) -> Request:
    return Request(prompt, adapter, sampling=Sampling(max_new_tokens=count), **values)


def text(length: int, seed: int = 0) -> list[int]:
    return [(7 * seed + 3 * at + at * at // 5) % 90 + 3 for at in range(length)]


def drained(engine: Engine) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    while engine.busy:
        for event in engine.step():
            found.setdefault(event.id, []).append(event)
        engine._scheduler.blocks.check()
    return found


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


class EngineMachine(RuleBasedStateMachine):
    """Requests come, run and are given up in any order, over few blocks, few rows and shared beginnings."""

    base: Base

    @initialize(
        sequences=st.integers(1, 5), rows=st.sampled_from([1, 3, 8, 40, 500]), blocks=st.integers(3, 12),
        told=st.booleans(),
    )  # fmt: skip
    def begin(self, sequences: int, rows: int, blocks: int, told: bool) -> None:
        self.blocks = blocks
        self.engine = engine_of(
            EngineMachine.base, {"one": "a hash"} if told else None,
            batch_size=sequences, max_batch_tokens=rows, kv_tokens=blocks * BLOCK,
        )  # fmt: skip
        self.asked: dict[int, Request] = {}
        self.said: dict[int, list[int]] = {}
        self.ended: dict[int, Any] = {}
        self.cancelled: set[int] = set()

    @rule(
        common=st.integers(0, 150), own=st.integers(1, 60), seed=st.integers(0, 3), count=st.integers(1, 90),
        adapter=st.sampled_from([None, *NAMES]), share=st.sampled_from("ab"), salt=st.sampled_from(["", "s"]),
    )  # fmt: skip
    def submit(self, common: int, own: int, seed: int, count: int, adapter: str | None, share: str, salt: str) -> None:
        request = asking(text(common) + text(own, seed), adapter, count, share=share, salt=salt)
        if common + own > self.blocks * BLOCK:
            with pytest.raises(RequestError, match="raise kv_tokens"):
                self.engine.submit(request)
            return
        id = self.engine.submit(request)
        self.asked[id], self.said[id] = request, []

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for event in self.engine.step():
                assert event.id not in self.ended
                assert event.id not in self.cancelled or event.ended == "cancelled"
                if event.token is not None:
                    self.said[event.id].append(event.token)
                if event.ended is not None:
                    self.ended[event.id] = event.ended

    def live(self) -> list[int]:
        return sorted(self.asked.keys() - self.ended.keys() - self.cancelled)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self.live()))
        before = self.engine.statistics()
        ran = self.engine._scheduler.running.get(id)
        own = 0 if ran is None else sum(self.engine._scheduler.blocks._users[b] == 1 for b in ran.blocks)
        self.engine.cancel(id)
        self.cancelled.add(id)
        after = self.engine.statistics()
        assert after.blocks_free + after.blocks_cached >= before.blocks_free + before.blocks_cached + own

    @invariant()
    def in_order(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine._scheduler.blocks.check()
        statistics, scheduler = self.engine.statistics(), self.engine._scheduler
        assert statistics.running <= self.engine.settings.batch_size
        held = {block for answer in scheduler.running.values() for block in answer.blocks}
        assert len(held) == statistics.blocks_total - statistics.blocks_free - statistics.blocks_cached
        for id in self.live():
            expected = answer_to(self.asked[id].prompt, self.asked[id].adapter, len(self.said[id]))
            assert self.said[id] == expected

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            if not self.engine.busy:
                break
            self.step(1)
        assert not self.engine.busy
        room = self.blocks * BLOCK + 1
        for id in self.asked.keys() - self.cancelled:
            request = self.asked[id]
            wanted = min(request.sampling.max_new_tokens, room - len(request.prompt))
            assert self.said[id] == answer_to(request.prompt, request.adapter, wanted)
            assert self.ended[id] == "length"
        assert not self.engine._runner.held
        statistics = self.engine.statistics()
        assert statistics.blocks_free + statistics.blocks_cached == statistics.blocks_total


def test_any_order_of_coming_and_going(base: Base) -> None:
    EngineMachine.base = base
    case = EngineMachine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
    case("runTest").runTest()


def test_a_pool_that_is_too_small_for_all_makes_the_youngest_give_way(base: Base) -> None:
    """It comes back, and tells nothing twice."""
    engine = engine_of(base, kv_tokens=6 * BLOCK)
    requests = [asking(text(40, seed), count=100) for seed in range(3)]
    ids = [engine.submit(request) for request in requests]
    found = drained(engine)
    assert engine.statistics().preemptions > 0
    for id, request in zip(ids, requests):
        assert tokens(found[id]) == answer_to(request.prompt, None, 100)
        assert [event.ended for event in found[id]] == [None] * 99 + ["length"]


def test_the_oldest_never_gives_way(base: Base) -> None:
    engine = engine_of(base, kv_tokens=6 * BLOCK)
    ids = [engine.submit(asking(text(40, seed), count=100)) for seed in range(3)]
    ends = [event.id for events in drained(engine).values() for event in events if event.ended]
    assert ends == ids
    read = engine._runner.read
    assert len(read) > 3
    assert sum(rows.tokens[0] == text(1)[0] for rows in read) == 1


def test_one_that_fills_the_pool_alone_ends(base: Base) -> None:
    engine = engine_of(base, kv_tokens=2 * BLOCK)
    id = engine.submit(asking(text(50), count=400))
    found = drained(engine)[id]
    assert tokens(found) == answer_to(text(50), None, 2 * BLOCK - 50 + 1)
    assert found[-1].ended == "length"
    with pytest.raises(
        RequestError, match="the prompt has 65 tokens, virtual ones included, and keys and values are h"
    ):
        engine.submit(asking(text(65)))


def test_a_beginning_that_is_known_is_not_computed_again(base: Base) -> None:
    engine = engine_of(base)
    engine.submit(asking(text(100)))
    drained(engine)
    before = engine.statistics()
    assert (before.prefix_queries, before.prefix_hits) == (100, 0)
    engine._runner.passes.clear()
    id = engine.submit(asking([*text(100), 3, 4, 5]))
    found = drained(engine)
    after = engine.statistics()
    assert (after.prefix_queries, after.prefix_hits) == (203, 96)
    assert [len(rows.tokens) for rows in engine._runner.passes[0]] == [7]
    assert tokens(found[id]) == answer_to([*text(100), 3, 4, 5], None, 5)


def test_a_whole_prompt_that_is_known_leaves_a_token_to_compute(base: Base) -> None:
    engine = engine_of(base)
    for _ in range(2):
        engine._runner.passes.clear()
        id = engine.submit(asking(text(2 * BLOCK)))
        assert tokens(drained(engine)[id]) == answer_to(text(2 * BLOCK), None, 5)
    assert [len(rows.tokens) for rows in engine._runner.passes[0]] == [BLOCK]


def test_what_an_answer_said_is_known_too(base: Base) -> None:
    """The next turn of a conversation begins with it."""
    engine = engine_of(base)
    id = engine.submit(asking(text(60), count=50))
    said = tokens(drained(engine)[id])
    engine.submit(asking(text(60) + said + [9], count=1))
    drained(engine)
    assert engine.statistics().prefix_hits == 96


def test_prompts_that_come_together_are_read_once(base: Base) -> None:
    """Four answers to one prompt: the others wait a step for the blocks that the first fills."""
    engine = engine_of(base)
    ids = [engine.submit(asking(text(100))) for _ in range(4)]
    found = drained(engine)
    assert [len(rows.tokens) for rows in engine._runner.read] == [100, 4, 4, 4]
    assert all(tokens(found[id]) == answer_to(text(100), None, 5) for id in ids)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"adapter": "one"}, {}), ({}, {"adapter": "one"}), ({"adapter": "one"}, {"adapter": "two"}),
        ({"salt": "x"}, {}), ({"salt": "x"}, {"salt": "y"}), ({"adapter": "one", "salt": "x"}, {"adapter": "one"}),
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_found_across_adapters_and_salts(base: Base, one: dict[str, Any], other: dict[str, Any]) -> None:
    engine = engine_of(base, {"one": "1", "two": "2"})
    for values in (one, other):
        for _ in range(2):  # at the same time, and later
            engine.submit(asking(text(100), **values))
    drained(engine)
    assert engine.statistics().prefix_hits == 2 * 96
    engine.submit(asking(text(100), **one))
    drained(engine)
    assert engine.statistics().prefix_hits == 3 * 96


def test_an_adapters_content_and_not_its_name_decides(base: Base) -> None:
    contents = {"one": "same", "two": "same"}
    engine = engine_of(base, contents)
    engine.submit(asking(text(100), "one"))
    drained(engine)
    engine._runner.memory = {place: ("two", token) for place, (_, token) in engine._runner.memory.items()}
    engine.submit(asking(text(100), "two"))
    drained(engine)
    assert engine.statistics().prefix_hits == 96
    contents["one"] = "another"
    engine.submit(asking(text(100), "one"))
    drained(engine)
    assert engine.statistics().prefix_hits == 96


def test_an_adapter_whose_content_nobody_told_leaves_nothing(base: Base) -> None:
    """Its weights may change when nothing runs; while something does, it is found."""
    engine = engine_of(base)
    engine.submit(asking(text(100), "one", count=40))
    engine.step()
    engine.submit(asking(text(100), "one"))
    drained(engine)
    assert engine.statistics().prefix_hits == 96
    assert engine.statistics().blocks_free == engine.statistics().blocks_total
    engine.submit(asking(text(100), "one"))
    drained(engine)
    assert engine.statistics().prefix_hits == 96


def test_what_is_forgotten_is_free(base: Base) -> None:
    engine = engine_of(base, {"one": "1", "two": "2"})
    for name in NAMES:
        for salt in ("", "x"):
            engine.submit(asking(text(100), name, salt=salt))
    drained(engine)
    cached = engine.statistics().blocks_cached
    engine.forget("one")
    assert 2 * engine.statistics().blocks_cached == cached
    engine.submit(asking(text(100), "one"))
    drained(engine)
    assert engine.statistics().prefix_hits == 0
    engine.forget("nobody")


def test_salts_that_never_come_again_leave_nothing(base: Base) -> None:
    """A client chooses them: one for each request, if it likes."""
    engine = engine_of(base, {"one": "1"}, kv_tokens=2 * BLOCK)
    held = [value for name, value in vars(engine._chains).items() if name not in ("blocks", "contents")]
    sizes = set()
    for number in range(40):
        engine.submit(asking(text(BLOCK + 2), "one", salt=str(number)))
        drained(engine)
        sizes.add(len(repr(held)))
    assert len(sizes) == 1


def test_prompts_are_read_beside_answers_and_neither_stops(base: Base) -> None:
    """Eight rows: of five answers no more than six at once while a prompt is read, each in its turn."""
    engine = engine_of(base, max_batch_tokens=8)
    for seed in range(7):
        engine.submit(asking([seed + 3], count=60))
    for _ in range(2):
        engine.step()
    engine.submit(asking(text(90)))
    engine._runner.passes.clear()
    for _ in range(30):
        engine.step()
    for rows in engine._runner.passes:
        assert sum(len(each.tokens) for each in rows) == 8
        assert [len(each.tokens) for each in rows if len(each.tokens) > 1] == [2]
    turns = Counter(each.blocks[0] for rows in engine._runner.passes for each in rows if len(each.tokens) == 1)
    assert len(turns) == 7
    assert max(turns.values()) - min(turns.values()) <= 1


def test_shares_take_turns_and_each_line_is_first_come_first_served(base: Base) -> None:
    engine = engine_of(base, batch_size=1)
    shares = "aaaabac"
    ids = [engine.submit(asking(text(5, seed), count=1, share=share)) for seed, share in enumerate(shares)]
    order = [ids.index(id) for id in drained(engine)]
    assert "".join(shares[number] for number in order) == "abcaaaa"
    for share in "abc":
        assert [number for number in order if shares[number] == share] == sorted(
            number for number, own in enumerate(shares) if own == share
        )


def test_an_adapter_that_is_not_there_is_refused(base: Base) -> None:
    engine = engine_of(base)
    with pytest.raises(AdapterError, match=r"no adapter 'on' is on tiny; did you mean 'one'\?; there are \['one', 'tw"):
        engine.submit(asking([3], "on"))
    assert not engine.busy


def test_an_adapter_that_goes_while_its_request_waits_fails_that_alone() -> None:
    base = tiny_base("llama")
    adapters = added(base, one=AdapterConfig(r=1), two=AdapterConfig(r=1))
    engine = engine_of(base)
    ids = [engine.submit(asking([3, 4], name)) for name in ("one", "two", None)]
    adapters.remove("one")
    found = drained(engine)
    assert [event.ended for event in found[ids[0]]] == ["failed"]
    assert found[ids[0]][0].error == "its adapter has been removed"
    assert [tokens(found[id]) for id in ids[1:]] == [answer_to([3, 4], name, 5) for name in ("two", None)]


# ---- what is chosen by ---------------------------------------------------------------------------------------------


class Only:
    """A constraint: these tokens one after the other. `fails` says when it raises."""

    def __init__(self, *tokens: int, fails: str = "") -> None:
        self.left, self.fails = list(tokens), fails

    def allowed(self) -> np.ndarray:
        if self.fails == "allowed":
            raise ValueError("no such rule")
        flags = np.zeros(128, np.uint8)
        flags[self.left[:1]] = 1
        return np.packbits(flags, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        if self.fails == "accept":
            raise ValueError("not this one")
        assert self.left.pop(0) == token

    @property
    def complete(self) -> bool:
        if self.fails == "complete":
            raise ValueError("who knows")
        return not self.left and self.fails != "never complete"


def test_a_constraint_is_obeyed_and_ends_its_answer(base: Base) -> None:
    """Also where its request had to give way: it moves with it."""
    engine = engine_of(base, kv_tokens=6 * BLOCK)
    obeyed = [5, 7, 11, *text(80, 4)]
    requests = [asking(text(40, seed), count=200, constraint=Only(*obeyed) if seed else None) for seed in range(3)]
    ids = [engine.submit(request) for request in requests]
    found = drained(engine)
    assert engine.statistics().preemptions
    for id in ids[1:]:
        assert tokens(found[id]) == obeyed
        assert found[id][-1] == Event(id, obeyed[-1], "stop")
    assert tokens(found[ids[0]]) == answer_to(text(40), None, 6 * BLOCK - 39)


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        ("allowed", "its constraint failed: ValueError: no such rule"),
        ("accept", "its constraint failed: ValueError: not this one"),
        ("complete", "its constraint failed: ValueError: who knows"),
        ("never complete", "no token may come next"),
    ],
)
def test_a_constraint_that_fails_fails_its_request_alone(base: Base, fails: str, error: str) -> None:
    engine = engine_of(base)
    ids = [
        engine.submit(asking(text(40, seed), constraint=Only(9, fails=fails) if seed == 1 else None))
        for seed in range(3)
    ]
    found = drained(engine)
    assert found[ids[1]][-1].ended == "failed"
    assert str(found[ids[1]][-1].error).startswith(error)
    assert tokens(found[ids[1]]) == ([9] if fails == "never complete" else [])
    for number in (0, 2):
        assert tokens(found[ids[number]]) == answer_to(text(40, number), None, 5)


def test_stop_tokens_wait_for_the_least_length(base: Base) -> None:
    said = answer_to(text(40), None, 8)
    for least in (0, 1, 4):
        engine = engine_of(base)
        sampling = Sampling(max_new_tokens=8, min_new_tokens=least)
        id = engine.submit(Request(text(40), None, {said[0]}, sampling))
        found = drained(engine)[id]
        assert said[0] not in tokens(found)
        assert (len(tokens(found)) >= least) if least else found == [Event(id, None, "stop")]


def test_what_is_asked_of_likelihoods_is_told(base: Base) -> None:
    engine = engine_of(base)
    id = engine.submit(Request(text(40), sampling=Sampling(2, logprobs=2)))
    [first, _] = drained(engine)[id]
    shares = torch.log_softmax(logits_after([(None, token) for token in text(40)]), -1)
    values, at = shares.topk(2)
    assert first.token == at[0]
    assert first.logprob == pytest.approx(float(values[0]), abs=1e-5)
    assert [token for token, _ in first.likeliest] == at.tolist()


def test_figures(base: Base) -> None:
    engine = engine_of(base, batch_size=2, kv_tokens=10 * BLOCK)
    for seed in range(3):
        engine.submit(asking(text(40, seed), count=3))
    before = engine.statistics()
    assert (before.running, before.waiting, engine.waiting, before.blocks_total, before.blocks_free) == (
        0,
        3,
        3,
        10,
        10,
    )
    engine.step()
    during = engine.statistics()
    assert (during.running, during.waiting, during.blocks_free) == (2, 1, 6)
    drained(engine)
    after = engine.statistics()
    assert (after.prompt_tokens, after.generated_tokens, after.running, after.waiting) == (120, 9, 0, 0)
    assert (after.blocks_cached, after.blocks_free) == (3, 7)


@pytest.mark.parametrize("name", ["batch_size", "max_batch_tokens", "kv_tokens"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is 0; give at least 1"):
        EngineSettings(**{name: 0})


# ---- who is next --------------------------------------------------------------------------------------------------


def waiting(id: int, share: str) -> Answer:
    return Answer(id, asking([3], share=share), [3], 1, b"", b"", Row(Sampling()), [])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nobody_is_passed_over_for_long(data: st.DataObject) -> None:
    """Any number of shares that come one after the other: whoever came first of all is passed over no more than the
    stated bound, and never by a later one of its own share."""
    lines, ids = Lines(), count()
    passed: Counter[int] = Counter()
    admitted: list[Answer] = []
    for kind in data.draw(st.lists(st.sampled_from("aaadddr"), min_size=100, max_size=400)):
        if kind == "a":
            lines.add(waiting(next(ids), data.draw(st.sampled_from(["a", "b", f"new {len(lines)}"]))))
        elif kind == "r" and admitted:
            lines.return_(admitted.pop())
        elif len(lines):
            oldest, before = lines.oldest, list(lines)
            assert oldest is not None
            answer = lines.admit()
            assert not any(each.share == answer.share and each.id < answer.id for each in before if each is not answer)
            passed[oldest.id] += answer is not oldest
            admitted.append(answer)
    assert max(passed.values(), default=0) <= PASSED_OVER


def test_the_bound_is_reached_and_kept() -> None:
    """Shares that nobody has seen before always come first in the ring; even so."""
    lines, ids = Lines(), count(1)
    lines.add(waiting(0, "old"))
    for _ in range(PASSED_OVER):
        lines.return_(waiting(next(ids), f"new {next(ids)}"))
        assert lines.admit().id > 0
    lines.return_(waiting(next(ids), "newest"))
    assert lines.admit().id == 0
    assert lines.admit().share == "newest"
    assert len(lines) == 0
