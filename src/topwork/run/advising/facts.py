"""What is asked, and the facts that advice is given on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topwork.common.errors import RequestError
from topwork.models.config import ModelConfig
from topwork.models.structure import Structure
from topwork.plan.advice.facts import Facts
from topwork.run.advising.seen import Seen
from topwork.run.planning.place import find_place


@dataclass(frozen=True)
class Request:
    """What is asked, beside a recipe. All of it may be left out but the task, where there are no rows to tell it.

    examples  training rows, where there are no files of them
    tokens    of a row on average; `longest` of the longest
    train     a file of rows, which then tell the task, their number and their lengths; `eval` one of held-out rows
    device    a card by its name (`RTX 4090`), which has memory of its own
    memory    24GB, 16GiB, in the place of a device; without both, this machine's
    goals     names of `plan.advice.facts.GOALS`
    """

    task: str | None = None
    examples: int | None = None
    tokens: float | None = None
    longest: int | None = None
    model: str | None = None
    train: str | None = None
    eval: str | None = None
    device: str | None = None
    memory: str | None = None
    goals: Sequence[str] = ()


def facts_of(
    request: Request, seen: Seen | None, model: ModelConfig, structure: Structure, more: Mapping[str, Any]
) -> tuple[Facts, tuple[str, ...]]:
    """What advice is given on, and the lines that tell it. What a request says goes before what rows look like. Raises
    RequestError for lengths that contradict each other."""
    if request.tokens is not None and request.longest is not None and request.longest < request.tokens:
        raise RequestError(
            f"--longest is {request.longest:,}, which is less than the mean of {request.tokens:,g} that --tokens says; "
            "correct one of them"
        )
    looked, tokens = (seen.looked, seen.tokens) if seen else (None, None)
    place = find_place(request.device, request.memory, model.device)
    task = request.task or (looked.task if looked else "")
    rows = request.examples if request.examples is not None else seen.rows if seen else None
    each = request.tokens if request.tokens is not None else seen.tokens_per_row if seen else None
    longest = request.longest if request.longest is not None else seen.longest if seen else None
    text = looked.kind == "text" if looked else task == "continued-pretraining"
    facts = Facts(
        task, rows, each, seen.learned_share if seen else None, longest,
        measured=request.longest is not None or (tokens is not None and tokens.counted != "estimated"),
        kind="text" if text else "messages", turns=looked.turns if looked else task == "chat-style",
        writes_calls=seen.writes_calls if seen else None, structure=structure,
        memory_bytes=place.memory_bytes, device=place.kind, goals=frozenset(request.goals), **more,
    )  # fmt: skip
    told = [f"task: {task}{f' ({looked.why}; --task says otherwise)' if looked and not request.task else ''}"]
    if rows is not None:
        told.append(f"examples: {rows:,}")
    if each is not None:
        of = "" if request.tokens is not None or seen is None else f", {seen.how}"
        told.append(f"tokens of an example: {each:,.0f}{f', at most {longest:,}' if longest else ''}{of}")
    name = model.model_name_or_path
    told.append(f"base: {name}, {structure.parameters:,} parameters, width {structure.hidden:,}")
    told.append(f"memory: {place.of}")
    told += [f"goal: {goal}" for goal in request.goals]
    told += [f"decided: {key} = {value}" for key, value in facts.decided.items()]
    return facts, tuple(told)
