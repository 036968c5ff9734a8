"""Generation over flat batches: prompts are read in one batch, then every sequence goes on by one token a pass.

Requests may be for different adapters, or for none. Those that are done leave the batch, so no work is spent on them.
Evaluation, chat and rollouts share the engine; `generate` is for a list of prompts that are all there at once.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from topwork.common.errors import RequestError
from topwork.generation.cache import KeyValueCache
from topwork.generation.sampling import Sampling
from topwork.models.base import Base
from topwork.models.held import held_for_inference
from topwork.ops.batch import Batch, Segment
from topwork.ops.context import PassContext
from topwork.ops.host import sent

PROMPT_TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, the adapter that is to go on with them (None: the bare base), the tokens that end it, and
    how the others are chosen."""

    prompt: Sequence[int]
    adapter: str | None = None
    stop_ids: Collection[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Event:
    """What a step brought for the request of this id: a token, its end, or both.

    ended  None while it goes on; "stop" at a stop token, which is not told; "length" with the last token that its
           Sampling or the model's context has room for; "cancelled"
    """

    id: int
    token: int | None = None
    ended: Literal["stop", "length", "cancelled"] | None = None


@dataclass
class _Sequence:
    """A request on its way: the tokens that it may still get."""

    id: int
    request: Request
    left: int


@dataclass
class _Running:
    """Requests whose prompts were read together, their cache, what is held until the last has ended, and the last token
    [B] of each, yet to be read."""

    sequences: list[_Sequence]
    cache: KeyValueCache
    held: ExitStack
    last: Tensor = field(init=False)


class Engine:
    """Runs requests, up to `batch_size` at once: submit them, and call `step` while `busy`.

    What is submitted waits until the batch that runs has ended; then the first `batch_size` of those that wait run
    together, and each leaves when it ends. An adapter's weights may change only while nothing runs, and its dropout is
    to be off (`Adapters.evaluating`): a pass here tells nothing to draw from. Not for several threads at once.
    """

    def __init__(self, base: Base, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; give at least 1 sequence")
        self.base, self.batch_size = base, batch_size
        self._waiting: list[_Sequence] = []
        self._running: _Running | None = None
        self._cancelled: list[Event] = []
        self._sampler = _Sampler(base.device)
        self._ids = 0

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to tell."""
        return bool(self._waiting or self._running or self._cancelled)

    def submit(self, request: Request) -> int:
        """Take a request; its id in the events to come. Raises RequestError for an empty prompt, for one that leaves no
        room in the model's context, and where no token is asked for."""
        check_prompt(self.base, request)
        most = min(request.sampling.max_new_tokens, _room(self.base, request.adapter) - len(request.prompt))
        self._waiting.append(_Sequence(self._ids, request, most))
        self._ids += 1
        return self._ids - 1

    def cancel(self, id: int) -> None:
        """End a request; what it holds is free at once, and the next step tells of it. Raises RequestError for an id
        that was not given out or has ended."""
        running = self._running.sequences if self._running else []
        if id not in [sequence.id for sequence in (*self._waiting, *running)]:
            told = "has ended already" if 0 <= id < self._ids else "was never given out"
            raise RequestError(f"request {id} cannot be cancelled: it {told}")
        self._waiting = [sequence for sequence in self._waiting if sequence.id != id]
        self._keep([row for row, sequence in enumerate(running) if sequence.id != id])
        self._cancelled.append(Event(id, ended="cancelled"))

    @torch.no_grad()
    def step(self) -> list[Event]:
        """A token for every request that runs, or, where none does, the prompts that come next are read and get their
        first. Tells what came of it, in the order of the batch, after what was cancelled since the last step. Where it
        raises, what ran is lost, and what waits may still run."""
        try:
            came = self._tokens() if self._running or self._waiting else []
        except BaseException:
            self.close()
            raise
        events, self._cancelled = [*self._cancelled, *came], []
        return events

    def close(self) -> None:
        """Forget what runs, and let go of what is held for it; what waits may still run."""
        self._end()

    def _tokens(self) -> list[Event]:
        running = self._running
        if running is None:
            running, logits = self._begin()
        else:
            logits = _one_token(self.base, running.last, _adapters(running.sequences), running.cache)
        running.last = self._sampler.choose(logits, [each.request.sampling for each in running.sequences])
        came = [_event(each, token) for each, token in zip(running.sequences, running.last.cpu().tolist())]
        self._keep([row for row, event in enumerate(came) if event.ended is None])
        return came

    def _begin(self) -> tuple[_Running, Tensor]:
        """The next batch, which runs from here to `_end`, and the logits [B, V] after its prompts."""
        batch = sorted(self._waiting[: self.batch_size], key=lambda each: likeness(each.request))
        adapters, prompts = _adapters(batch), [each.request.prompt for each in batch]
        lengths = [len(prompt) + self.base.virtual_tokens(adapter) for prompt, adapter in zip(prompts, adapters)]
        cache = KeyValueCache(lengths, self.base.device)
        with ExitStack() as held:
            held.enter_context(held_for_inference(self.base.module))
            logits = _read_prompts(self.base, prompts, adapters, cache)
            self._running = _Running(batch, cache, held.pop_all())
        del self._waiting[: self.batch_size]  # not before they are read: where that failed they still wait
        return self._running, logits

    def _keep(self, rows: list[int]) -> None:
        """Only these of the batch go on."""
        running = self._running
        if running is None or len(rows) == len(running.sequences):
            return
        if not rows:
            self._end()
            return
        running.cache.keep(rows)
        at = sent(torch.tensor(rows), self.base.device)
        running.last, running.sequences = running.last[at], [running.sequences[row] for row in rows]

    def _end(self) -> None:
        """Nothing runs: weights may change, and seeds that no request waits with begin anew."""
        if self._running is not None:
            self._running.held.close()
        self._running = None
        self._sampler.keep({each.request.sampling.seed for each in self._waiting})


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    stop_ids: Collection[int],
    sampling: Sampling = Sampling(),
    batch_size: int = 64,
    on_finished: Callable[[int], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the stop token that ended it.

    adapters: one name (or None for the bare base) per prompt. `on_finished(count)` is told how many sequences came to
    their end, `on_token(prompt's index, token)` every token as it comes. Raises RequestError for an empty prompt and
    for one that leaves no room in the model's context.
    """
    stops, engine = frozenset(stop_ids), Engine(base, batch_size)
    requests = [Request(prompt, adapter, stops, sampling) for prompt, adapter in zip(prompts, adapters, strict=True)]
    for index, request in enumerate(requests):
        check_prompt(base, request, f"prompt {index}")
    order = sorted(range(len(requests)), key=lambda index: likeness(requests[index]))
    index_of = {engine.submit(requests[index]): index for index in order}
    results: list[list[int]] = [[] for _ in prompts]
    try:
        while engine.busy:
            events = engine.step()
            for event in events:
                if event.token is not None:
                    results[index_of[event.id]].append(event.token)
                    if on_token is not None:
                        on_token(index_of[event.id], event.token)
            ended = sum(event.ended is not None for event in events)
            if on_finished is not None and ended:
                on_finished(ended)
    finally:  # a callback may have raised
        engine.close()
    return results


def likeness(request: Request) -> tuple[str, int]:
    """Sorted by it, like adapters and like lengths stand together: fewer segments, less spread in the cache."""
    return request.adapter or "", len(request.prompt)


def check_prompt(base: Base, request: Request, called: str = "the prompt") -> None:
    """Raises RequestError where a prompt is empty or leaves no room, or where no token is asked for."""
    length, room = len(request.prompt), _room(base, request.adapter)
    if not 0 < length < room:
        raise RequestError(
            f"{called} has {length} tokens; the context of {base.name} is {room}"
            f"{' without virtual tokens' if room < base.context_length else ''}, and a prompt must be shorter and "
            "not empty"
        )
    if request.sampling.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {request.sampling.max_new_tokens}; give at least 1")


def _event(sequence: _Sequence, token: int) -> Event:
    """What this token is to its request, counted as one of those that it may get."""
    if token in sequence.request.stop_ids:
        return Event(sequence.id, None, "stop")
    sequence.left -= 1
    return Event(sequence.id, token, None if sequence.left else "length")


def _room(base: Base, adapter: str | None) -> int:
    """Positions of the context that are left for text."""
    return base.context_length - base.virtual_tokens(adapter)


def _adapters(sequences: Sequence[_Sequence]) -> list[str | None]:
    return [sequence.request.adapter for sequence in sequences]


def _read_prompts(
    base: Base, prompts: Sequence[Sequence[int]], adapters: list[str | None], cache: KeyValueCache
) -> Tensor:
    """Fill the cache; the logits [B, V] after each prompt's last token."""
    logits, first = [], 0
    while first < len(prompts):
        last, total = first + 1, len(prompts[first])
        while last < len(prompts) and total + len(prompts[last]) <= PROMPT_TOKENS_PER_PASS:
            total += len(prompts[last])
            last += 1
        lengths = [len(prompt) for prompt in prompts[first:last]]
        tokens = torch.tensor([token for prompt in prompts[first:last] for token in prompt])
        positions = torch.cat([torch.arange(length) for length in lengths])
        context = base.pass_over(_batch(tokens, positions, lengths, adapters[first:last]).to(base.device))
        assert context.batch is not None
        ends = torch.tensor(context.batch.cu_seqlens[1:]) - 1
        cache.reading = (context.batch.cu_seqlens, first)
        hidden = base.run(replace(context, cache=cache, given_rows=None))
        logits.append(base.logits_of(context.batch, hidden, ends))
        first = last
    cache.reading = None
    return torch.cat(logits)


def _one_token(base: Base, tokens: Tensor, adapters: list[str | None], cache: KeyValueCache) -> Tensor:
    batch = _batch(tokens, cache.lengths, [1] * len(tokens), adapters)
    hidden = base.run(PassContext(batch, cache=cache))
    logits = base.logits_of(batch, hidden, torch.arange(len(tokens)))
    cache.advance()
    return logits


def _batch(tokens: Tensor, positions: Tensor, lengths: list[int], adapters: list[str | None]) -> Batch:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    segments, row = [], 0
    for adapter, members in groupby(adapters):
        count = len(list(members))
        segments.append(Segment(bounds[row], bounds[row + count], adapter))
        row += count
    return Batch(tokens, positions, tuple(bounds), tuple(segments))


class _Sampler:
    """Chooses the tokens of sequences that run together, each by its own Sampling.

    Those of one seed draw from one generator, which goes on from token to token and begins anew once it is forgotten:
    what a sequence draws depends on who else of its seed runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generators: dict[int, torch.Generator] = {}

    def choose(self, logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
        """A token for each row of fp32 logits [B, V]: [B] int64. Rows of like Sampling are drawn in one call."""
        alike: dict[Sampling, list[int]] = {}
        for row, sampling in enumerate(samplings):
            alike.setdefault(sampling, []).append(row)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for sampling, rows in alike.items():
            at = slice(None) if len(alike) == 1 else sent(torch.tensor(rows), logits.device)
            tokens[at] = _choose(logits[at], sampling, self._generator(sampling.seed))
        return tokens

    def keep(self, seeds: Collection[int]) -> None:
        """Forget the generators of all other seeds."""
        self._generators = {seed: generator for seed, generator in self._generators.items() if seed in seeds}

    def _generator(self, seed: int) -> torch.Generator:
        if seed not in self._generators:
            self._generators[seed] = torch.Generator(self.device).manual_seed(seed)
        return self._generators[seed]


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """A token for each row of fp32 logits [B, V]: [B] int64."""
    if sampling.temperature <= 0:
        return logits.argmax(-1)
    shares = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, index = shares.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > sampling.top_p] = 0
        shares = torch.zeros_like(shares).scatter_(-1, index, ordered)
    return torch.multinomial(shares, 1, generator=generator).squeeze(-1)
