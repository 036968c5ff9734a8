"""`topwork advise`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import AsJson

if TYPE_CHECKING:
    from topwork.run.advise import Advised, Request

EPILOG = (
    "Without arguments on a terminal it asks for what it needs.\n\n"
    "Example: topwork advise --task classification --examples 5000 --model llama-3-8b --memory 24GB\n\n"
    "topwork advise --data tickets.jsonl --out recipe.yaml\n\n"
    "topwork advise recipe.yaml"
)


def advise(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A recipe, which is compared with the advice.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, extraction, chat-style, instruction, continued-pretraining, tool-calls, reasoning, "
            "summarization. Left out, it is recognised from the rows."
        ),
    ] = None,
    examples: Annotated[int | None, typer.Option(metavar="N", help="Training rows, without --data.")] = None,
    tokens: Annotated[float | None, typer.Option(metavar="N", help="Tokens of an example on average.")] = None,
    longest: Annotated[int | None, typer.Option(metavar="N", help="Tokens of the longest example.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="The base: an alias, folder, Hub id.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows, as a recipe's data.train.")] = None,
    held_out: Annotated[str | None, typer.Option("--eval", metavar="FILE", help="Rows that are held out.")] = None,
    device: Annotated[str | None, typer.Option(metavar="CARD", help='The card to train on: "RTX 4090".')] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="24GB", help="In the place of a device; without both, this machine.")
    ] = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(
            help="What matters, may be given several times: changing-knowledge, citations, new-facts, format, style, "
            "latency, cost."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="What is decided already; the rest is advised around it."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the recipe, with its reasons.")] = None,
    as_prompt: Annotated[bool, typer.Option("--prompt", help="Print the rules as a prompt for any assistant.")] = False,
    skill: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the rules as a skill for agents: SKILL.md.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether to prompt, retrieve or fine-tune, and each setting of a fine-tuning with its reason and source."""
    if as_prompt or skill is not None:
        _knowledge(as_prompt, skill)
        return
    from topwork.run.advise import Request

    request = Request(task, examples, tokens, longest, model, data, held_out, device, memory, tuple(goal or ()))
    if recipe is None and request == Request() and not overrides:
        request = _asked()
    from topwork.run.advise import advise as run

    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked here
    found = run(recipe, overrides or [], request, lambda line: print(line, file=sys.stderr))
    _tell(found, as_json, out)


def _tell(found: "Advised", as_json: bool, out: Path | None) -> None:
    if out is not None:
        found.write(out)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    print(found.as_text())
    if out is not None:
        print(f"\nrecipe: {out}\ngo on with: topwork train {shlex.quote(str(out))}")


def _knowledge(as_prompt: bool, skill: Path | None) -> None:
    if as_prompt:
        from topwork.plan.advice.pages import prompt

        print(prompt())
    if skill is not None:
        from topwork.run.advise import write_skill

        for path in write_skill(skill):
            print(path)


def _asked() -> "Request":
    """What a person says on a terminal. Raises RequestError where there is none."""
    from topwork.common.errors import RequestError
    from topwork.plan.advice.facts import GOALS, TASKS
    from topwork.run.advise import Request

    if not sys.stdin.isatty():
        raise RequestError(
            "nothing to advise on, and no terminal to ask on: give a recipe, --data FILE, or --task and --examples; "
            "--model, --memory and --goal say more"
        )
    data = typer.prompt("A file of rows (empty: none yet)", default="", show_default=False) or None
    _listed("Tasks", TASKS)
    task = typer.prompt("Task" + (" (empty: as the rows look)" if data else ""), default="" if data else None)
    examples = None if data else typer.prompt("How many examples", type=int)
    model = typer.prompt("Base model", default="smollm2-135m")
    memory = typer.prompt("Memory, as 24GB (empty: what is free here)", default="", show_default=False) or None
    _listed("What matters", GOALS)
    goals = typer.prompt("Which of these, with commas (empty: none)", default="", show_default=False)
    named = tuple(goal.strip() for goal in goals.split(",") if goal.strip())
    return Request(task or None, examples, None, None, model, data, None, None, memory, named)


def _listed(title: str, words: object) -> None:
    assert hasattr(words, "items")
    print(f"{title}:")
    for name, meaning in words.items():
        print(f"  {name:22} {meaning}")
