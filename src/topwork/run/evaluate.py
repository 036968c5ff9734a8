"""`topwork eval`: loss, exact answers and samples, before (the bare base) and after (with the adapter)."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import load_adapter
from topwork.common.errors import DataError, RequestError
from topwork.common.memory import memory_for
from topwork.common.os_errors import explained
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig, Sources, told
from topwork.data.conversations import Conversation
from topwork.data.examples import Example, load_data
from topwork.data.files.sources import with_held_out
from topwork.evaluation.config import EvaluationConfig
from topwork.evaluation.grade import Grader, pick_grader
from topwork.evaluation.score import Question, Scores, questions_of, score, score_together
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.tokenizer import open_tokenizer
from topwork.recipe.recipe import Recipe
from topwork.reporting.readers import scores_file
from topwork.run.console import Counter
from topwork.run.folder import ADAPTER_NAME, EVALUATION, TRIAL, data_of
from topwork.run.given import Given, given_adapter, given_run
from topwork.run.keeping import check_writable, keep_scores, refuse_other_file
from topwork.run.loading import open_base
from topwork.run.opened import open_given
from topwork.run.own_rows import load_own
from topwork.run.vocabulary import base_id, with_vocabulary

LESS = (
    "a smaller evaluation.batch_size or evaluation.max_new_tokens in the run's recipe.yaml (without a run: "
    "--max-new-tokens), or fewer adapters at once, take less"
)


@dataclass(frozen=True)
class Rows:
    """What is asked: questions, and the same rows as examples for the loss."""

    questions: list[Question]
    examples: list[Example]


@dataclass(frozen=True)
class _Read:
    """Rows as they were read, before any weight is: the conversations, and the same as examples."""

    conversations: list[Conversation]
    examples: list[Example]
    template: ChatTemplate


@explained()
def evaluate(
    run: Path | str,
    data: str | None = None,
    max_rows: int | None = None,
    before: bool = True,
    force: bool = False,
    log: Callable[[str], None] = print,
    *,
    model: str | None = None,
    checkpoint: str | int | None = None,
    out: Path | str | None = None,
) -> dict[str, Any]:
    """Score a run's adapter beside its base, and write RUN/evaluation.json; a trial with `max_rows` or without the
    base goes to RUN/evaluation-trial.json, so that it does not take the whole one's place, and a checkpoint's scores to
    RUN/evaluation-step-NNNNNN.json.

    model       the base, where it is no longer where the run names it
    checkpoint  a step, `best` or `last`; left out, the finished adapter, or where there is none yet the newest
    out         a file for the scores, instead of one in the run's folder

    Raises RequestError before any work where the scores could not be written. Where they cannot be in the end, they are
    logged and returned all the same, with the reason as `not_written`.
    """
    given = given_run(run, model, checkpoint, log)
    target = _target(given, trial=not before or max_rows is not None, out=out)
    result = _scores_of(given, data, max_rows, before, force, log)
    if given.checkpoint is not None:
        result["checkpoint"] = given.checkpoint
    return keep_scores(result, target, None if out is not None else given.place, log)


def _scores_of(
    given: Given, data: str | None, max_rows: int | None, before: bool, force: bool, log: Callable[[str], None]
) -> dict[str, Any]:
    assert given.recipe is not None
    recipe, seed = given.recipe, given.recipe.training.seed
    config = recipe.evaluation.model_copy(update={"max_rows": max_rows or recipe.evaluation.max_rows})
    arms: dict[str, str | None] = {"before": None, "after": ADAPTER_NAME} if before else {"after": ADAPTER_NAME}
    named = data or config.data
    tokenizer, length = open_tokenizer(given.model, log)
    way = data_of(given.place, recipe)
    read = _read(way, named, tokenizer, length - recipe.adapter.virtual_tokens, seed, log)
    opened = open_given(given, force=force, log=log, tokenizer=tokenizer)
    rows = _rows(read, opened.template, seed, config)
    result = _score_arms(opened.base, arms, rows, opened.template, config, log)
    return result | {"data": data or config.data or "held out of training"}


def _target(given: Given, trial: bool, out: Path | str | None) -> Path:
    """Where the scores go. Raises RequestError where they cannot."""
    if out is not None:
        return _named_target(Path(out))
    target = given.place / (TRIAL if trial else scores_file(given.checkpoint))
    check_writable(target, "the scores", "a FILE for them with --out")
    return target


def _named_target(out: Path) -> Path:
    refuse_other_file(out)
    check_writable(out, "the scores", "another FILE with --out")
    return out


@explained()
def evaluate_model(
    model: ModelConfig | None,
    data: DataConfig,
    config: EvaluationConfig,
    adapter: Path | str | None = None,
    force: bool = False,
    seed: int = 0,
    log: Callable[[str], None] = print,
    *,
    out: Path | str | None = None,
) -> dict[str, Any]:
    """Score any base on any rows, and any PEFT folder or Hub id on top of it; writes nothing but `out`, a file for the
    scores. Where no `model` is named it is the one that the adapter's file names."""
    target = _named_target(Path(out)) if out is not None else None
    named = model.model_name_or_path if model is not None else None
    given = None if adapter is None else given_adapter(adapter, named, log=log)
    saved = None if given is None else given.saved
    model = model or ModelConfig(model_name_or_path=_base_named(given))
    if given is not None:
        model = with_vocabulary(model, given.saved, given.folder)
    tokenizer, length = open_tokenizer(model, log)
    room = length - (0 if saved is None else saved.config.virtual_tokens)
    read = _read(data, config.data, tokenizer, room, seed, log)
    base = open_base(model, log, None, tokenizer)
    template = ChatTemplate.from_config(base.tokenizer, data)
    arms: dict[str, str | None] = {"before": None}
    if saved is not None:
        warning = load_adapter(Adapters(base.module), ADAPTER_NAME, saved, base_id(base), force)
        if warning:
            log(f"warning: {warning}")
        arms["after"] = ADAPTER_NAME
    rows = _rows(read, template, seed, config)
    result = _score_arms(base, arms, rows, template, config, log)
    return result if target is None else keep_scores(result, target, None, log)


def _base_named(given: Given | None) -> str:
    if given is None:
        raise RequestError("there is nothing to score: give a model, an adapter, or both")
    return given.model.model_name_or_path


@dataclass(frozen=True)
class Finished:
    """A run that `evaluate_members` scores; `adapter` is its name on the base."""

    name: str
    folder: Path
    recipe: Recipe
    adapter: str


def evaluate_members(
    base: Base, members: Sequence[Finished], seed: int = 0, log: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Score runs whose adapters are on one loaded base, answers of several in one call, and write each one's
    RUN/evaluation.json; the result is by the members' names.

    Rows that `evaluation.data` or `data.eval` names are drawn by `seed`, the same for all; rows held out of training
    are each run's own.
    """
    groups: dict[str, list[Finished]] = {}
    for member in members:
        groups.setdefault(_asked(member.recipe), []).append(member)
    found: dict[str, dict[str, Any]] = {}
    for alike in groups.values():
        found |= _score_group(base, alike, seed, log)
    return found


def _score_group(
    base: Base, members: Sequence[Finished], seed: int, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Members that are asked the same rows, and the bare base."""
    arms: dict[str, str | None] = {"before": None, **{member.name: member.adapter for member in members}}
    recipe, folder = members[0].recipe, members[0].folder
    config = recipe.evaluation
    named = config.data or (None if recipe.data.eval is None else with_held_out(recipe.data).eval)
    seed = seed if named else recipe.training.seed
    scored = score_arms(base, arms, data_of(folder, recipe), named, config, seed, log)
    found = {}
    for member in members:
        pair = {"before": scored.arms["before"], "after": scored.arms[member.name]}
        found[member.name] = _told(scored.rows, pair, scored.grader, config) | {
            "data": told(named) if named else "held out of training"
        }
        found[member.name] = keep_scores(found[member.name], member.folder / EVALUATION, member.folder, log)
    return found


@dataclass(frozen=True)
class ScoredArms:
    """What was asked, how it was graded, and what each arm made of it."""

    rows: Rows
    grader: Grader
    arms: dict[str, Scores]


@memory_for("evaluating", LESS)
def score_arms(
    base: Base, arms: Mapping[str, str | None], data: DataConfig, named: Sources | None, config: EvaluationConfig,
    seed: int, log: Callable[[str], None] = print,
) -> ScoredArms:  # fmt: skip
    """Adapters on one loaded base by what they are called (None: the bare base), asked the rows that are `named`, or
    those that `data` holds out of training; their answers are written in one call."""
    template = ChatTemplate.from_config(base.tokenizer, data)
    read = _read(data, named, base.tokenizer, _room(base, arms), seed, log)
    rows = _rows(read, template, seed, config)
    references = [question.reference for question in rows.questions]
    grader = pick_grader(references) if config.grader == "auto" else config.grader
    with Counter(f"answers of {len(arms) - 1} adapters", len(arms) * len(references), log) as counter:
        scored = score_together(
            base, list(arms.values()), rows.questions, rows.examples, template, grader, config.max_new_tokens,
            config.batch_size, counter,
        )  # fmt: skip
    return ScoredArms(rows, grader, dict(zip(arms, scored)))


def _asked(recipe: Recipe) -> str:
    """What decides a recipe's rows: runs with the same are asked the same."""
    data = recipe.data.model_dump(mode="json")
    named = recipe.evaluation.data or recipe.data.eval
    if named is not None:
        rows = None if recipe.evaluation.data else data["eval"]  # with its splits and columns
        data |= {"train": "", "eval": rows, "eval_fraction": 0.0, "max_rows": None}
    seed = None if named is not None else recipe.training.seed
    return json.dumps([data, recipe.evaluation.model_dump(mode="json"), seed])


def _room(base: Base, arms: Mapping[str, str | None]) -> int:
    """What the context has for text, whichever of the adapters reads it."""
    return base.context_length - max(base.virtual_tokens(adapter) for adapter in arms.values())


def _read(
    data: DataConfig, named: Sources | None, tokenizer: PreTrainedTokenizerBase, room: int, seed: int,
    log: Callable[[str], None],
) -> _Read:  # fmt: skip
    """The rows to ask: the ones named, or those that training held out; `room` is the tokens that one may have."""
    if named is None:
        try:
            loaded = load_own(data, tokenizer, room, seed)
        except (DataError, OSError) as error:
            raise DataError(f"{error}; where the run's own rows are gone, name rows to score by --data") from error
        if not loaded.eval:
            raise RequestError("the run held no rows out; name rows to score by --data or evaluation.data")
        return _Read(list(loaded.eval_conversations), list(loaded.eval), loaded.template)
    loaded = load_data(data.reading(named), tokenizer, room, seed, lambda _: None)
    log(f"{told(named)}: {loaded.summary.recognised}")
    for note in loaded.summary.told():
        log(note.line())
    return _Read(list(loaded.train_conversations), list(loaded.train), loaded.template)


def _rows(read: _Read, template: ChatTemplate, seed: int, config: EvaluationConfig) -> Rows:
    """Questions of the rows, drawn by `seed` where there are more than `max_rows`."""
    if not read.conversations:  # plain text: nothing to ask, a loss to measure
        return Rows([], read.examples[: config.max_rows])
    chosen = _drawn(read.conversations, config.max_rows, seed)
    sources = {row.source for row in chosen}
    asked = template if template.jinja is not None else read.template  # the rows may be read raw
    return Rows(questions_of(chosen, asked), [example for example in read.examples if example.source in sources])


def _drawn(conversations: list[Conversation], count: int | None, seed: int) -> list[Conversation]:
    if count is None or count >= len(conversations):
        return conversations
    chosen = sorted(random.Random(seed).sample(range(len(conversations)), count))
    return [conversations[i] for i in chosen]


@memory_for("evaluating", LESS)
def _score_arms(
    base: Base, arms: dict[str, str | None], rows: Rows, template: ChatTemplate, config: EvaluationConfig,
    log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    references = [question.reference for question in rows.questions]
    grader = pick_grader(references) if config.grader == "auto" else config.grader
    scores: dict[str, Scores] = {}
    for arm, adapter in arms.items():
        with Counter(f"answers {arm}", len(rows.questions), log) as counter:
            scores[arm] = score(
                base, adapter, rows.questions, rows.examples, template, grader, config.max_new_tokens,
                config.batch_size, counter,
            )  # fmt: skip
    return _told(rows, scores, grader, config)


def _told(rows: Rows, scores: dict[str, Scores], grader: str, config: EvaluationConfig) -> dict[str, Any]:
    """What evaluation.json says of some arms."""
    asked = bool(rows.questions)
    result: dict[str, Any] = {"rows": len(rows.questions or rows.examples), "grader": grader if asked else "loss alone"}
    result |= {arm: scored.summary for arm, scored in scores.items()}
    shown = range(min(config.samples, len(rows.questions)))
    result["samples"] = [_sample(rows.questions[i], i, scores) for i in shown]
    return result


def _sample(question: Question, index: int, scores: dict[str, Scores]) -> dict[str, Any]:
    sample: dict[str, Any] = {"prompt": question.prompt, "reference": question.reference, "source": question.source}
    for arm, scored in scores.items():
        sample[arm] = scored.answers[index]
        sample[f"correct_{arm}"] = scored.grades[index].exact
    return sample
