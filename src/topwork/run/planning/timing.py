"""How long a planned run takes and what it costs, from its rows and the speed of where it is planned for."""

import math
from dataclasses import dataclass
from typing import Any

from topwork.plan.calibration import Question, Rows, spread_rows
from topwork.plan.calibrations import kept, seconds_here
from topwork.plan.fits import Fit, Job
from topwork.plan.time import RunCost, forward_seconds, run_cost, start_seconds
from topwork.plan.tokens import Tokens
from topwork.run.planning.place import Place
from topwork.training.memory import PassShape
from topwork.training.schedule import planned_steps, validated_every

STORED_BYTES = 2
"""Of a weight in a base's files."""


@dataclass(frozen=True)
class Timing:
    """A run's time, or where no rows are known that of a million tokens.

    steps           None where no rows are known
    run_tokens      of all epochs, without validation
    cost            of the whole run, or of a million tokens
    source          where the speed is from, for people
    """

    steps: int | None
    epochs: float | None
    run_tokens: int
    tokens_per_second: float
    cost: RunCost
    source: str
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return {
            "steps": self.steps,
            "epochs": self.epochs,
            "tokens": self.run_tokens,
            "step_seconds": None if self.steps is None else self.cost.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "start_seconds": self.cost.start_seconds,
            "validation_seconds": self.cost.validation_seconds,
            "seconds": self.cost.seconds,
            "money": self.cost.money,
            "source": self.source,
            "notes": list(self.notes),
        }


def rows_of(tokens: Tokens | None, job: Job) -> Rows:
    """What a step meets; where nothing is known of the rows, each is as long as they may be, and
    learned whole."""
    virtual = job.recipes[0].adapter.virtual_tokens
    if tokens is None:
        return Rows(job.longest, job.longest, job.longest, job.longest)
    mean = tokens.tokens / tokens.sequences
    attended = (tokens.attended * mean + 2 * virtual * mean + virtual**2) / (mean + virtual)  # of l + v, by those of l
    return Rows(mean + virtual, tokens.learned_tokens / tokens.sequences, attended, job.longest)


def question_of(job: Job, fit: Fit, tokens: Tokens | None) -> Question:
    """A step of the run."""
    batch = job.recipes[0].training.batch_size
    batch = batch if tokens is None else min(batch, tokens.sequences)
    return Question(job.setup, rows_of(tokens, job), batch, fit.tokens_per_pass, fit.checkpointed_layers)


def step_rows(job: Job, question: Question, tokens: Tokens | None) -> list[tuple[int, int]]:
    """Rows as a step has them, (tokens, learned tokens) of each: as long as those that are known, with the virtual
    tokens in front of each."""
    virtual, rows = job.recipes[0].adapter.virtual_tokens, question.rows
    known = {} if tokens is None else tokens.percentiles
    percentiles = {share: length + virtual for share, length in known.items()}
    return spread_rows(rows.tokens, rows.learned / rows.tokens, rows.longest, percentiles)


def timing_of(job: Job, fit: Fit, tokens: Tokens | None, place: Place, here: bool) -> Timing | None:
    """None where no speed is known.

    here  whether the place is this machine, whose measurements then count
    """
    if place.speed is None:
        return None
    question = question_of(job, fit, tokens)
    records, notes = kept(job.device) if here else ([], [])
    found = seconds_here(question, place.speed, records, notes)
    per_second = question.step_tokens / found.seconds
    if tokens is None:
        cost = run_cost(1e6 / per_second, 1, price_per_hour=place.price_per_hour)
        return Timing(None, None, 10**6, per_second, cost, found.source, found.notes)
    training = job.recipes[0].training
    steps_per_epoch = math.ceil(tokens.sequences / training.batch_size)
    steps = planned_steps(training, steps_per_epoch)
    epochs = steps / steps_per_epoch
    scale = found.seconds / question.reckoned(place.speed)
    cost = run_cost(
        found.seconds,
        steps,
        scale * _validation(question, tokens, place),
        _validations(training.eval_steps, steps) if tokens.held_out_rows else 0,
        start_seconds(job.setup, STORED_BYTES * job.structure.parameters),
        place.price_per_hour,
    )
    return Timing(steps, epochs, round(epochs * tokens.tokens), per_second, cost, found.source, found.notes)


def _validation(question: Question, tokens: Tokens, place: Place) -> float:
    assert place.speed is not None
    if not tokens.held_out_tokens:
        return 0.0
    passes = max(1.0, tokens.held_out_tokens / question.tokens_per_pass)
    length = max(1, round(tokens.held_out_tokens / passes))
    shape = PassShape(length, max(1, round(length * tokens.learned_share)), question.rows.longest)
    return forward_seconds(question.setup, shape, place.speed, passes, question.rows.attended)


def _validations(every: int | None, steps: int) -> int:
    """Before the first step, and every so many."""
    return 1 + math.ceil(steps / validated_every(every, steps))
