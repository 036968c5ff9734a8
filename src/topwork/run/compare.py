"""`topwork chat --compare A B`: the same words to two models over one base, which answer in one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter
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
from topwork.models.load import load_base
from topwork.run.folder import (
    ADAPTER,
    ADAPTER_NAME,
    RECIPE,
    RESULT,
    TEMPLATE,
    OpenRun,
    open_run,
    read_json,
    read_recipe,
)

BASE = "base"
OTHER_NAME = "other"
CONFIG = "adapter_config.json"


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
    force: bool = False, log: Callable[[str], None] = print,
) -> Pair:  # fmt: skip
    """Two of: a run's folder, a PEFT folder, `base`.

    The base is the first run's, as it was held in training; without a run it is `model`, or the one that the first PEFT
    folder names. Raises RequestError where both are the base or the same folder, and AdapterError where one is another
    base's.
    """
    kinds = [_kind(name) for name in names]
    if names[0] == names[1] or Path(names[0]).resolve() == Path(names[1]).resolve():
        raise RequestError(f"--compare {names[0]} {names[1]}: these are the same; give two")
    lead = kinds.index("run") if "run" in kinds else None
    if lead is None:
        base, adapters, sides = _without_run(names, model, log)
    elif model is not None:
        raise RequestError(f"--model {model}: the base is that of {names[lead]}; leave --model out")
    else:
        run = open_run(Path(names[lead]), force=force, log=log)
        base, adapters = run.base, run.adapters
        sides = {lead: Side(names[lead], ADAPTER_NAME, run.template, run.system)}
    for place, (name, kind) in enumerate(zip(names, kinds)):
        if place not in sides:
            sides[place] = _side(name, kind, base, adapters, sides, force, log)
    return Pair(base, _labelled(sides[0], sides[1]), sampling, system)


def _kind(name: str) -> str:
    folder = Path(name)
    if (folder / RECIPE).is_file():
        return "run"
    if (folder / CONFIG).is_file():
        return "peft"
    if name == BASE:
        return BASE
    raise RequestError(
        f"--compare {name}: neither a run's folder ({RECIPE}) nor an adapter's ({CONFIG}); give two of these, or one "
        f"and `{BASE}`"
    )


def _without_run(
    names: tuple[str, str], model: str | None, log: Callable[[str], None]
) -> tuple[Base, Adapters, dict[int, Side]]:
    """The base that is named, or that the first adapter names."""
    folder = next(name for name in names if name != BASE or (Path(name) / CONFIG).is_file())
    named = model or read_adapter(Path(folder)).base.name
    if named is None:
        raise RequestError(f"{folder} does not say what base it is for; name it with --model")
    base = load_base(ModelConfig(model_name_or_path=named), log)
    return base, Adapters(base.module, base.tokenizer), {}


def _side(
    name: str, kind: str, base: Base, adapters: Adapters, others: dict[int, Side], force: bool,
    log: Callable[[str], None],
) -> Side:  # fmt: skip
    """The bare base is prompted as the other side is, so that what differs is the adapter; an adapter from elsewhere as
    the tokenizer's own template has it."""
    other = next(iter(others.values()), None)
    if kind == BASE:
        template = other.template if other is not None else ChatTemplate(base.tokenizer)
        return Side(BASE, None, template, None if other is None else other.system)
    folder = Path(name)
    grafted = ADAPTER_NAME if other is None or other.adapter is None else OTHER_NAME
    saved = read_adapter(folder / ADAPTER if kind == "run" else folder)
    warning = load_adapter(adapters, grafted, saved, BaseId(base.name, base.fingerprint), force)
    if warning:
        log(f"warning: {warning}")
    if kind == "peft":
        return Side(name, grafted, ChatTemplate(base.tokenizer))
    template = ChatTemplate.from_config(base.tokenizer, read_recipe(folder).data, folder / TEMPLATE)
    return Side(name, grafted, template, read_json(folder / RESULT).get("system"))


def _labelled(first: Side, second: Side) -> tuple[Side, Side]:
    """By their folders' names, where these differ."""
    short = [side.label if side.adapter is None else Path(side.label).name for side in (first, second)]
    if short[0] != short[1]:
        first.label, second.label = short
    return first, second
