"""The one loop: rounds of steps, validations, checkpoints. It receives things; it looks nothing up."""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from topwork.adapters.graft import Adapters
from topwork.common.errors import NonFiniteLossError
from topwork.data.batches import AdapterRows
from topwork.models.base import Base
from topwork.ops.batch import Batch
from topwork.ops.threads import Threads
from topwork.training.checkpoint import TrainState, checkpoint_step, read_state
from topwork.training.collector import looked_through_once
from topwork.training.interrupts import Interrupts
from topwork.training.passes import step_passes
from topwork.training.smaller import PassSize
from topwork.training.start import Start
from topwork.training.step import mean_losses, train_step
from topwork.training.trial import Timed, Trial


@dataclass(frozen=True)
class Outcome:
    """How a trial's training stopped: finished, early stopping, diverged, paused or interrupted."""

    state: TrainState
    steps: int
    stopped: str


class Loop:
    """Trains the trials, adapters of one base, in the same passes: in each round every one that is active takes one
    optimizer step of its own. One trial is a round with one.

    A trial leaves when its plan is done, by early stopping, or when it diverges; the others go on.
    """

    def __init__(
        self, base: Base, adapters: Adapters, trials: Sequence[Trial], tokens_per_pass: int,
        on_smaller: Callable[[int, str], None] | None = None, threads: Threads | None = None,
    ) -> None:  # fmt: skip
        """`threads` are looked at before each step and each validation; left out, torch's own stay as they are."""
        self.base, self.adapters, self.trials, self.threads = base, adapters, trials, threads
        self.size = PassSize(tokens_per_pass, on_smaller, base.workspace)
        self._resumed = False

    def resume(self, start: Start) -> None:
        """Take every trial's state from its checkpoint."""
        found = list(zip(self.trials, start.checkpoints, strict=True))
        # the random state is one for all, and those that ended before have an older one
        for trial, path in sorted(found, key=lambda one: (checkpoint_step(one[1]), read_state(one[1]).ended is None)):
            trial.resume(path, start.at)
        self._resumed = True

    def run(self, stop_at: int | None = None, interrupts: Interrupts | None = None) -> list[Outcome]:
        """Train all to their ends, or up to step `stop_at`, where they are validated and saved.

        Ctrl-C and the like end it with a checkpoint of the last step, and "interrupted" for those that have not ended;
        `interrupts`, entered by the caller, tells of one that came when all had. Raises RunError, and
        NonFiniteLossError where the only trial diverges; checkpoints written before stay good.
        """
        if not self._resumed:
            torch.manual_seed(self.trials[0].config.seed)
            random.seed(self.trials[0].config.seed)
        with nullcontext(interrupts) if interrupts is not None else Interrupts() as asked:
            try:
                self._begin(stop_at, asked)
                with looked_through_once():
                    while not asked.asked and (active := self._active(stop_at)):
                        self._round(active, stop_at, asked)
            finally:
                if self.base.workspace is not None:
                    self.base.workspace.release()
                for trial in self.trials:
                    self.adapters.train(trial.name, False)
                    trial.progress.finished()
        return [_outcome(trial, stop_at) for trial in self.trials]

    def _begin(self, stop_at: int | None, interrupts: Interrupts) -> None:
        """The validation before the first step, or the one that an interrupt broke off."""
        if not self._resumed:
            for trial in self.trials:
                trial.begin()
        at = max(trial.state.step for trial in self.trials)
        there = [trial for trial in self.trials if trial.state.step == at]
        waiting = [trial for trial in there if trial.awaits_validation(stop_at)]
        done = self._validated(there, at, stop_at, interrupts)  # and settled, should its plan have been cut short
        if self._resumed and done:
            _save(waiting)
        elif not self._resumed and interrupts.asked:
            _save(self.trials)
        for trial in self.trials:
            self.adapters.train(trial.name)
            trial.progress.started(trial.state.step, trial.steps)
            if trial.state.ended is not None:
                trial.progress.ended(trial.state.ended)
                if trial.state.ended_at == 0:  # no round will save it
                    trial.save()

    def _active(self, stop_at: int | None) -> list[Trial]:
        return [m for m in self.trials if m.state.ended is None and (stop_at is None or m.state.step < stop_at)]

    def _round(self, active: Sequence[Trial], stop_at: int | None, interrupts: Interrupts) -> None:
        at = max(trial.state.step for trial in active) + 1
        self._step(active, at)
        self._validated([trial for trial in active if trial.state.ended is None], at, stop_at, interrupts)
        paused = any(trial.state.step == stop_at for trial in active)
        if interrupts.asked or paused or any(trial.save_is_due() for trial in active):
            _save(active)

    def _validated(self, trials: Sequence[Trial], at: int, stop_at: int | None, interrupts: Interrupts) -> bool:
        """Validate those of some trials at one step that are due, and see who has ended. Once asked to stop it breaks
        off, and is false: they are saved as they are, and the resumed run validates them, in the same passes."""
        waiting = [trial for trial in trials if trial.awaits_validation(stop_at)]
        for trial in trials:
            if trial.state.ended is None and trial not in waiting:
                trial.settle()
        due = [trial for trial in trials if trial.validation_is_due(stop_at)] if waiting else []
        try:
            self._validate(due, waiting, at, interrupts)
        except _BrokenOff:
            return False
        for trial in waiting:
            if trial.state.ended is None:
                trial.settle()
        return True

    def _step(self, active: Sequence[Trial], at: int) -> None:
        """One optimizer step of each, in shared passes."""
        self._look(active)
        groups = [(trial.name, trial.next_rows()) for trial in active]
        seeds, learners = {trial.name: trial.dropout_seed() for trial in active}, [trial.learner for trial in active]
        start = time.perf_counter()
        results, passes = self.size.run(
            f"at step {at}",
            lambda: self._passes(groups, seeds),
            lambda passes: train_step(self.base, learners, passes),
            [learner.optimizer for learner in learners],
        )
        seconds, tokens = time.perf_counter() - start, sum(len(batch.tokens) for batch in passes)
        for trial, result in zip(active, results, strict=True):
            if isinstance(result, NonFiniteLossError):
                if len(self.trials) == 1:
                    trial.keep_last()
                self._diverged(trial, trial.explained(result), at)
            else:
                trial.stepped(Timed(result, seconds, tokens))

    def _passes(self, groups: Sequence[AdapterRows], seeds: Mapping[str, int] | None = None) -> list[Batch]:
        virtual = {str(name): self.base.virtual_tokens(name) for name, _ in groups}
        return step_passes(groups, self.size.tokens, self.base.device, virtual, seeds, self.size.free)

    def _validate(self, due: Sequence[Trial], waiting: Sequence[Trial], at: int, interrupts: Interrupts) -> None:
        """The held-out rows of those that are due, in shared passes; what it comes to is for those that wait for it.
        Raises _BrokenOff once asked to stop."""
        if not due:
            return
        self._look(waiting)
        groups, objectives = [(m.name, m.held_out) for m in due], {m.name: m.learner.objective for m in due}
        with self.adapters.evaluating(*(trial.name for trial in due)):
            losses, _ = self.size.run(
                f"in the validation at step {at}",
                lambda: self._passes(groups),
                lambda passes: mean_losses(self.base, objectives, _until_asked(interrupts, passes)),
            )
        for trial in waiting:
            means, step = losses[trial.name], trial.state.step
            if math.isfinite(means.loss):
                trial.validated(means)
            else:
                told = f"the validation loss at step {step} is {means.loss}; checkpoints stay as they are"
                self._diverged(trial, NonFiniteLossError(told), at)

    def _look(self, trials: Sequence[Trial]) -> None:
        """As many threads as pay now. Each run's metrics have a change, one tells it."""
        told = None if self.threads is None else self.threads.look()
        for number, trial in enumerate(trials if told is not None else ()):
            assert self.threads is not None
            trial.threads_changed(self.threads.count, str(told), aloud=number == 0)

    def _diverged(self, trial: Trial, error: NonFiniteLossError, at: int) -> None:
        if len(self.trials) == 1:
            trial.record_divergence(error, at)
            raise error
        trial.diverge(error, at)


class _BrokenOff(Exception):
    """A validation was asked to stop."""


def _until_asked(interrupts: Interrupts, passes: Sequence[Batch]) -> Iterator[Batch]:
    for batch in passes:
        if interrupts.asked:
            raise _BrokenOff
        yield batch


def _save(trials: Sequence[Trial]) -> None:
    """Whenever one saves all do, so that they can go on together."""
    for trial in trials:
        trial.save()


def _outcome(trial: Trial, stop_at: int | None) -> Outcome:
    there = stop_at is not None and trial.state.step >= stop_at and not trial.awaits_validation(stop_at)
    return Outcome(trial.state, trial.steps, trial.state.ended or ("paused" if there else "interrupted"))
