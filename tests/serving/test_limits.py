"""Requests and tokens a minute, and at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.stage import config
from topwork.serving.limits import Allowance, LimitReached, spoken
from topwork.serving.seams import Call, Caller, Target
from topwork.serving.tenants import Tenants

A_KEY = "a" * 64


class Clock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now = 5e6

    def __call__(self) -> float:
        return self.now


def allowance(clock: Clock, **limits: int) -> Allowance:
    return Allowance(config(tenants=[{"name": "a", "key_sha256": A_KEY, **limits}]).tenants[0], clock)


def refused(allowed: Allowance, prompt_tokens: int = 1) -> LimitReached:
    allowed.headers()  # fills the buckets
    before = (allowed.running, {kind: bucket.level for kind, bucket in allowed.buckets.items()})
    with pytest.raises(LimitReached) as caught:
        allowed.enter(prompt_tokens)
    assert (allowed.running, {kind: bucket.level for kind, bucket in allowed.buckets.items()}) == before
    assert caught.value.status == 429
    return caught.value


@given(st.integers(1, 300), st.lists(st.floats(0, 20), min_size=1, max_size=80))
def test_no_more_enter_than_a_burst_and_what_came_since(a_minute: int, pauses: list[float]) -> None:
    clock = Clock()
    allowed, entered, began = allowance(clock, requests_per_minute=a_minute), 0, clock.now
    for pause in pauses:
        clock.now += pause
        try:
            allowed.enter(1)
            entered += 1
        except LimitReached as error:
            clock.now += error.seconds  # and then it is let in
            allowed.enter(1)
            entered += 1
        assert entered <= a_minute + (clock.now - began) * a_minute / 60 + 1e-3


@given(st.integers(1, 1000), st.integers(1, 5000))
def test_who_waits_as_long_as_told_enters_and_not_much_before(a_minute: int, prompt: int) -> None:
    clock = Clock()
    allowed = allowance(clock, tokens_per_minute=a_minute)
    allowed.enter(prompt)
    if prompt <= a_minute - 1:
        allowed.enter(a_minute)
    seconds = refused(allowed).seconds
    clock.now += seconds * 0.99
    refused(allowed)
    clock.now += seconds * 0.01 + 1e-6
    allowed.enter(1)


def test_answers_are_paid_when_they_end_and_by_what_they_had() -> None:
    clock = Clock()
    allowed = allowance(clock, tokens_per_minute=600)
    allowed.enter(100)
    assert allowed.headers()["x-ratelimit-remaining-tokens"] == "500"
    allowed.leave(800)
    assert allowed.headers()["x-ratelimit-remaining-tokens"] == "0"
    assert refused(allowed).seconds == pytest.approx(30.1), "301 tokens lack, ten come a second"
    clock.now += 30.1
    allowed.enter(5)


def test_places_come_back() -> None:
    allowed = allowance(Clock(), concurrent=2)
    allowed.enter(1)
    allowed.enter(1)
    assert refused(allowed).type == "concurrency"
    allowed.leave(1)
    allowed.enter(1)


def test_the_head_of_a_refusal_says_when_and_what() -> None:
    clock = Clock()
    allowed = allowance(clock, requests_per_minute=100, tokens_per_minute=9000)
    for _ in range(100):
        allowed.enter(10)
    clock.now += 0.3
    assert refused(allowed).headers() == {
        "retry-after": "1",
        "retry-after-ms": "300",
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "59.7s",
        "x-ratelimit-limit-tokens": "9000",
        "x-ratelimit-remaining-tokens": "8045",
        "x-ratelimit-reset-tokens": "6.367s",
    }


def test_a_bucket_does_not_hold_more_than_a_minute() -> None:
    clock = Clock()
    allowed = allowance(clock, requests_per_minute=2)
    clock.now += 3600
    allowed.enter(1)
    allowed.enter(1)
    refused(allowed)


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0ms"), (0.0121, "13ms"), (1, "1s"), (1.2, "1.2s"), (360, "6m0s"), (61.25, "1m1.25s")]
)
def test_times_as_openai_writes_them(seconds: float, told: str) -> None:
    assert spoken(seconds) == told


def a_call(id: str, prompt_tokens: int = 1) -> Call:
    return Call(id, "chat", Caller("a"), "m", Target(None), prompt_tokens=prompt_tokens)


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave"]), st.integers(0, 5)), max_size=60))
def test_a_place_is_given_back_once_however_often_one_leaves(moves: list[tuple[str, int]]) -> None:
    gate = Tenants(config(tenants=[{"name": "a", "key_sha256": A_KEY, "concurrent": 3}]).tenants)
    inside: set[int] = set()
    for what, id in moves:
        if what == "leave":
            gate.leave(a_call(str(id)))
            inside.discard(id)
        elif id not in inside:
            if len(inside) == 3:
                with pytest.raises(LimitReached):
                    gate.enter(a_call(str(id)))
            else:
                gate.enter(a_call(str(id)))
                inside.add(id)


def test_a_prompt_that_was_counted_late_is_paid_late() -> None:
    """A vLLM behind us tells it with the answer alone."""
    gate = Tenants(config(tenants=[{"name": "a", "key_sha256": A_KEY, "tokens_per_minute": 100}]).tenants, Clock())
    call = a_call("1", prompt_tokens=0)
    gate.enter(call)
    call.prompt_tokens, call.generated_tokens = 30, 12
    gate.leave(call)
    assert gate.headers(call.caller)["x-ratelimit-remaining-tokens"] == "58"
