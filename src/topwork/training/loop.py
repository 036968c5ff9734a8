"""The one loop: steps, validations, checkpoints. It receives things; it looks nothing up."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, read_adapter, write_adapter
from topwork.common.errors import NonFiniteLossError, RunError
from topwork.data.batches import step_indices, steps_per_epoch
from topwork.data.examples import Example
from topwork.models.base import Base
from topwork.training.checkpoint import (
    ADAPTER,
    TrainState,
    Validation,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
)
from topwork.training.config import TrainingConfig
from topwork.training.interrupts import Interrupts
from topwork.training.metrics import MetricsLog
from topwork.training.objective import Objective
from topwork.training.optimizers import make_optimizer
from topwork.training.passes import step_passes
from topwork.training.progress import Progress
from topwork.training.schedule import learning_rate
from topwork.training.step import StepResult, mean_loss, train_step
from topwork.training.watch import overfitting_since

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `stopped` is finished, early stopping or interrupted."""

    state: TrainState
    steps: int
    stopped: str


class Loop:
    """Trains one adapter of one base. `run()` goes from a state to the end of the plan, or to where it is stopped."""

    def __init__(
        self,
        base: Base,
        adapters: Adapters,
        name: str,
        objective: Objective,
        config: TrainingConfig,
        train: Sequence[Example],
        held_out: Sequence[Example],
        tokens_per_pass: int,
        run_dir: Path,
        metrics: MetricsLog,
        progress: Progress,
    ) -> None:
        self.base, self.adapters, self.name = base, adapters, name
        self.objective, self.config, self.train = objective, config, train
        self.tokens_per_pass = tokens_per_pass
        self.checkpoints = run_dir / CHECKPOINTS
        self.metrics, self.progress = metrics, progress
        self.parameters = adapters.parameters(name)
        self.optimizer = make_optimizer(config, self.parameters.values(), run_dir)
        self.held_out = step_passes(held_out, tokens_per_pass, name, base.device) if held_out else []
        self.steps = planned_steps(config, len(train))
        self.eval_every = config.eval_steps or max(1, math.ceil(self.steps / 10))
        self.save_every = config.save_steps or self.eval_every
        self._unlogged: list[tuple[StepResult, float]] = []

    def resume(self, checkpoint: Path) -> TrainState:
        """Take weights, optimizer and random state from a checkpoint."""
        self.adapters.load(self.name, read_adapter(checkpoint / ADAPTER).tensors)
        return load_checkpoint(checkpoint, self.optimizer, list(self.parameters))

    def run(self, state: TrainState | None = None) -> Outcome:
        """Train to the end. Raises NonFiniteLossError, RunError; checkpoints written before stay good."""
        if state is None:
            torch.manual_seed(self.config.seed)
            random.seed(self.config.seed)
        with Interrupts() as interrupts:
            state = state or self._validated(TrainState(step=0))
            self.adapters.train(self.name)
            self.progress.started(state.step, self.steps)
            try:
                return self._trained(state, interrupts)
            finally:
                self.adapters.train(self.name, False)
                self.progress.finished()

    def _trained(self, state: TrainState, interrupts: Interrupts) -> Outcome:
        while state.step < self.steps and not self._patience_is_out(state):
            state = self._stepped(state)
            last = state.step == self.steps
            if state.step % self.eval_every == 0 or last:
                state = self._validated(state)
            last = last or self._patience_is_out(state)
            if state.step % self.save_every == 0 or state.best_step == state.step or last or interrupts.asked:
                self._save(state)
            if interrupts.asked and not last:
                return Outcome(state, self.steps, "interrupted")
        return Outcome(state, self.steps, "early stopping" if state.step < self.steps else "finished")

    def _stepped(self, state: TrainState) -> TrainState:
        rate = learning_rate(self.config, state.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        indices = step_indices(len(self.train), self.config.batch_size, self.config.seed, state.step)
        rows = [self.train[i] for i in indices]
        passes = step_passes(rows, self.tokens_per_pass, self.name, self.base.device)
        start = time.perf_counter()
        try:
            result = train_step(
                self.base, self.objective, passes, list(self.parameters.values()), self.optimizer,
                self.config.max_grad_norm,
            )  # fmt: skip
        except NonFiniteLossError as error:
            raise self._explained(error, state, rows) from error
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"out of memory at step {state.step + 1} with {self.tokens_per_pass} tokens per pass; the result does "
                f"not depend on it, so go on with --resume --set training.tokens_per_pass={self.tokens_per_pass // 2} "
                "or --set training.activation_checkpointing=full"
            ) from error
        self._log(state.step + 1, (result, time.perf_counter() - start), rate)
        return replace(
            state,
            step=state.step + 1,
            tokens_seen=state.tokens_seen + result.tokens,
            loss_sum=state.loss_sum + result.loss,
            loss_count=state.loss_count + 1,
        )

    def _log(self, step: int, timed: tuple[StepResult, float], rate: float) -> None:
        self._unlogged.append(timed)
        if step % self.config.logging_steps == 0 or step in (1, self.steps):
            self.metrics.write("train", step, self._record(step, self._unlogged, rate))
            self._unlogged = []
        self.progress.stepped(step, self._record(step, [timed], rate))

    def _record(self, step: int, timed: Sequence[tuple[StepResult, float]], rate: float) -> dict[str, Any]:
        """The mean loss of some steps, what went through them, and the rest as the last of them had it."""
        results, seconds = [result for result, _ in timed], sum(spent for _, spent in timed)
        tokens = sum(result.tokens for result in results)
        return {
            "loss": sum(result.loss for result in results) / len(results),
            "grad_norm": results[-1].grad_norm,
            "learning_rate": rate,
            "tokens": tokens,
            "learned_tokens": sum(result.learned_tokens for result in results),
            "tokens_per_second": round(tokens / seconds, 1),
            "seconds": round(seconds, 4),
            "epoch": round(step / steps_per_epoch(len(self.train), self.config.batch_size), 4),
        }

    def _validated(self, state: TrainState) -> TrainState:
        if not self.held_out:
            return state
        self.adapters.train(self.name, False)
        loss = mean_loss(self.base, self.objective, self.held_out)
        self.adapters.train(self.name)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the validation loss at step {state.step} is {loss}; checkpoints stay as they are"
            )
        trained = state.loss_sum / state.loss_count if state.loss_count else None
        better = state.step > 0 and (state.best_loss is None or loss < state.best_loss)  # at 0 it is the bare base
        state = replace(
            state,
            history=(*state.history, Validation(state.step, trained, loss)),
            loss_sum=0.0,
            loss_count=0,
            best_loss=loss if better else state.best_loss,
            best_step=state.step if better else state.best_step,
            evals_without_gain=0 if better or state.step == 0 else state.evals_without_gain + 1,
        )
        record = {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}
        self.metrics.write("eval", state.step, record)
        self.progress.validated(state.step, record)
        since = overfitting_since(state.history)
        if since is not None:
            self._note(
                state.step,
                f"validation loss has risen since step {since} while training loss falls: overfitting. Fewer epochs, a "
                "lower learning rate, some lora_dropout or more data help; early_stopping_patience stops by itself.",
            )
        return state

    def _save(self, state: TrainState) -> None:
        save_checkpoint(
            self.checkpoints,
            state.step,
            lambda folder: write_adapter(
                folder, self.adapters, self.name, BaseId(self.base.name, self.base.fingerprint)
            ),
            self.optimizer,
            list(self.parameters),
            state,
            self.config.save_total_limit,
            state.best_step if self.config.load_best_model_at_end else None,
        )

    def _patience_is_out(self, state: TrainState) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and state.evals_without_gain >= patience

    def _explained(self, error: Exception, state: TrainState, rows: Sequence[Example]) -> NonFiniteLossError:
        """Keep the last good state, and name the batch."""
        if not checkpoint_path(self.checkpoints, state.step).exists():
            self._save(state)
        named = ", ".join(row.source for row in rows[:8]) + (", …" if len(rows) > 8 else "")
        return NonFiniteLossError(
            f"step {state.step + 1}: {error}. The batch was {named}. Nothing was updated; the state after step "
            f"{state.step} is kept in {self.checkpoints}. Look at these rows, lower training.learning_rate or take "
            "model.dtype: float32, then start again."
        )

    def _note(self, step: int, text: str) -> None:
        self.metrics.write("note", step, {"text": text})
        self.progress.note(text)


def planned_steps(config: TrainingConfig, rows: int) -> int:
    """Optimizer steps of a run."""
    per_epoch = steps_per_epoch(rows, config.batch_size)
    return config.max_steps or max(1, round(config.num_train_epochs * per_epoch))
