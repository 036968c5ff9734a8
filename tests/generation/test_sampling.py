"""Choices against transformers' processors in float64, and what they may not depend on."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.sampling import chances
from topwork.common.errors import RequestError
from topwork.common.seeds import hashed
from topwork.generation import drawing, sampling
from topwork.generation.drawing import uniform
from topwork.generation.sampling import Chosen, Row, Sampling, choose

SIZES = [1, 2, 31, 64, 65, 300, 2000]


def bits(allowed: list[int], size: int) -> np.ndarray:
    """Words as a constraint gives them."""
    flags = np.zeros(-(-size // 32) * 32, np.uint8)
    flags[allowed] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, Row]:
    """Logits of some size and spread, and a row of any settings."""
    size = draw(st.sampled_from(SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(size, generator=generator) * draw(st.sampled_from([0.01, 1.0, 6.0, 40.0]))
    token = st.integers(0, size - 1)
    minimal = draw(st.booleans())
    chosen = Sampling(
        temperature=draw(st.sampled_from([0, 0.01, 0.5, 1, 1.7, 100.0])),
        top_p=draw(st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-9])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 40, 1999, 5000])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0])),
        seed=draw(st.integers(*sampling.SEEDS)),
        repetition_penalty=1.0 if minimal else draw(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=0.0 if minimal else draw(st.sampled_from([0.0, 1.5, -0.5])),
        frequency_penalty=0.0 if minimal else draw(st.sampled_from([0.0, 0.4, -0.2])),
        bias=() if minimal else tuple(draw(st.dictionaries(token, st.sampled_from([-100.0, 2.5, 100.0]))).items()),
    )
    allowed = None if minimal else draw(st.none() | st.sets(token, min_size=1, max_size=30))
    banned = set() if minimal else draw(st.sets(token, max_size=3))
    if (allowed or set(range(size))) <= banned:
        banned = set()
    return logits, Row(
        chosen,
        draw(st.integers(0, 9000)),
        draw(st.lists(token, max_size=8)),
        draw(st.lists(token, max_size=8)),
        None if allowed is None else bits(sorted(allowed), size),
        banned,
    )


@settings(max_examples=400, deadline=None)
@given(cases())
def test_a_draw_is_where_its_number_falls_in_the_chances_in_order(case: tuple[torch.Tensor, Row]) -> None:
    logits, row = case
    shares = chances(logits, row)
    [token] = choose(logits[None], [row]).tokens
    assert shares[token] > 0
    ends, number = shares.cumsum(0), uniform(row.sampling.seed, row.position)
    if row.sampling.temperature:
        assert ends[token] - shares[token] - 1e-5 <= number <= ends[token] + 1e-5


def test_chances_are_met() -> None:
    """20,000 draws at the places of an answer: chi-square over all that are kept, and none that is not."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    drawn = Sampling(temperature=0.9, top_p=0.95, seed=11)
    rows = [Row(drawn, position) for position in range(20_000)]
    found = Counter(choose(logits.expand(len(rows), -1), rows).tokens)
    expected = chances(logits, rows[0]) * len(rows)
    kept = int((expected > 0).sum())
    assert 5 < kept == len(found)
    square = sum((found[token] - float(share)) ** 2 / float(share) for token, share in enumerate(expected) if share > 0)
    assert square < kept - 1 + 5 * math.sqrt(2 * (kept - 1))


def test_numbers_are_splitmix64s_and_look_like_chance() -> None:
    # the first output of the published generator, from the seed that its test vectors are given for
    assert drawing._mixed(1234567) == 6457827717110365317
    for grid in (
        [uniform(seed, 5) for seed in range(-2000, 2000)],
        [uniform(7, position) for position in range(4000)],
        [uniform(hashed(7, choice, bits=63), 0) for choice in range(4000)],
    ):
        numbers = np.array(grid)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = np.histogram(numbers, 40, (0, 1))[0]
        assert ((counts - 100) ** 2 / 100).sum() < 39 + 5 * math.sqrt(2 * 39)
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 5 / math.sqrt(4000)


def mixed_rows(size: int) -> list[Row]:
    """One of each kind."""
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2, "top_k": 50},
        {"temperature": 1.0, "min_p": 0.1}, {"repetition_penalty": 1.2}, {"temperature": 1.0, "frequency_penalty": 1.0},
        {"bias": ((3, 5.0),)}, {"logprobs": 0}, {"logprobs": 5, "temperature": 2.0, "top_p": 0.99},
    ]  # fmt: skip
    rows = [Row(Sampling(seed=seed, **kind), 3 * seed, [1, 2], [3, 3]) for seed, kind in enumerate(kinds)]
    return [*rows, Row(Sampling(), allowed=bits([4, 9, 11], size), banned=[9])]


def parts(chosen: Chosen) -> list[tuple[Any, ...]]:
    return list(zip(chosen.tokens, chosen.errors, chosen.logprobs, chosen.likeliest))


@pytest.mark.parametrize("size", [300, 49152, 50257])
def test_a_row_is_the_same_to_the_bit_in_any_company(size: int) -> None:
    rows = mixed_rows(size)
    logits = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(1)) * 3
    alone = [parts(choose(logits[number : number + 1].clone(), [row]))[0] for number, row in enumerate(rows)]
    assert parts(choose(logits, rows)) == alone
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2)).tolist()
    assert parts(choose(logits[order], [rows[number] for number in order])) == [alone[number] for number in order]
    shifted = torch.empty(len(rows) * size + 1)[1:].view(len(rows), size).copy_(logits)  # other addresses
    assert parts(choose(shifted, rows)) == alone
    wide = torch.cat([logits, logits], 1)[:, :size]  # rows that do not follow each other
    assert parts(choose(wide, rows)) == alone


@pytest.mark.parametrize("size", [300, 49152])
def test_a_device_chooses_what_the_host_does(size: int) -> None:
    rows = mixed_rows(size)
    logits = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(1)).mul_(4).round_()  # ties
    logits[-3, 5] = torch.nan
    host = [sampling._outcome(scores, row) for scores, row in zip(logits.numpy(), rows)]
    assert sampling._on_device(logits, rows) == host


@pytest.mark.gpu
def test_a_card_chooses_what_the_host_does() -> None:
    rows = mixed_rows(49152)
    logits = torch.randn(len(rows), 49152, generator=torch.Generator().manual_seed(1)).mul_(4).round_()
    assert parts(choose(logits.cuda(), rows)) == parts(choose(logits, rows))


def test_of_equal_ones_the_first() -> None:
    logits = torch.zeros(2, 4000)
    logits[:, 700:3000] = 1.0
    assert choose(logits, [Row(Sampling()), Row(Sampling(logprobs=3))]).tokens == [700, 700]
    told = choose(logits, [Row(Sampling()), Row(Sampling(logprobs=3))])
    assert [token for token, _ in told.likeliest[1]] == [700, 701, 702]
    rows = [Row(Sampling(temperature=1.0, top_k=3, seed=seed)) for seed in range(60)]
    assert set(choose(logits[:1].expand(60, -1), rows).tokens) == {700, 701, 702}
    # 2,300 of e and 1,700 of 1: the first 230 of the large ones are the nucleus of just under a tenth of their sum
    part = 229.5 * math.e / (2300 * math.e + 1700)
    rows = [Row(Sampling(temperature=1.0, top_p=part, seed=seed)) for seed in range(800)]
    drawn = choose(logits[:1].expand(800, -1), rows).tokens
    assert min(drawn) >= 700
    assert 920 < max(drawn) <= 929


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, 2.25]), min_size=1, max_size=400), st.integers(0, 500))
def test_the_largest_are_those_of_a_full_sort(values: list[float], count: int) -> None:
    found = drawing.largest(np.array(values, np.float32), count)
    assert found.tolist() == sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]


def test_logprobs_are_the_models_own() -> None:
    """Before penalties, bias, constraints and temperature."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)) * 5
    expected = torch.log_softmax(logits[0].double(), -1)
    order = sorted(range(5000), key=lambda token: (-float(expected[token]), token))
    asked = Sampling(temperature=3.0, bias=((order[0], -100.0),), presence_penalty=2.0, logprobs=7)
    told = choose(logits, [Row(asked, 0, (), [order[1]], bits(order[:40], 5000))])
    [token], [logprob], [likeliest] = told.tokens, told.logprobs, told.likeliest
    assert token != order[0]
    assert logprob == pytest.approx(float(expected[token]), abs=2e-6)
    assert [each for each, _ in likeliest] == order[:7]
    assert [value for _, value in likeliest] == pytest.approx(expected[order[:7]].tolist(), abs=2e-6)
    none, bare = choose(logits, [Row(Sampling())]), choose(logits, [Row(Sampling(logprobs=0))])
    assert none.logprobs == [None]
    assert bare.logprobs == [pytest.approx(float(expected.max()), abs=2e-6)]
    assert bare.likeliest == [()]


def test_a_row_that_nothing_can_be_chosen_for_fails_alone() -> None:
    logits = torch.zeros(5, 50)
    logits[0, 7] = torch.nan
    logits[1, 7] = torch.inf
    logits[3, :] = -torch.inf
    hot = Sampling(temperature=1.0)
    rows = [Row(Sampling()), Row(hot), Row(hot, allowed=bits([], 50)), Row(Sampling(logprobs=2)), Row(Sampling())]
    chosen = choose(logits, rows)
    assert chosen.tokens == [-1, -1, -1, -1, 0]
    assert [error and error.split(":")[0].split(" (")[0] for error in chosen.errors] == [
        "the model's logits are not finite", "the model's logits are not finite", "no token may come next",
        "no token may come next", None,
    ]  # fmt: skip


def test_penalties_are_counted() -> None:
    """Tokens of the prompt and of the answer, by how often: the last that stays ahead tells the penalty's size."""

    def best(value: float, **asked: float) -> int:
        logits = torch.tensor([[5.0, value, -1.0, -1.5]])
        return choose(logits, [Row(Sampling(**asked), 3, [0, 2], [1, 1, 1])]).tokens[0]  # type: ignore[arg-type]

    assert [best(5 + ahead, presence_penalty=1.5) for ahead in (1.4, 1.6)] == [0, 1]
    assert [best(5 + ahead, frequency_penalty=0.5) for ahead in (1.4, 1.6)] == [0, 1]
    assert [best(5 + ahead, frequency_penalty=0.5, presence_penalty=-1.0) for ahead in (0.4, 0.6)] == [0, 1]
    assert [best(value, repetition_penalty=2.0) for value in (4.9, 5.1)] == [0, 1]  # both were said
    logits = torch.tensor([[-3.0, -2.0, -1.0, -1.5]])
    assert choose(logits, [Row(Sampling(repetition_penalty=2.0), 0, [2])]).tokens == [3]  # -1 becomes -2


def test_a_row_that_is_kept_counts_its_answer_on() -> None:
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    set_on = Sampling(temperature=1.0, presence_penalty=1.0, frequency_penalty=1.5, repetition_penalty=1.4, seed=2)
    kept, answer = Row(set_on, 0, (1, 2, 3), []), []
    for step in range(8):
        fresh = Row(set_on, step, (1, 2, 3), tuple(answer))
        kept.position = step
        [token] = choose(logits[step : step + 1], [kept]).tokens
        assert choose(logits[step : step + 1], [fresh]).tokens == [token]
        answer.append(token)
        kept.answer.append(token)  # type: ignore[attr-defined]
    kept.answer, kept.position = answer[:2], 2  # said anew from there
    assert kept.counts() == Counter(answer[:2])


def test_penalties_pass_over_tokens_that_the_head_does_not_have() -> None:
    asked = Sampling(repetition_penalty=1.5, frequency_penalty=1.0)
    logits = torch.tensor([[1.0, 3.0, 2.5]])
    assert choose(logits, [Row(asked, 1, [-1, 700], [1, 900], banned=[55])]).tokens == [2]
    assert choose(logits, [Row(asked, 0)]).tokens == [1]


def test_tokens_beyond_a_constraints_words_are_forbidden() -> None:
    logits = torch.arange(70.0)[None]
    assert choose(logits, [Row(Sampling(), allowed=np.array([0b110], np.int32))]).tokens == [2]
    assert choose(logits, [Row(Sampling(), allowed=np.array([-1], np.int32))]).tokens == [31]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature is -0.1; give 0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": True}, "temperature is True"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"temperature": 10**400}, "temperature is a number of more than 20 digits"),
    ({"top_p": 0.0}, "top_p is 0, which leaves no token"),
    ({"top_p": 1.01}, "top_p is 1.01; give more than 0"),
    ({"top_p": -math.inf}, "top_p is -inf"),
    ({"min_p": 1.5}, "min_p is 1.5; give 0"),
    ({"top_k": -1}, "top_k is -1; give at least 0"),
    ({"top_k": 2.0}, "top_k is 2.0"),
    ({"seed": 2**63}, "seed is 9223372036854775808; give a whole number of 64 bits"),
    ({"seed": 10**5000}, "seed is a number of more than 20 digits"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0; give more than 0"),
    ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
    ({"presence_penalty": 2.1}, "presence_penalty is 2.1; give -2 to 2"),
    ({"frequency_penalty": math.nan}, "frequency_penalty is nan; give -2 to 2"),
    ({"bias": ((-1, 1.0),)}, "a token of the bias is -1"),
    ({"bias": ((1, math.nan),)}, "the bias of token 1 is nan; give -100 to 100"),
    ({"bias": ((1, 101),)}, "the bias of token 1 is 101"),
    ({"bias": ((1, 1.0), (1, 2.0))}, "names a token twice"),
    ({"min_new_tokens": 300}, "min_new_tokens is 300, more than max_new_tokens, 256"),
    ({"min_new_tokens": -1}, "min_new_tokens is -1"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; give at least 1"),
    ({"logprobs": -1}, "logprobs is -1; give at least 0"),
    ({"logprobs": True}, "logprobs is True"),
]


@pytest.mark.parametrize(("values", "told"), BAD, ids=[told for _, told in BAD])
def test_settings_out_of_range_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError) as refused:
        Sampling(**values)
    assert told in str(refused.value)
    assert len(str(refused.value)) < 200


def test_a_bias_outside_of_the_vocabulary_is_refused() -> None:
    Sampling(bias=((99, 1.0),)).check_vocabulary(100)
    with pytest.raises(RequestError, match="names token 100, and the model has 100 tokens"):
        Sampling(bias=((3, 1.0), (100, 1.0))).check_vocabulary(100)
