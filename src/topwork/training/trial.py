"""One adapter in training: row source, optimizer, state, metrics, run folder. The loop tells it what its steps gave."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, read_adapter, write_adapter
from topwork.common.errors import CheckpointError, NonFiniteLossError, RunError
from topwork.common.seeds import hashed
from topwork.data.examples import Example
from topwork.data.source import RowSource
from topwork.objectives.objective import Objective
from topwork.training.checkpoint import (
    ADAPTER,
    TrainState,
    Validation,
    checkpoint_path,
    load_checkpoint,
    read_rows,
    save_checkpoint,
)
from topwork.training.config import TrainingConfig
from topwork.training.metrics import DIVERGED, MetricsLog
from topwork.training.optimizers import make_optimizer, parameter_groups, set_learning_rate
from topwork.training.progress import Progress, Sure
from topwork.training.schedule import learning_rate, planned_steps, validated_every, warmup_note
from topwork.training.step import Learner, Means, StepResult
from topwork.training.watch import FirstWeights, overfitting_since, worse_than_base

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Place:
    """An adapter's place in the base, and its run's folder."""

    adapters: Adapters
    name: str
    base_id: BaseId
    run_dir: Path
    own: Callable[[str], None] = lambda _: None
    """Is told the name in `run_dir` of each checkpoint before it is written."""


@dataclass(frozen=True)
class Timed:
    """A step's result, how long its passes took, and the tokens of all adapters in them."""

    result: StepResult
    seconds: float
    pass_tokens: int


class Trial:
    """One adapter, its plan, and how far it is (`state`)."""

    def __init__(
        self,
        place: Place,
        objective: Objective,
        config: TrainingConfig,
        rows: RowSource,
        held_out: Sequence[Example],
        metrics: MetricsLog,
        progress: Progress,
        keep: int | None = None,
    ) -> None:
        self.place, self.name, self.config = place, place.name, config
        self.rows, self.held_out = rows, held_out
        self.metrics, self.progress = metrics, Sure(progress)
        self.keep = keep or config.save_total_limit
        parameters = place.adapters.parameters(place.name)
        groups = parameter_groups(config, parameters)
        self.names = [name for group in groups for name in group["names"]]
        self._first_weights = FirstWeights(parameters)
        self._begun_from = place.adapters.configs[place.name].init_from
        self.optimizer = make_optimizer(config, groups, place.run_dir)
        self.learner = Learner(place.name, objective, list(parameters.values()), self.optimizer, config.max_grad_norm)
        self.steps = planned_steps(config, rows.steps_per_epoch)
        self.eval_every = validated_every(config.eval_steps, self.steps)
        self.save_every = config.save_steps or self.eval_every
        self.checkpoints = place.run_dir / CHECKPOINTS
        self.state = TrainState(step=0)
        self._step_rows: Sequence[Example] = ()
        self._rows_state = rows.state()  # as it is at state.step: the source may have been asked for a step that failed
        self._unlogged: list[Timed] = []

    def resume(self, checkpoint: Path, at: int) -> None:
        """Take weights, optimizer and random state from a checkpoint, to go on from the loop's round `at`."""
        self.place.adapters.load(self.name, read_adapter(checkpoint / ADAPTER, self.place.adapters.methods).tensors)
        state = load_checkpoint(checkpoint, self.optimizer, self.names)
        rows = read_rows(checkpoint)
        if rows is None and self._rows_state:
            raise CheckpointError(
                f"{checkpoint} holds no state of a row source, and this one has some; resume with the rows that it was "
                "made with, or begin anew"
            )
        self._rows_state = rows or {}
        self.rows.restore(self._rows_state)
        if state.ended_at is not None and state.ended_at > at:  # it ended in a round that is now run again
            state = replace(state, ended=None, ended_at=None)
        self.state = state

    def begin(self) -> None:
        """Tell, before its first step, what is known of its plan."""
        told = warmup_note(self.config, self.steps)
        if told is not None:
            self._note(told)

    def next_rows(self) -> Sequence[Example]:
        """The rows of its next optimizer step, for which its learning rate is set."""
        set_learning_rate(self.optimizer, learning_rate(self.config, self.state.step, self.steps))
        self._step_rows = self.rows.examples(self.state.step)
        if not self._step_rows:
            raise RunError(
                f"{self.name}: its row source gave no rows for step {self.state.step + 1}; give at least one"
            )
        return self._step_rows

    def dropout_seed(self) -> int:
        """What drops out in its next step follows from it."""
        return hashed(self.config.seed, self.state.step)

    def stepped(self, timed: Timed) -> None:
        """An optimizer step is done."""
        rate = learning_rate(self.config, self.state.step, self.steps)
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            tokens_seen=self.state.tokens_seen + timed.result.tokens,
            loss_sum=self.state.loss_sum + timed.result.loss,
            loss_count=self.state.loss_count + 1,
        )
        self._rows_state = self.rows.state()
        step = self.state.step
        self._unlogged.append(timed)
        if step % self.config.logging_steps == 0 or step in (1, self.steps):
            self._log()
        self.progress.stepped(step, self._record([timed], rate))

    def validated(self, means: Means) -> None:
        """A validation is done, with a loss that is finite."""
        state, loss = self.state, means.loss
        trained = state.loss_sum / state.loss_count if state.loss_count else None
        better = state.step > 0 and (state.best_loss is None or loss < state.best_loss)  # at 0 it is the bare base
        self.state = replace(
            state,
            history=(*state.history, Validation(state.step, trained, loss)),
            loss_sum=0.0,
            loss_count=0,
            best_loss=loss if better else state.best_loss,
            best_step=state.step if better else state.best_step,
            evals_without_gain=0 if better or state.step == 0 else state.evals_without_gain + 1,
        )
        record: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}
        if means.metrics:
            record["metrics"] = dict(means.metrics)
        self.metrics.write("eval", state.step, record)
        self.progress.validated(state.step, record)
        since = overfitting_since(self.state.history)
        if since is not None:
            self._note(
                f"validation loss has risen since step {since} while training loss falls: overfitting. Fewer epochs, a "
                "lower learning rate, some lora_dropout or more data help; early_stopping_patience stops by itself."
            )

    def threads_changed(self, count: int, told: str, aloud: bool) -> None:
        """What comes now is computed by so many threads."""
        self.metrics.write("threads", self.state.step, {"threads": count, "text": told})
        if aloud:
            self.progress.note(told)

    def settle(self) -> None:
        """See whether the plan is done, or patience is out."""
        if self.state.step >= self.steps:
            self._finish("finished")
        elif self._patience_is_out():
            self._finish("early stopping")

    def diverge(self, error: NonFiniteLossError, at: int) -> None:
        """Leave the pass in round `at`, with the last good state."""
        self._note(f"diverged, and left the pass: {error}")
        self._end("diverged", at)

    def record_divergence(self, error: NonFiniteLossError, at: int) -> None:
        """Keep in its metrics that it diverged in round `at`; who catches the error tells it."""
        self.metrics.write("note", self.state.step, {"text": f"{DIVERGED} {at}: {error}"})

    def validation_is_due(self, stop_at: int | None = None) -> bool:
        """Whether it is to be validated at the step it is at, where a run that stops at `stop_at` is, too."""
        step = self.state.step
        return bool(self.held_out) and (step % self.eval_every == 0 or step in (self.steps, stop_at))

    def awaits_validation(self, stop_at: int | None = None) -> bool:
        """Whether that validation is still to be done: an interrupt came before its end."""
        history = self.state.history
        validated = bool(history) and history[-1].step == self.state.step
        return self.state.ended is None and self.validation_is_due(stop_at) and not validated

    def save_is_due(self) -> bool:
        """Whether a checkpoint is to be written of the step it is at."""
        state = self.state
        return state.ended is not None or state.step % self.save_every == 0 or state.best_step == state.step

    def save(self) -> None:
        """Write a checkpoint of the step it is at; who goes on from there finds all steps before it in the metrics."""
        self._log()
        place = self.place
        place.own(f"{CHECKPOINTS}/{checkpoint_path(self.checkpoints, self.state.step).name}")
        save_checkpoint(
            self.checkpoints,
            self.state.step,
            lambda folder: write_adapter(folder, place.adapters, self.name, place.base_id),
            self.optimizer,
            self.names,
            self.state,
            self.keep,
            self.state.best_step if self.config.load_best_model_at_end else None,
            self._rows_state,
        )

    def keep_last(self) -> None:
        """Write a checkpoint of the last good step, where there is none."""
        if not checkpoint_path(self.checkpoints, self.state.step).exists():
            self.save()

    def explained(self, error: NonFiniteLossError) -> NonFiniteLossError:
        """A step's failure with its batch named."""
        rows, step = self._step_rows, self.state.step
        named = ", ".join(row.source for row in rows[:8]) + (", …" if len(rows) > 8 else "")
        return NonFiniteLossError(
            f"step {step + 1}: {error}. The batch was {named}. Nothing was updated; the state after step "
            f"{step} is kept in {self.checkpoints}. Look at these rows, lower training.learning_rate or take "
            "model.dtype: float32, then start again."
        )

    def _finish(self, how: str) -> None:
        """End, and tell what the adapter that is kept is not worth."""
        if self._first_weights.unmoved():
            self._note(
                "the adapter learned nothing: its weights are those that it began with, and it changes no answer. See "
                "that the rows have answers to learn, and that training.learning_rate is not too low"
            )
        elif told := worse_than_base(self.state, self.config.load_best_model_at_end, self._begun_from):
            self._note(told)
        self._end(how, self.state.step)

    def _end(self, how: str, at: int) -> None:
        self.state = replace(self.state, ended=how, ended_at=at)
        self.progress.ended(how)

    def _patience_is_out(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.evals_without_gain >= patience

    def _log(self) -> None:
        """Write down the steps since the last record."""
        if self._unlogged:
            rate = learning_rate(self.config, self.state.step - 1, self.steps)
            self.metrics.write("train", self.state.step, self._record(self._unlogged, rate))
            self._unlogged = []

    def _record(self, timed: Sequence[Timed], rate: float) -> dict[str, Any]:
        """The mean loss of some steps, what went through them, and the rest as the last of them had it."""
        results, seconds = [each.result for each in timed], sum(each.seconds for each in timed)
        tokens, passed = sum(result.tokens for result in results), sum(each.pass_tokens for each in timed)
        per_epoch, metrics = self.rows.steps_per_epoch, _mean_metrics(results)
        return {
            "loss": sum(result.loss for result in results) / len(results),
            "grad_norm": results[-1].grad_norm,
            "learning_rate": rate,
            "tokens": tokens,
            "learned_tokens": sum(result.learned_tokens for result in results),
            "tokens_per_second": round(passed / seconds, 1),
            "seconds": round(seconds, 4),
            **({"epoch": round(self.state.step / per_epoch, 4)} if per_epoch else {}),
            **({"pass_tokens": passed} if passed != tokens else {}),
            **({"metrics": metrics} if metrics else {}),
        }

    def _note(self, text: str) -> None:
        self.metrics.write("note", self.state.step, {"text": text})
        self.progress.note(text)


def _mean_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """The objective's own figures over some steps."""
    names = dict.fromkeys(name for result in results for name in result.metrics)
    return {name: sum(result.metrics.get(name, 0.0) for result in results) / len(results) for name in names}
