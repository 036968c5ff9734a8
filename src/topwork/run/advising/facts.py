"""What is asked, and the facts that advice is given on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from topwork.common.errors import RequestError
from topwork.common.memory import free_host_memory
from topwork.models.config import ModelConfig
from topwork.models.structure import Structure
from topwork.plan.advice.facts import Facts
from topwork.plan.devices import find_device
from topwork.run.advising.seen import Seen

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Request:
    """What is asked, beside a recipe. All of it may be left out but the task, where there are no rows to tell it.

    examples  training rows, where there are no files of them
    tokens    of a row on average; `longest` of the longest
    train     a file of rows, which then tell the task, their number and their lengths; `eval` one of held-out rows
    device    a card by its name (`RTX 4090`); its memory, where `memory` does not say otherwise
    memory    24GB, 16GiB; left out, what this machine has free
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
    """What advice is given on, and the lines that tell it. What a request says goes before what rows look like."""
    looked, tokens = (seen.looked, seen.tokens) if seen else (None, None)
    memory, device, where = _memory(request)
    task = request.task or (looked.task if looked else "")
    rows = request.examples if request.examples is not None else seen.rows if seen else None
    each = request.tokens if request.tokens is not None else seen.tokens_per_row if seen else None
    longest = request.longest if request.longest is not None else seen.longest if seen else None
    text = looked.kind == "text" if looked else task == "continued-pretraining"
    facts = Facts(
        task, rows, each, seen.learned_share if seen else None, longest,
        measured=request.longest is not None or (tokens is not None and tokens.counted != "estimated"),
        kind="text" if text else "messages", turns=looked.turns if looked else task == "chat-style",
        writes_calls=seen.writes_calls if seen else None, structure=structure, memory_bytes=memory, device=device,
        goals=frozenset(request.goals), **more,
    )  # fmt: skip
    told = [f"task: {task}{f' ({looked.why}; --task says otherwise)' if looked and not request.task else ''}"]
    if rows is not None:
        told.append(f"examples: {rows:,}")
    if each is not None:
        of = "" if request.tokens is not None or seen is None else f", {seen.how}"
        told.append(f"tokens of an example: {each:,.0f}{f', at most {longest:,}' if longest else ''}{of}")
    name = model.model_name_or_path
    told.append(f"base: {name}, {structure.parameters:,} parameters, width {structure.hidden:,}")
    told.append(f"memory: {memory / 2**30:.1f} GiB{where}")
    told += [f"goal: {goal}" for goal in request.goals]
    told += [f"decided: {key} = {value}" for key, value in facts.decided.items()]
    return facts, tuple(told)


def _memory(request: Request) -> tuple[int, Literal["cpu", "cuda"], str]:
    """Bytes, of what, and where they are."""
    card = find_device(request.device) if request.device is not None else None
    device: Literal["cpu", "cuda"] = "cpu" if card is None else "cuda"
    if request.memory is not None:
        return memory_bytes(request.memory), device, ""
    if card is not None:
        return card.memory_bytes, device, f" of {card.name}"
    return free_host_memory().bytes, device, " free on this machine"


def memory_bytes(text: str) -> int:
    """24GB, 16 GiB. Raises RequestError."""
    number, unit = text.strip().rstrip("GgMmKkTtIiBb "), text.strip().upper()
    unit = unit[len(number) :].strip()
    try:
        found = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise RequestError(f"memory {text!r}: expected a number with a unit, as 24GB or 16GiB") from None
    if not 0 < found < float("inf"):
        raise RequestError(f"memory {text!r}: expected more than nothing")
    return round(found)
