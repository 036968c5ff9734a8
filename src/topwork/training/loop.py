"""The one loop: rounds of steps, validations, checkpoints. It receives things; it looks nothing up."""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from topwork.adapters.graft import Adapters
from topwork.common.errors import NonFiniteLossError, RunError
from topwork.data.batches import Group
from topwork.models.base import Base
from topwork.ops.stream import Stream
from topwork.training.checkpoint import TrainState, checkpoint_step, read_state
from topwork.training.interrupts import Interrupts
from topwork.training.member import Member, Timed
from topwork.training.passes import step_passes
from topwork.training.start import Start
from topwork.training.step import mean_losses, train_step


@dataclass(frozen=True)
class Outcome:
    """How a member's training stopped: finished, early stopping, diverged, paused or interrupted."""

    state: TrainState
    steps: int
    stopped: str


class Loop:
    """Trains the members, adapters of one base, in the same passes: in each round every one that is active takes one
    optimizer step of its own. One member is a round with one.

    A member leaves when its plan is done, by early stopping, or when it diverges; the others go on.
    """

    def __init__(self, base: Base, adapters: Adapters, members: Sequence[Member], tokens_per_pass: int) -> None:
        self.base, self.adapters, self.members = base, adapters, members
        self.tokens_per_pass = tokens_per_pass
        self._resumed = False

    def resume(self, start: Start) -> None:
        """Take every member's state from its checkpoint."""
        found = list(zip(self.members, start.checkpoints, strict=True))
        # the random state is one for all, and those that ended before have an older one
        for member, path in sorted(found, key=lambda one: (checkpoint_step(one[1]), read_state(one[1]).ended is None)):
            member.resume(path, start.at)
        self._resumed = True

    def run(self, stop_at: int | None = None) -> list[Outcome]:
        """Train all to their ends, or up to step `stop_at`, where they are validated and saved.

        Raises RunError, and NonFiniteLossError where the only member diverges; checkpoints written before stay good.
        """
        if not self._resumed:
            torch.manual_seed(self.members[0].config.seed)
            random.seed(self.members[0].config.seed)
        with Interrupts() as interrupts:
            try:
                self._begin()
                while active := self._active(stop_at):
                    self._round(active, stop_at, interrupts)
                    if interrupts.asked:
                        break
            finally:
                self.base.memory.release()
                for member in self.members:
                    self.adapters.train(member.name, False)
                    member.progress.finished()
        return [_outcome(member, stop_at) for member in self.members]

    def _begin(self) -> None:
        if not self._resumed:
            self._validate(self.members, 0)
        for member in self.members:
            self.adapters.train(member.name)
            member.progress.started(member.state.step, member.steps)
            if member.state.ended is not None:
                member.progress.ended(member.state.ended)
                if member.state.ended_at == 0:  # no round will save it
                    member.save()

    def _active(self, stop_at: int | None) -> list[Member]:
        return [m for m in self.members if m.state.ended is None and (stop_at is None or m.state.step < stop_at)]

    def _round(self, active: Sequence[Member], stop_at: int | None, interrupts: Interrupts) -> None:
        at = max(member.state.step for member in active) + 1
        self._step(active, at)
        stepped = [member for member in active if member.state.ended is None]
        self._validate([m for m in stepped if m.validation_is_due() or m.state.step == stop_at], at)
        for member in stepped:
            if member.state.ended is None:
                member.settle()
        paused = any(member.state.step == stop_at for member in active)
        if interrupts.asked or paused or any(member.save_is_due() for member in active):
            for member in active:  # whenever one saves all do, so that they can go on together
                member.save()

    def _step(self, active: Sequence[Member], at: int) -> None:
        """One optimizer step of each, in shared passes."""
        groups = [(member.name, member.next_rows()) for member in active]
        passes = self._passes(groups, {member.name: member.draws_from() for member in active})
        start = time.perf_counter()
        try:
            results = train_step(self.base, [member.learner for member in active], passes)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"out of memory at step {at} with {self.tokens_per_pass} tokens per pass; the result does "
                f"not depend on it, so go on with --resume --set training.tokens_per_pass={self.tokens_per_pass // 2} "
                "or --set training.activation_checkpointing=full"
            ) from error
        seconds, tokens = time.perf_counter() - start, sum(len(stream.tokens) for stream in passes)
        for member, result in zip(active, results, strict=True):
            if isinstance(result, NonFiniteLossError):
                if len(self.members) == 1:
                    member.keep_last()
                self._diverged(member, member.explained(result), at)
            else:
                member.stepped(Timed(result, seconds, tokens))

    def _passes(self, groups: Sequence[Group], seeds: Mapping[str, int] | None = None) -> list[Stream]:
        virtual = {str(name): self.base.virtual_tokens(name) for name, _ in groups}
        return step_passes(groups, self.tokens_per_pass, self.base.device, virtual, seeds)

    def _validate(self, members: Sequence[Member], at: int) -> None:
        """The members' held-out rows, in shared passes."""
        due = [member for member in members if member.held_out]
        if not due:
            return
        for member in due:
            self.adapters.train(member.name, False)
        groups = [(member.name, member.held_out) for member in due]
        passes = self._passes(groups)
        losses = mean_losses(self.base, {m.name: m.learner.objective for m in due}, passes)
        for member in due:
            self.adapters.train(member.name)
            loss, step = losses[member.name], member.state.step
            if math.isfinite(loss):
                member.validated(loss)
            else:
                told = f"the validation loss at step {step} is {loss}; checkpoints stay as they are"
                self._diverged(member, NonFiniteLossError(told), at)

    def _diverged(self, member: Member, error: NonFiniteLossError, at: int) -> None:
        if len(self.members) == 1:
            raise error
        member.diverge(error, at)


def _outcome(member: Member, stop_at: int | None) -> Outcome:
    open_end = "paused" if stop_at is not None and member.state.step >= stop_at else "interrupted"
    return Outcome(member.state, member.steps, member.state.ended or open_end)
