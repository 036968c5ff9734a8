"""`topwork chat --compare A B`: the same words to two models over one base, which answer in one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import load_adapter
from topwork.common.errors import RequestError
from topwork.common.os_errors import explained
from topwork.data.chat.template import ChatTemplate, stop_ids
from topwork.data.conversations import Message
from topwork.generation.engine import Engine
from topwork.generation.requests import Request
from topwork.generation.sampling import Sampling
from topwork.generation.text import TextStream
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.run.folder import ADAPTER_NAME, RECIPE, TEMPLATE
from topwork.run.given import ADAPTER_CONFIG, Given, given_adapter, is_adapter
from topwork.run.loading import open_base
from topwork.run.opened import OpenRun, open_given, system_of
from topwork.run.vocabulary import base_id, shared_base

BASE = "base"
OTHER_NAME = "other"
Log = Callable[[str], None]


@dataclass
class Side:
    """One of the two: what it is called, its adapter on the base (None: the base alone), how it is prompted, and what
    was said so far."""

    label: str
    adapter: str | None
    template: ChatTemplate
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def prompt(self, text: str, system: str | None) -> list[int]:
        """Token ids, after what was said before; `system` None takes its own."""
        said = self.system if system is None else system
        messages = [*([Message("system", said)] if said else []), *self.turns, Message("user", text)]
        return self.template.prompt_ids(messages)


@dataclass
class Pair:
    """Two sides over one base."""

    base: Base
    sides: tuple[Side, Side]
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None

    def __post_init__(self) -> None:
        self._engine = Engine(self.base)

    def say(self, text: str, on_text: Callable[[int, str], None] = lambda *_: None) -> list[str]:
        """Both answers, in one batch; `on_text(side, piece)` gets them as they come. Raises RequestError where a side
        has no room left, and then neither has been asked."""
        prompts = [side.prompt(text, self.system) for side in self.sides]
        requests = [
            Request(prompt, side.adapter, frozenset(stop_ids(side.template)), self.sampling)
            for prompt, side in zip(prompts, self.sides)
        ]
        answers = self._answers(requests, on_text)
        for side, answer in zip(self.sides, answers):
            side.turns += [Message("user", text), Message("assistant", answer)]
        return answers

    def forget(self) -> None:
        """Begin anew."""
        for side in self.sides:
            side.turns.clear()

    def _answers(self, requests: Sequence[Request], on_text: Callable[[int, str], None]) -> list[str]:
        answers = ["" for _ in requests]
        streams = [TextStream(self.base.tokenizer) for _ in requests]

        def told(side: int, piece: str) -> None:
            answers[side] += piece
            if piece:
                on_text(side, piece)

        sides: dict[int, int] = {}
        try:
            for side, request in enumerate(requests):
                sides[self._engine.submit(request)] = side
            while self._engine.busy:
                for event in self._engine.step():
                    if event.token is not None:
                        told(sides[event.id], streams[sides[event.id]].add(event.token))
        except BaseException:  # what was handed in must not answer the next question
            self._engine.close()
            self._engine = Engine(self.base)
            raise
        for side, stream in enumerate(streams):
            told(side, stream.finish())
        return answers


def with_and_without(run: OpenRun, sampling: Sampling, system: str | None = None) -> Pair:
    """A run without its adapter and with it."""
    sides = (
        Side("without the adapter", None, run.template, run.system),
        Side("with the adapter", ADAPTER_NAME, run.template, run.system),
    )
    return Pair(run.base, sides, sampling, system)


def names_a_side(text: str) -> bool:
    """Whether this is meant as one of two models, and not as a question: `base`, a folder, or what looks like one."""
    return text == BASE or Path(text).is_dir() or ("/" in text and not any(letter.isspace() for letter in text))


@explained()
def open_pair(
    names: tuple[str, str], sampling: Sampling = Sampling(), system: str | None = None, model: str | None = None,
    force: bool = False, log: Log = print,
) -> Pair:  # fmt: skip
    """Two of: a run's folder or a checkpoint's in it, a PEFT folder, `base`.

    The base is the first run's, as it was held in training; without a run it is the one that the first PEFT folder
    names. `model` is where it is, if not there. Raises RequestError where both are the base or the same folder, and
    AdapterError where one is another base's.
    """
    if names[0] == names[1] or Path(names[0]).resolve() == Path(names[1]).resolve():
        raise RequestError(f"--compare {names[0]} {names[1]}: these are the same; give two")
    given = [_given(name, model, log) for name in names]
    lead = next(iter(sorted((one.recipe is None, at) for at, one in enumerate(given) if one is not None)))[1]
    other = 1 - lead
    base, adapters, first = _lead(names[lead], _grown(given[lead], given[other]), force, log)
    sides = {lead: first, other: _side(names[other], given[other], base, adapters, first, force, log)}
    return Pair(base, _labelled(sides[0], sides[1]), sampling, system)


def _grown(given: Given | None, other: Given | None) -> Given | None:
    """With a base that has rows for the tokens of both."""
    models = [one.model for one in (given, other) if one is not None]
    return given if given is None else replace(given, model=shared_base(models))


def _given(name: str, model: str | None, log: Log) -> Given | None:
    """None is the base alone."""
    if is_adapter(Path(name)):
        return given_adapter(name, model, log=log)
    if name == BASE:
        return None
    raise RequestError(
        f"--compare {name}: neither a run's folder ({RECIPE}) nor an adapter's ({ADAPTER_CONFIG}); give two of these, "
        f"or one and `{BASE}`"
    )


def _lead(name: str, given: Given | None, force: bool, log: Log) -> tuple[Base, Adapters, Side]:
    """The base, and the side that decides which it is."""
    assert given is not None
    if given.recipe is not None:
        run = open_given(given, force=force, log=log)
        return run.base, run.adapters, Side(name, ADAPTER_NAME, run.template, run.system)
    base = open_base(given.model.model_copy(update={"dtype": ModelConfig.model_fields["dtype"].default}), log)
    adapters = Adapters(base.module, base.tokenizer)
    return base, adapters, _grafted(name, given, base, adapters, ADAPTER_NAME, force, log)


def _side(
    name: str, given: Given | None, base: Base, adapters: Adapters, other: Side, force: bool, log: Log
) -> Side:  # fmt: skip
    """The bare base is prompted as the other side is, so that what differs is the adapter."""
    if given is None:
        return Side(BASE, None, other.template, other.system)
    return _grafted(name, given, base, adapters, OTHER_NAME, force, log)


def _grafted(
    name: str, given: Given, base: Base, adapters: Adapters, grafted: str, force: bool, log: Log
) -> Side:  # fmt: skip
    """An adapter from elsewhere is prompted as the tokenizer's own template has it."""
    warning = load_adapter(adapters, grafted, given.saved, base_id(base), force)
    if warning:
        log(f"warning: {warning}")
    if given.recipe is None:
        return Side(name, grafted, ChatTemplate(base.tokenizer))
    template = ChatTemplate.from_config(base.tokenizer, given.recipe.data, given.place / TEMPLATE)
    return Side(name, grafted, template, system_of(given, log))


def _labelled(first: Side, second: Side) -> tuple[Side, Side]:
    """By their folders' names, where these differ."""
    short = [side.label if side.adapter is None else Path(side.label).name for side in (first, second)]
    if short[0] != short[1]:
        first.label, second.label = short
    return first, second
