"""Generation: requests come and go at any step, and all that run share the passes, whatever their adapters are.

Evaluation, chat, rollouts and the server share the engine; `generate` is for a list of prompts that are all there at
once. What an answer says depends on its own request alone: greedy and seeded, it is the same tokens whoever else runs,
however its prompt is cut into passes, after it had to give way, and where its prompt begins with what is cached.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from topwork.adapters.graft import adapted_layers
from topwork.adapters.module import AdaptedLayer
from topwork.common.errors import AdapterError, RequestError, RunError, did_you_mean
from topwork.common.memory import memory_for
from topwork.common.seeds import hashed
from topwork.generation.answer import Answer, blocks_of
from topwork.generation.blocks import Blocks
from topwork.generation.chains import Chains
from topwork.generation.passes import VIRTUAL
from topwork.generation.pool import KeyValuePool, pool_blocks
from topwork.generation.requests import Ended, Event, Request
from topwork.generation.runners import runner_for
from topwork.generation.sampling import Chosen, Row, Sampling, choose
from topwork.generation.scheduler import Scheduler
from topwork.models.base import Base
from topwork.ops.host import sent
from topwork.ops.paged import BLOCK
from topwork.ops.threads import RecurringThreads


@dataclass(frozen=True)
class EngineSettings:
    """How much runs at once.

    batch_size        sequences that run together
    max_batch_tokens  rows of a step, at most as many as the runner takes at once (None)
    kv_tokens         tokens whose keys and values are held, of all sequences together and of what is cached; None:
                      `batch_size` whole contexts, but no more than a quarter of the free memory, and at least one
                      whole context. On a CPU memory is taken as it is written.

    Raises RequestError for numbers below one.
    """

    batch_size: int = 64
    max_batch_tokens: int | None = None
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, what in (("batch_size", "sequence"), ("max_batch_tokens", "token"), ("kv_tokens", "token")):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise RequestError(f"{name} is {given}; give at least 1 {what}")


@dataclass(frozen=True)
class EngineStatistics:
    """What runs, what waits, how the blocks of the pool are used (those of running sequences are neither free nor
    cached), and since the engine was made: tokens that were looked for in the prefix cache and found there, how often
    a sequence had to give its blocks to another, and tokens of prompts that were submitted and of answers."""

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int


class Engine:
    """Runs requests: submit them, and call `step` while `busy`.

    An adapter's weights may change only while nothing runs, and its dropout is to be off (`Adapters.evaluating`): a
    pass here tells nothing to draw from. `contents` says by an adapter's name what it is (a hash of its files): what is
    cached of its prompts is then found again as long as there is room. Of one that is not in it nothing is kept beyond
    the time something runs, since its weights may change then. Not for several threads at once.
    """

    def __init__(
        self,
        base: Base,
        settings: EngineSettings = EngineSettings(),
        contents: Mapping[str, str] | None = None,
    ) -> None:
        self.base, self.settings = base, settings
        self._contents = {} if contents is None else contents
        self._pool = KeyValuePool(pool_blocks(base, settings.batch_size, settings.kv_tokens))
        self._runner = runner_for(base, self._pool, self._contents)
        rows = min(settings.max_batch_tokens or self._runner.most_rows, self._runner.most_rows)
        blocks = Blocks(self._pool.blocks)
        self._scheduler = Scheduler(blocks, settings.batch_size, rows)
        self._chains = Chains(base.fingerprint, self._contents, blocks)
        self._vocabulary = base.module.config.get_text_config().vocab_size
        self._layers: dict[str, AdaptedLayer] = {}
        self._told: list[Event] = []
        self._begun = False
        self._threads = RecurringThreads(base.device)
        self._ids = self._prompt_tokens = self._generated_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to tell."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._told)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn, those that had to give way among them."""
        return len(self._scheduler.waiting)

    def statistics(self) -> EngineStatistics:
        """Of this moment."""
        scheduler, blocks, counts = self._scheduler, self._scheduler.blocks, self._scheduler.counts
        return EngineStatistics(
            len(scheduler.running), len(scheduler.waiting), blocks.total, blocks.free, blocks.cached,
            counts.prefix_queries, counts.prefix_hits, counts.preemptions, self._prompt_tokens, self._generated_tokens,
        )  # fmt: skip

    def submit(self, request: Request) -> int:
        """Take a request; its id in the events to come. Raises RequestError for an adapter that is not there, an empty
        prompt, one that leaves no room in the model's context or in the pool, one with tokens that the model does not
        have, and where no token is asked for."""
        if not self._is_grafted(request.adapter):
            known = sorted(self._layers)
            raise AdapterError(
                f"no adapter {request.adapter!r} is on {self.base.name}{did_you_mean(str(request.adapter), known)}; "
                f"there are {known or 'none'}, and None is the bare base"
            )
        check_prompt(self.base, request)
        virtual = self.base.virtual_tokens(request.adapter)
        tokens = [VIRTUAL] * virtual + [int(token) for token in request.prompt]
        self._check(request, tokens)
        room = min(self.base.context_length, self._pool.blocks * BLOCK + 1) - len(tokens)
        said: list[int] = []
        row = Row(request.sampling, prompt=tokens[virtual:], answer=said)
        most = min(request.sampling.max_new_tokens, room)
        root, family = self._chains.root(request.adapter, request.salt), self._chains.family(request.adapter)
        answer = Answer(self._ids, request, tokens, most, root, family, row, said)
        self._scheduler.waiting.add(answer)
        self._ids += 1
        self._prompt_tokens += len(request.prompt)
        return answer.id

    def cancel(self, id: int) -> None:
        """End a request; what it holds is free at once, and the next step tells of it. Raises RequestError for an id
        that was not given out or has ended."""
        answer = self._scheduler.running.get(id) or next((a for a in self._scheduler.waiting if a.id == id), None)
        if answer is None:
            told = "has ended already" if 0 <= id < self._ids else "was never given out"
            raise RequestError(f"request {id} cannot be cancelled: it {told}")
        self._scheduler.leave(answer)
        self._told.append(Event(id, ended="cancelled"))
        self._rest()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """A pass: a token for those that are decoded, and as much of the prompts that are read as there is room for.
        Tells what came of it, in the order of the pass, after what was cancelled since the last step.

        Where it raises, what ran is lost, and what waits may still run. A constraint that raises, or that leaves
        nothing to choose, fails its own request alone.
        """
        try:
            came = self._pass() if self._scheduler.waiting or self._scheduler.running else []
        except BaseException:
            self.close()
            raise
        events, self._told = [*self._told, *came], []
        return events

    def close(self) -> None:
        """Forget what runs, and let go of what is held for it; what waits may still run."""
        begun = [answer for answer in self._scheduler.waiting if answer.begun]
        for answer in (*self._scheduler.running.values(), *begun):
            self._scheduler.leave(answer)
        self._rest()

    def forget(self, adapter: str) -> None:
        """The adapter is gone: nothing that is cached of its prompts is found any more, for requests of any salt, and
        nothing that was made of its weights is kept."""
        self._chains.forget(adapter)
        self._runner.forget(adapter)

    def _pass(self) -> list[Event]:
        if not self._begun:
            self._threads.begin()
            self._runner.begin()
            self._begun = True
        self._threads.look()  # answers do not depend on it
        plan = self._scheduler.plan()
        gone = [answer for answer in plan if not self._is_grafted(answer.request.adapter)]
        events = [self._failed(answer, "its adapter has been removed") for answer in gone]
        plan = {answer: count for answer, count in plan.items() if answer not in gone}
        rows = [answer.rows(count) for answer, count in plan.items()]
        if rows:
            logits = self._runner.run(rows)
            self._scheduler.ran(plan)
            events += self._chosen([answer for answer, each in zip(plan, rows) if each.wanted], logits)
        self._rest()
        return events

    def _chosen(self, wanted: list[Answer], logits: Tensor) -> list[Event]:
        """What logits [n, V] bring to those that asked for them, in their order."""
        errors = [answer.ask() for answer in wanted]
        going = [number for number, error in enumerate(errors) if error is None]
        if len(going) < len(wanted):
            logits = logits[sent(torch.tensor(going, dtype=torch.int64), logits.device)]
        chosen = choose(logits, [wanted[number].row for number in going])
        at = {number: place for place, number in enumerate(going)}
        return [
            self._came(answer, chosen, at[number]) if error is None else self._failed(answer, error)
            for number, (answer, error) in enumerate(zip(wanted, errors))
        ]

    def _came(self, answer: Answer, chosen: Chosen, at: int) -> Event:
        """What was chosen at this place is the answer's next token, or its end."""
        request, token = answer.request, chosen.tokens[at]
        wrong = chosen.errors[at]
        if wrong is not None:
            return self._failed(answer, wrong)
        if token in request.stop_ids:
            self._scheduler.leave(answer)
            return Event(answer.id, None, "stop")
        self._generated_tokens += 1
        wrong = answer.say(token)
        if wrong is not None:
            return self._failed(answer, wrong)
        ended: Ended | None = "stop" if answer.complete else None if answer.left else "length"
        if ended is not None:
            self._scheduler.leave(answer)
        began = answer.began if len(answer.said) == 1 else None
        return Event(answer.id, token, ended, chosen.logprobs[at], chosen.likeliest[at], began)

    def _failed(self, answer: Answer, error: str) -> Event:
        self._scheduler.leave(answer)
        return Event(answer.id, ended="failed", error=error)

    def _rest(self) -> None:
        """Where nothing runs any more, weights may change: nothing of them is held."""
        scheduler = self._scheduler
        if scheduler.running or any(answer.begun for answer in scheduler.waiting):
            return
        if self._begun:
            self._runner.end()
            self._threads.end()
            self._begun = False
        self._chains.rest(answer.family for answer in scheduler.waiting)
        if not scheduler.blocks.cached:
            self._pool.clear()

    def _is_grafted(self, adapter: str | None) -> bool:
        if adapter is None:
            return True
        layer = self._layers.get(adapter)
        if layer is None or adapter not in layer.adapters:
            layers = adapted_layers(self.base.module).values()
            self._layers = {name: layer for layer in layers for name in layer.adapters}
        return adapter in self._layers

    def _check(self, request: Request, tokens: Sequence[int]) -> None:
        """Raises RequestError where a request could never run; `tokens` with the virtual ones."""
        request.sampling.check_vocabulary(self._vocabulary)
        strange = [token for token in request.prompt if not 0 <= token < self._vocabulary]
        if strange:
            raise RequestError(
                f"the prompt has token {str(strange[0])[:40]}, and {self.base.name} has {self._vocabulary} tokens, 0 "
                f"to {self._vocabulary - 1}; was it another model's tokenizer?"
            )
        if blocks_of(len(tokens)) > self._pool.blocks:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, virtual ones included, and keys and values are held of "
                f"{self._pool.blocks * BLOCK} in all; raise kv_tokens, or give a shorter prompt"
            )


@memory_for("writing answers", "a smaller batch of answers (evaluation.batch_size) or fewer new tokens take less")
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
    their end, `on_token(prompt's index, token)` every token as it comes. A prompt that is given again for the same
    adapter draws by another seed. Raises RequestError for an empty prompt, for one that leaves no room
    in the model's context and for an adapter that is not there, and RunError where nothing can be chosen.
    """
    stops, engine = frozenset(stop_ids), Engine(base, EngineSettings(batch_size))
    requests: list[Request] = []
    seen: Counter[tuple[tuple[int, ...], str | None]] = Counter()
    for index, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        number, seen[tuple(prompt), adapter] = seen[tuple(prompt), adapter], seen[tuple(prompt), adapter] + 1
        own = replace(sampling, seed=hashed(sampling.seed, number) if number else sampling.seed)
        requests.append(Request(prompt, adapter, stops, own))
        check_prompt(base, requests[-1], f"prompt {index}")
    order = sorted(range(len(requests)), key=lambda index: likeness(requests[index]))
    index_of = {engine.submit(requests[index]): index for index in order}
    results: list[list[int]] = [[] for _ in prompts]
    try:
        while engine.busy:
            events = engine.step()
            for event in events:
                if event.ended == "failed":
                    raise RunError(f"prompt {index_of[event.id]}: {event.error}")
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
    """Sorted by it, like adapters and like lengths stand together: fewer adapters share a pass."""
    return request.adapter or "", len(request.prompt)


def check_prompt(base: Base, request: Request, called: str = "the prompt") -> None:
    """Raises RequestError where a prompt is empty or leaves no room, or where no token is asked for."""
    virtual = base.virtual_tokens(request.adapter)
    length, room = len(request.prompt), base.context_length - virtual
    if not 0 < length < room:
        raise RequestError(
            f"{called} has {length} tokens; the context of {base.name} is {room}"
            f"{' without virtual tokens' if virtual else ''}, and a prompt must be shorter and not empty"
        )
    if request.sampling.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {request.sampling.max_new_tokens}; give at least 1")
