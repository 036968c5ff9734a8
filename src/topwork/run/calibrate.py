"""`topwork plan --calibrate`: what a step takes on this machine, measured with real steps of the model that a recipe
names, with random weights and few layers."""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId
from topwork.common.errors import NonFiniteLossError, RequestError
from topwork.common.memory import free_memory, memory_for
from topwork.data.examples import Example
from topwork.data.source import FixedRows
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.load import DTYPES, pick_device
from topwork.models.shaped import shaped_base
from topwork.objectives.table import objective_of
from topwork.ops.threads import computing_threads
from topwork.plan.base import structure_named
from topwork.plan.built import config_of
from topwork.plan.calibration import Arm, Measured, Question, fewer_layers, measured, planned_arms, rows_of
from topwork.plan.calibrations import Found, keep, kept, seconds_here
from topwork.plan.setup import setup_of
from topwork.plan.speeds import here
from topwork.plan.time import Speed
from topwork.recipe.recipe import Recipe, make_recipe
from topwork.training.memory import peak
from topwork.training.metrics import MetricsLog
from topwork.training.passes import step_passes
from topwork.training.progress import Silent
from topwork.training.step import train_step
from topwork.training.trial import Place, Timed, Trial

BUDGET_SECONDS = 50.0
"""What the steps of one measurement may take."""
GENERAL = "smollm2-135m"
"""The shape of the general rates; it is shipped, so that no file is needed."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 12
WARM_UP = 1
LATE = 2
"""How many times its budget a measurement may take where the machine is far slower than was guessed: one round then
counts."""

ENDLESS: dict[str, Any] = {"max_steps": 1 << 20, "warmup_steps": 0, "report_to": []}
"""Of the recipe's training, for steps that nobody counts."""

Lengths = Sequence[tuple[int, int]]
"""Rows as (tokens, learned tokens)."""


def calibrate(
    recipes: Sequence[Recipe],
    question: Question,
    lengths: Lengths,
    budget_seconds: float = BUDGET_SECONDS,
    log: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
    speed: Speed | None = None,
) -> Found:
    """Measure a step of recipes that train together, and keep what was found for later plans.

    question  what of them is asked: the base's structure, rows, passes
    lengths   rows as a step has them, virtual tokens included
    speed     what plans reckon this machine with before any measurement; left out, `plan/speeds.py`'s

    Raises RequestError where not even two layers fit into memory.
    """
    found = measure(recipes, question, lengths, budget_seconds, log, clock)
    speed = speed or here(question.setup.device)
    keep(question, found, speed, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    models = " and ".join(map(str, found.layers))
    log(
        f"a step takes {found.step:,.3f} s: {found.rounds} rounds with {models} of {question.setup.structure.layers} "
        f"layers, half of them within {found.spread:.0%}; load before: {found.load:.1f}"
        + (". The machine was busy: measure again in a quieter hour" if found.unsteady else "")
    )
    return seconds_here(question, speed, *kept(question.setup.device))


def calibrate_machine(budget_seconds: float = BUDGET_SECONDS, log: Callable[[str], None] = print) -> list[Found]:
    """General rates of this machine, by which recipes that were not measured are reckoned: LoRA on SmolLM2's shape in
    bfloat16 and in 4 bits, with rows of 256 tokens, half of them learned, in one pass of 1,024."""
    lengths, found = [(256, 128)] * 8, []
    for held in ({}, {"load_in_4bit": True}):
        recipe = make_recipe({
            "model": {"model_name_or_path": GENERAL}, "quantization": held, "data": {"train": "none"},
            "training": {"batch_size": 4},
        })  # fmt: skip
        setup = setup_of([recipe], structure_named(recipe.model))
        question = Question(setup, rows_of(lengths), 4, 1024, 0)
        found.append(calibrate([recipe], question, lengths, budget_seconds / 2, log))
    return found


@memory_for("measuring steps", "give this process more memory, or plan without --calibrate")
def measure(
    recipes: Sequence[Recipe],
    question: Question,
    lengths: Lengths,
    budget_seconds: float,
    log: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """The same, kept nowhere."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    models = planned_arms(question, here(question.setup.device), budget_seconds, _most_layers(question))
    told = " and ".join(str(layers) for layers, _ in models)
    log(f"measuring steps of {told} of the base's {question.setup.structure.layers} layers")
    with ExitStack() as stack:
        stack.enter_context(computing_threads(recipes[0].training.threads))  # a machine at rest: nobody looks
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="topwork-calibrate-")))
        arms = [
            _Model(recipes, question, lengths, layers, checkpointed, place / str(number), stack, clock)
            for number, (layers, checkpointed) in enumerate(models)
        ]
        taken = _in_turns(arms, budget_seconds, clock)
    gc.collect()
    found = [Arm(layers, count, tuple(seconds)) for (layers, count), seconds in zip(models, taken)]
    return measured(found, question.setup.structure.layers, question.checkpointed_layers, load)


def _in_turns(arms: Sequence["_Model"], budget_seconds: float, clock: Callable[[], float]) -> list[list[float]]:
    """Each arm's steps: rounds in which all take turns, which goes first changing, until the time is up."""
    for arm in arms:
        for _ in range(WARM_UP):
            arm.step()
    taken: list[list[float]] = [[] for _ in arms]
    start = clock()
    for number in range(MOST_ROUNDS):
        spent = clock() - start
        enough = number >= LEAST_ROUNDS and spent * (number + 1) / number > budget_seconds
        if enough or (number and spent > LATE * budget_seconds):
            break
        order = range(len(arms)) if number % 2 else reversed(range(len(arms)))
        for at in order:
            taken[at].append(arms[at].step())
    return taken


class _Model:
    """A model of some layers with the recipes' adapters, and trials that take real steps."""

    def __init__(
        self, recipes: Sequence[Recipe], question: Question, lengths: Lengths, layers: int, checkpointed: int,
        place: Path, stack: ExitStack, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        model, setup = recipes[0].model, question.setup
        config = config_of(model.model_name_or_path, model.revision, model.trust_remote_code)
        self.base = shaped_base(
            config, layers, DTYPES[setup.dtype], setup.quantization, pick_device(model.device), model.trust_remote_code
        )
        self.adapters, self.tokens, self.clock = Adapters(self.base.module), question.tokens_per_pass, clock
        vocabulary = self.base.module.config.get_text_config().vocab_size
        self.trials = []
        for number, recipe in enumerate(recipes):
            name, folder = f"member{number}", place / str(number)
            folder.mkdir(parents=True)
            self.adapters.add(name, _plain(recipe.adapter), seed=number)
            self.adapters.train(name)
            rows = _rows(lengths, vocabulary, self.base.virtual_tokens(name), number)
            metrics = stack.enter_context(MetricsLog(folder))
            training = recipe.training.model_copy(update=ENDLESS)
            where = Place(self.adapters, name, BaseId(None), folder)
            source = FixedRows(rows, question.batch_size, number)
            self.trials.append(Trial(where, objective_of(training.objective), training, source, [], metrics, Silent()))
        checkpoint_layers(self.base, checkpointed)

    def step(self) -> float:
        """One optimizer step of each trial as the loop takes it, in seconds."""
        start = self.clock()
        groups = [(trial.name, trial.next_rows()) for trial in self.trials]
        seeds = {trial.name: trial.dropout_seed() for trial in self.trials}
        virtual = {trial.name: self.base.virtual_tokens(trial.name) for trial in self.trials}
        passes = step_passes(groups, self.tokens, self.base.device, virtual, seeds, stretch=True)
        results = train_step(self.base, [trial.learner for trial in self.trials], passes)
        seconds, tokens = self.clock() - start, sum(len(batch.tokens) for batch in passes)
        for trial, result in zip(self.trials, results, strict=True):
            if not isinstance(result, NonFiniteLossError):
                trial.stepped(Timed(result, seconds, tokens))
        return self.clock() - start


def _rows(lengths: Lengths, vocabulary: int, virtual: int, seed: int) -> list[Example]:
    """Random tokens, `virtual` fewer in each row; the last of it are learned."""
    generator = np.random.default_rng(seed)
    rows = []
    for number, (whole, learned) in enumerate(lengths):
        length = max(2, whole - virtual)
        weights = np.zeros(length, np.float32)
        weights[max(1, length - learned) :] = 1.0
        rows.append(Example(generator.integers(0, vocabulary, length).astype(np.int32), weights, f"row {number}"))
    return rows


def _plain(adapter: AdapterConfig) -> AdapterConfig:
    """The same without what only its beginning needs, or what names layers that a smaller model lacks: a step takes as
    long."""
    fields = type(adapter).model_fields
    plain: dict[str, Any] = {
        "init_lora_weights": True, "init_from": None, "prompt_tuning_init": "random", "prompt_tuning_init_text": None,
        "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip
    return adapter.model_copy(update={name: value for name, value in plain.items() if name in fields})


def _most_layers(question: Question) -> int:
    """How many layers fit into free memory, beside a second model of a quarter of them."""
    setup, layers = question.setup, question.setup.structure.layers
    free = free_memory(pick_device(setup.device)).bytes

    def needed(count: int) -> int:
        checkpointed = min(count, question.checkpointed_layers)
        return peak(fewer_layers(setup, count), question.shape, checkpointed).bytes

    fitting = [count for count in range(1, layers + 1) if needed(count) <= 0.6 * free]
    if not fitting or (max(fitting) < 2 <= layers):
        raise RequestError(
            f"measuring steps needs two layers in memory, about {needed(min(2, layers)) / 1e6:,.0f} MB and as much "
            f"again, and {free / 1e6:,.0f} MB are free; give more memory, or plan without --calibrate"
        )
    return max(fitting)
