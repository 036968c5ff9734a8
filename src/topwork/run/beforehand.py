"""What a run will do, told before its first step, with a warning where that is too little to mean anything."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from topwork.data.examples import Data
from topwork.reporting.endings import FEW_ROWS as FEW_HELD_OUT
from topwork.training.schedule import warmup_steps
from topwork.training.trial import Trial

FEW_STEPS = 10
"""With fewer an adapter goes where a few batches push it: AdamW's mean of gradients alone reaches back over ten."""
FEW_LEARNED_TOKENS = 1000
"""Fewer in an epoch are ten or twenty short answers: these can be learned, and not what they have in common."""
MANY_EPOCHS = 10
"""Rows that are seen more often are learned by heart, where they are fewer than FEW_ROWS."""
FEW_ROWS = 1000
SHOWN = 3
"""Of adapters that train together so many are named, and so many lines of a kind are told."""


@dataclass(frozen=True)
class Beforehand:
    """A run as it is planned; result.json has it under `plan`.

    sequences               that an epoch learns; of streamed rows, their rows
    held_out_rows           that are validated on
    tokens, learned_tokens  of an epoch; None of streamed rows, which nobody has counted
    longest                 tokens of the longest sequence; of streamed rows, what none is longer than
    epochs                  None where rows have no end
    """

    sequences: int
    held_out_rows: int
    tokens: int | None
    learned_tokens: int | None
    longest: int
    batch_size: int
    steps: int
    epochs: float | None
    eval_steps: int
    save_steps: int
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int

    @staticmethod
    def of(trial: Trial, data: Data) -> "Beforehand":
        """Of a trial that is ready to begin."""
        config, counts, held = trial.config, data.summary.train, data.summary.eval
        per_epoch = trial.rows.steps_per_epoch
        return Beforehand(
            sequences=len(data.train),
            held_out_rows=min(held.rows, len(data.eval)),
            tokens=None if counts.streamed else counts.tokens,
            learned_tokens=None if counts.streamed else counts.learned_tokens,
            longest=data.longest(),
            batch_size=config.batch_size,
            steps=trial.steps,
            epochs=round(trial.steps / per_epoch, 4) if per_epoch else None,
            eval_steps=trial.eval_every,
            save_steps=trial.save_every,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=warmup_steps(config, trial.steps),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return asdict(self)

    def lines(self, data: Data) -> list[str]:
        """Five for people, with what was counted when `data` were read."""
        sides = data.summary.sides
        held = [counts.line(name) for name, counts in sides.items() if name != "train"]
        tokens = f", about {self.tokens * self.epochs:,.0f} tokens" if self.tokens and self.epochs else ""
        validated = f"validated {self._when(self.eval_steps)}" if self.held_out_rows else "never validated"
        return [
            sides["train"].line("train"),
            *(held or ["eval: no rows are held out"]),
            f"steps: {self.steps:,} of {_counted(min(self.batch_size, self.sequences), 'row')}{self._epochs()}{tokens}",
            f"on the way: {validated}, saved {self._when(self.save_steps)}",
            f"learning rate: {_number(self.learning_rate)}, {self.lr_scheduler_type}, "
            f"warm-up {_counted(self.warmup_steps, 'step')}",
        ]

    def _epochs(self) -> str:
        if self.epochs is None:
            return ""
        return f" = {_number(self.epochs)} of an epoch" if self.epochs < 1 else f" = {_counted(self.epochs, 'epoch')}"

    def _when(self, every: int) -> str:
        return f"every {_counted(every, 'step')}" if every < self.steps else "at the end"

    def warnings(self) -> list[str]:
        """Where it is too little of something to mean anything."""
        return [told for rule in RULES if (told := rule(self)) is not None]


def _few_steps(plan: Beforehand) -> str | None:
    if plan.steps >= FEW_STEPS:
        return None
    few = "1 optimizer step is" if plan.steps == 1 else f"{plan.steps} optimizer steps are"
    return f"{few} hardly a training: more rows or epochs, or a smaller training.batch_size, give more of them"


def _few_held_out(plan: Beforehand) -> str | None:
    if plan.held_out_rows >= FEW_HELD_OUT:
        return None
    ways = f"set data.eval, or data.eval_fraction so that {FEW_HELD_OUT} or more are"
    if not plan.held_out_rows:
        return (
            "no rows are held out, so that nothing tells what was learned from what was learned by heart, and the last "
            f"step is kept instead of the best: {ways}"
        )
    few = "1 row is" if plan.held_out_rows == 1 else f"{plan.held_out_rows} rows are"
    return f"{few} held out: the validation loss, and which step is the best, hang on single rows; {ways}"


def _less_than_a_batch(plan: Beforehand) -> str | None:
    if plan.sequences >= plan.batch_size:
        return None
    return (
        f"{_counted(plan.sequences, 'row')} to train on and a batch of {plan.batch_size:,}: each step sees all there "
        "is; lower training.batch_size, or bring more rows"
    )


def _few_learned_tokens(plan: Beforehand) -> str | None:
    if plan.learned_tokens is None or plan.learned_tokens >= FEW_LEARNED_TOKENS:
        return None
    return (
        f"an epoch has {_counted(plan.learned_tokens, 'token')} to learn, a handful of answers: these can be learned, "
        "and not what they have in common; bring more rows"
    )


def _less_than_an_epoch(plan: Beforehand) -> str | None:
    if plan.epochs is None or plan.epochs >= 1:
        return None
    return (
        f"the run ends after {_number(plan.epochs)} of an epoch, so that some of the {plan.sequences:,} rows are never "
        "seen; training.max_steps and training.num_train_epochs decide it"
    )


def _many_epochs(plan: Beforehand) -> str | None:
    if plan.epochs is None or plan.epochs <= MANY_EPOCHS or plan.sequences >= FEW_ROWS:
        return None
    return (
        f"each of {_counted(plan.sequences, 'row')} is seen {_number(plan.epochs)} times and may be learned by heart: "
        "watch the validation loss, or set training.early_stopping_patience"
    )


RULES = (_few_steps, _few_held_out, _less_than_a_batch, _few_learned_tokens, _less_than_an_epoch, _many_epochs)
"""That a warm-up is as long as the run is told by the trial itself."""


def tell_beforehand(trials: Sequence[Trial], data: Sequence[Data], log: Callable[[str], None]) -> list[Beforehand]:
    """The plans of trials that train together, each with its data. What they share is told once."""
    plans = [Beforehand.of(trial, own) for trial, own in zip(trials, data, strict=True)]
    names = [trial.name for trial in trials]
    for kind in zip(*(plan.lines(own) for plan, own in zip(plans, data)), strict=True):
        for line in _together(names, kind):
            log(line)
    for rule in RULES:
        for line in _together(names, map(rule, plans)):
            log(f"warning: {line}")
    return plans


def _together(names: Sequence[str], texts: Iterable[str | None]) -> list[str]:
    """What is said of adapters, each text once, with whom it is about where that is not all of them."""
    whose: dict[str, list[str]] = {}
    for name, text in zip(names, texts, strict=True):
        if text is not None:
            whose.setdefault(text, []).append(name)
    lines = [text if len(own) == len(names) else f"{text} ({_named(own)})" for text, own in whose.items()]
    rest = sum(len(own) for own in list(whose.values())[SHOWN:])
    more = [f"... and others of {_counted(rest, 'adapter')}: `plan` in their result.json"] if rest else []
    return [*lines[:SHOWN], *more]


def _named(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _counted(number: float, what: str) -> str:
    return f"{_number(number)} {what}{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    """As people write it: 1,200, 2.67, 2e-4."""
    if value >= 0.01 or value == 0:
        return f"{value:,.2f}".rstrip("0").rstrip(".") if value < 100 else f"{value:,.0f}"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
