"""Rows that the adapter in training writes itself: rollouts between steps, through the loop as it is.

The source lives here and nowhere else: what reinforcement learning needs of the loop is `RowSource`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.families import VOCABULARY, sequences, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId
from topwork.common.errors import NonFiniteLossError, RecipeError
from topwork.common.seeds import hashed
from topwork.data.examples import Example
from topwork.generation.engine import Engine, EngineSettings
from topwork.generation.requests import Request
from topwork.generation.sampling import Sampling
from topwork.models.base import Base
from topwork.objectives.sft import Sft
from topwork.training.checkpoint import ADAPTER, checkpoint_path, list_checkpoints
from topwork.training.config import TrainingConfig
from topwork.training.loop import Loop
from topwork.training.metrics import MetricsLog
from topwork.training.progress import Silent
from topwork.training.start import common_start
from topwork.training.trial import CHECKPOINTS, Place, Trial

NAME, STEPS, BREAK = "policy", 9, 5
PROMPTS = [part.tolist() for part in sequences((5, 9, 2, 12, 7))]
PER_STEP, ANSWERS, NEW = 2, 4, 8
CONFIGS = {
    "lora": AdapterConfig(r=4, lora_dropout=0.2, modules_to_save=["lm_head"]),
    "dora": AdapterConfig(r=4, use_dora=True),
}


class Killed(Exception):
    """In the place of a SIGKILL."""


@dataclass
class Rollouts:
    """Answers to the next prompts in turn, drawn by the adapter as it is, each token weighted by what it is worth
    beyond the mean of those before."""

    base: Base
    adapters: Adapters
    spoil: Callable[[int, float], float] = lambda _, weight: weight
    """What becomes of a step's weights."""
    next_prompt: int = 0
    mean: float = 0.5
    drawn: dict[int, list[tuple[list[int], list[float]]]] = field(default_factory=dict)
    worth: dict[int, float] = field(default_factory=dict)
    """Of every step asked for its rows, and what they were worth: a record for the tests."""

    def __post_init__(self) -> None:
        self.engine = Engine(self.base, EngineSettings(batch_size=5))

    @property
    def steps_per_epoch(self) -> None:
        return None

    def examples(self, step: int) -> Sequence[Example]:
        chosen = [PROMPTS[(self.next_prompt + number) % len(PROMPTS)] for number in range(PER_STEP)]
        self.next_prompt += PER_STEP
        answers = self._answers([prompt for prompt in chosen for _ in range(ANSWERS)], step)
        rows = [self._row(step, prompt, answer) for prompt, answer in answers]
        self.drawn[step] = [(row.tokens.tolist(), row.weights.tolist()) for row in rows]
        self.worth[step] = float(np.mean([worth(token) for _, answer in answers for token in answer]))
        self.mean = 0.9 * self.mean + 0.1 * self.worth[step]
        return rows

    def state(self) -> dict[str, Any]:
        return {"next_prompt": self.next_prompt, "mean": self.mean}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.next_prompt, self.mean = state["next_prompt"], state["mean"]

    def _answers(self, prompts: Sequence[list[int]], step: int) -> list[tuple[list[int], list[int]]]:
        samplings = [Sampling(NEW, temperature=1.0, seed=hashed(0, step, number)) for number in range(len(prompts))]
        ids = [self.engine.submit(Request(prompt, NAME, {2}, own)) for prompt, own in zip(prompts, samplings)]
        found: dict[int, list[int]] = {id: [] for id in ids}
        with self.adapters.evaluating(NAME):
            while self.engine.busy:
                for event in self.engine.step():
                    if event.token is not None:
                        found[event.id].append(event.token)
        return [(prompt, found[id]) for prompt, id in zip(prompts, ids, strict=True)]

    def _row(self, step: int, prompt: list[int], answer: list[int]) -> Example:
        weights = [0.0] * len(prompt) + [self.spoil(step, max(0.0, worth(token) - self.mean)) for token in answer]
        return Example(np.array(prompt + answer, np.int32), np.array(weights, np.float32), f"rollout of step {step}")


def worth(token: int) -> float:
    """Small tokens are wanted, of which the model knows nothing."""
    return float(token < VOCABULARY / 2)


def prepared(
    folder: Path, config: AdapterConfig, spoil: Callable[[int, float], float] | None = None, steps: int | None = STEPS
) -> tuple[Loop, Rollouts]:
    """A loop with one trial, as a process of its own would make it."""
    base = tiny_base()
    adapters = Adapters(base.module)
    adapters.add(NAME, config)
    rows = Rollouts(base, adapters, spoil or (lambda _, weight: weight))
    training = TrainingConfig(learning_rate=2e-2, lr_scheduler_type="constant", max_steps=steps, save_steps=2)
    folder.mkdir(exist_ok=True)
    place = Place(adapters, NAME, BaseId(base.name, base.fingerprint), folder)
    metrics = MetricsLog(folder, 0 if (folder / CHECKPOINTS).exists() else None)
    return Loop(base, adapters, [Trial(place, Sft(), training, rows, (), metrics, Silent())], 128), rows


def written(folder: Path) -> bytes:
    """The adapter's file at the end of a run."""
    return (checkpoint_path(folder / CHECKPOINTS, STEPS) / ADAPTER / "adapter_model.safetensors").read_bytes()


def killed(step: int, weight: float) -> float:
    if step == BREAK:
        raise Killed
    return weight


def diverging(step: int, weight: float) -> float:
    return math.inf if step == BREAK else weight


@pytest.mark.parametrize("kind", CONFIGS)
def test_rollouts_are_resumed_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """Killed while it writes answers, with a checkpoint of the step before; stopped by a step whose loss is infinite,
    whose checkpoint is written after the source was asked."""
    whole, rows = prepared(tmp_path / "whole", CONFIGS[kind])
    assert whole.run()[0].stopped == "finished"
    assert list(rows.drawn) == list(range(STEPS))

    def broken(how: str, saved: int, spoil: Callable[[int, float], float]) -> None:
        loop, _ = prepared(tmp_path / how, CONFIGS[kind], spoil)
        with suppress(Killed, NonFiniteLossError):
            loop.run()
        start = common_start([tmp_path / how / CHECKPOINTS], print)
        assert start.at == saved
        loop, resumed = prepared(tmp_path / how, CONFIGS[kind])
        loop.resume(start)
        assert loop.run()[0].stopped == "finished"
        assert resumed.drawn == {step: rows.drawn[step] for step in range(saved, STEPS)}
        assert written(tmp_path / how) == written(tmp_path / "whole")

    broken("killed", BREAK - 1, killed)
    broken("diverged", BREAK, diverging)


def test_the_answers_are_the_learners_own(tmp_path: Path) -> None:
    """What is wanted comes more often once it has been learned."""
    loop, rows = prepared(tmp_path / "run", CONFIGS["lora"])
    loop.run()
    assert rows.worth[0] < 0.6
    assert rows.worth[STEPS - 1] > 0.8


def test_rows_without_an_end_need_a_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"set training\.max_steps"):
        prepared(tmp_path / "run", CONFIGS["lora"], steps=None)
    assert list_checkpoints(tmp_path / "run" / CHECKPOINTS) == []
