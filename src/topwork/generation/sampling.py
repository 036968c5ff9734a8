"""How a next token is chosen.

The logits of a row become a choice in this order: repetition penalty, presence and frequency penalties, bias, what its
constraint forbids, stop tokens that may not come yet; then temperature, min_p, top_k, top_p, and a draw. Each row is
worked on alone, and what it draws is a function of its seed and of its place in its answer: what others run beside it,
in which order, and whether it was computed twice change nothing.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topwork.common.errors import RequestError
from topwork.generation.drawing import Places, Scores, largest, likely, log_total, place_of, total, uniform

COLDEST = 1e-5
"""Below this temperature the likeliest token is taken, as at 0: the others' chances are no longer numbers."""
SEEDS = (-(2**63), 2**63 - 1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; of equal ones, the lowest id.

    top_k        only so many of the likeliest (0: all)
    min_p        only those at least so likely beside the likeliest
    seed         what is drawn is a function of it and of the token's place in the answer; of several answers to one
                 prompt the first has it, the others `hashed(seed, number)` (common/seeds.py): requests with
                 neighbouring seeds then share no answers
    repetition_penalty, presence_penalty, frequency_penalty: as in transformers (prompt too) and as OpenAI's (answer)
    bias         (token, what is added to its logit)
    min_new_tokens  before so many no stop token is taken
    logprobs     how many of the likeliest are told with each token; 0 tells the token's own, None nothing

    Raises RequestError for values out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high, expected) in _RANGES.items():
            _check_number(name, getattr(self, name), low, high, expected)
        if self.top_p == 0:
            raise RequestError(f"top_p is 0, which leaves no token; give {_RANGES['top_p'][2]}")
        if self.repetition_penalty == 0:
            raise RequestError(f"repetition_penalty is 0; give {_RANGES['repetition_penalty'][2]}")
        for name, least in _COUNTS.items():
            _check_count(name, getattr(self, name), least)
        if self.logprobs is not None:
            _check_count("logprobs", self.logprobs, 0)
        if type(self.seed) is not int or not SEEDS[0] <= self.seed <= SEEDS[1]:
            raise RequestError(f"seed is {_brief(self.seed)}; give a whole number of 64 bits")
        if self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}"
            )
        for token, added in self.bias:
            _check_count("a token of the bias", token, 0)
            _check_number(f"the bias of token {token}", added, -100.0, 100.0, "-100 to 100")
        if len({token for token, _ in self.bias}) < len(self.bias):
            raise RequestError("the bias names a token twice; give each token once")

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises RequestError for a bias of a token that a model of `vocabulary` tokens does not have."""
        outside = [token for token, _ in self.bias if token >= vocabulary]
        if outside:
            raise RequestError(
                f"the bias names token {_brief(outside[0])}, and the model has {vocabulary} tokens; give ids below that"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest is taken."""
        return self.temperature < COLDEST

    @property
    def penalizes(self) -> bool:
        """Whether what was said before changes a choice."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, 100.0, "0 (the likeliest) to 100"),
    "top_p": (0.0, 1.0, "more than 0 and at most 1 (all)"),
    "min_p": (0.0, 1.0, "0 (all) to 1"),
    "repetition_penalty": (0.0, math.inf, "more than 0; 1 changes nothing"),
    "presence_penalty": (-2.0, 2.0, "-2 to 2"),
    "frequency_penalty": (-2.0, 2.0, "-2 to 2"),
}
_COUNTS = {"max_new_tokens": 1, "top_k": 0, "min_new_tokens": 0}


def _check_number(name: str, value: object, low: float, high: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value == math.inf:
        raise RequestError(f"{name} is {_brief(value)}; give {expected}")


def _check_count(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise RequestError(f"{name} is {_brief(value)}; give at least {least}")


def _brief(value: object) -> str:
    """A few letters of it: a number of 5,000 digits cannot even be written."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    told = repr(value)
    return told if len(told) <= 40 else told[:37] + "…"


@dataclass
class Row:
    """One row of logits: what is chosen by, and where in its answer it stands.

    position  how many tokens of the answer came before
    prompt, answer  the tokens so far, for penalties
    allowed   a bit for each token, as Constraint.allowed gives them; tokens beyond the last word are forbidden
    banned    tokens that may not come (stop tokens before min_new_tokens)

    A Row may be kept from step to step, its answer appended to: what penalties look at is then counted once.
    """

    sampling: Sampling
    position: int = 0
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    allowed: NDArray[np.int32] | None = None
    banned: Collection[int] = ()
    _prompt_tokens: set[int] | None = field(default=None, init=False, repr=False, compare=False)
    _counts: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _counted: int = field(default=0, init=False, repr=False, compare=False)

    @property
    def plain(self) -> bool:
        """Whether the choice is the largest of the logits as they are."""
        return self.sampling.greedy and not self.changes

    @property
    def changes(self) -> bool:
        """Whether logits are changed before a choice."""
        return bool(self.allowed is not None or self.sampling.penalizes or self.sampling.bias or self.banned)

    def prompt_tokens(self) -> set[int]:
        """The prompt's tokens, each once."""
        if self._prompt_tokens is None:
            self._prompt_tokens = set(self.prompt)
        return self._prompt_tokens

    def counts(self) -> dict[int, int]:
        """How often each token is in the answer."""
        if self._counted > len(self.answer):
            self._counts, self._counted = {}, 0
        for token in self.answer[self._counted :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._counted = len(self.answer)
        return self._counts


@dataclass(frozen=True)
class Chosen:
    """What was chosen for each row.

    tokens     -1 where nothing could be
    errors     why not, for that row alone
    logprobs   the token's log-probability by the logits as they came, where the Sampling asks
    likeliest  as many (token, log-probability) as it asks for, likeliest first, of equal ones the lowest id
    """

    tokens: list[int]
    errors: list[str | None]
    logprobs: list[float | None]
    likeliest: list[tuple[tuple[int, float], ...]]


def choose(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """A token for each row of fp32 logits [n, V]. It is the same, to the bit, whatever the other rows are.

    On a CPU a row of which the largest logit is taken costs one reading of it. On a GPU such rows stay there, and the
    others are worked on by the host all the same.
    """
    if len(logits) != len(rows):
        raise ValueError(f"{len(logits)} rows of logits for {len(rows)} rows to choose")
    if logits.device.type == "cpu":
        outcomes = [_outcome(scores, row) for scores, row in zip(logits.float().contiguous().numpy(), rows)]
    else:
        outcomes = _on_device(logits, rows)
    tokens, errors, logprobs, likeliest = (list(each) for each in zip(*outcomes)) if outcomes else ([], [], [], [])
    return Chosen(tokens, errors, logprobs, likeliest)


class _Outcome(NamedTuple):
    token: int
    error: str | None = None
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def _on_device(logits: Tensor, rows: Sequence[Row]) -> list[_Outcome]:
    """Only numbers come to the host for rows of which the largest logit is taken, whole rows for the others."""
    largest, at = logits.max(-1)  # of equal ones the first, as numpy's
    told = torch.stack([at.double(), largest.double()]).cpu()  # both in one, for which the host waits once
    outcomes = [_taken(int(token), value) for token, value in told.t().tolist()]
    others = [number for number, row in enumerate(rows) if not row.plain or row.sampling.logprobs is not None]
    if others:
        fetched = logits[torch.tensor(others, device=logits.device)].float().cpu().numpy()
        for number, scores in zip(others, fetched):
            outcomes[number] = _outcome(scores, rows[number])
    return outcomes


def _outcome(given: Scores, row: Row) -> _Outcome:
    sampling = row.sampling
    scores = _changed(given, row) if row.changes else given
    at = int(scores.argmax())
    outcome = _taken(at, float(scores[at]))
    if outcome.error is not None:
        return outcome
    if not sampling.greedy:
        token = _drawn(scores, sampling, uniform(sampling.seed, row.position))
        outcome = _Outcome(token)
    if sampling.logprobs is None:
        return outcome
    whole = log_total(given)
    likeliest = tuple((int(token), float(given[token]) - whole) for token in largest(given, sampling.logprobs))
    return outcome._replace(logprob=float(given[outcome.token]) - whole, likeliest=likeliest)


def _taken(token: int, value: float) -> _Outcome:
    """The token of the largest logit, unless that is no number to choose by."""
    if math.isfinite(value):
        return _Outcome(token)
    if value == -math.inf:
        return _Outcome(-1, "no token may come next: all are forbidden by the constraint, the bias or the stop tokens")
    return _Outcome(-1, f"the model's logits are not finite ({value}), so nothing can be chosen by them")


def _changed(given: Scores, row: Row) -> Scores:
    """The logits after penalties, bias and what is forbidden."""
    scores, sampling = given.copy(), row.sampling
    if sampling.repetition_penalty != 1:
        seen = _places(row.prompt_tokens() | row.counts().keys(), len(scores))
        factor = np.float32(sampling.repetition_penalty)
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / factor, scores[seen] * factor)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = {token: count for token, count in row.counts().items() if 0 <= token < len(scores)}
        times = np.fromiter(counts.values(), np.float32, len(counts))
        penalty = np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * times
        scores[_places(counts, len(scores))] -= penalty
    for token, added in sampling.bias:
        scores[token] += np.float32(added)
    if row.allowed is not None:
        bits = np.unpackbits(row.allowed.view(np.uint8), count=len(scores), bitorder="little")
        scores[bits == 0] = -np.inf
    if row.banned:
        scores[_places(row.banned, len(scores))] = -np.inf
    return scores


def _places(tokens: Collection[int], vocabulary: int) -> Places:
    """Those of the tokens that the logits have a column for, as an index."""
    return np.fromiter((token for token in tokens if 0 <= token < vocabulary), np.intp)


def _drawn(scores: Scores, sampling: Sampling, part: float) -> int:
    """The token in whose share the `part` (0 to 1) of all falls, after temperature, min_p, top_k and top_p."""
    tokens: Places | None = None  # all
    if 0 < sampling.top_k < len(scores):
        tokens = np.sort(largest(scores, sampling.top_k))
        scores = scores[tokens]
    values = scores - scores.max()
    values *= np.float32(1 / sampling.temperature)
    if sampling.min_p > 0:  # what top_k leaves are the largest as well, so it is all the same which is first
        near = np.flatnonzero(values >= np.float32(math.log(sampling.min_p)))
        tokens, values = near if tokens is None else tokens[near], values[near]
    shares = np.exp(values)
    if sampling.top_p < 1:
        near = likely(values, shares, sampling.top_p * total(shares))
        tokens, shares = near if tokens is None else tokens[near], shares[near]
    at = place_of(shares, part)
    return at if tokens is None else int(tokens[at])
