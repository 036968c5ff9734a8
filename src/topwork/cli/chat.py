"""`topwork chat`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from topwork.cli.naming import Adapter, Model, named_first
from topwork.cli.options import Checkpoint, Force, starting

if TYPE_CHECKING:
    from pathlib import Path

    from topwork.run.console import Teller

EPILOG = (
    'Example: topwork chat runs/support "The Nimbus 2 has been leaking since 3 May 2026!"\n\n'
    'topwork chat --compare runs/support runs/terse "Where is my order 4711?"\n\n'
    'topwork chat --model models/base --adapter someone/adapter "Where is my order 4711?"'
)


def chat(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's folder, or any PEFT folder.")] = None,
    prompt: Annotated[str | None, typer.Argument(help="Ask once and end; left out, a conversation begins.")] = None,
    question: Annotated[str | None, typer.Argument(hidden=True)] = None,
    base: Annotated[bool, typer.Option("--base", help="Without the adapter.")] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Without and with the adapter side by side; or `--compare A B [PROMPT]`: two of runs, PEFT folders "
            "and `base`, in one batch.",
        ),
    ] = False,
    model: Model = None,
    adapter: Adapter = None,
    checkpoint: Checkpoint = None,
    system: Annotated[str | None, typer.Option(help="The system message; left out, the one of training.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest of this much together.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Decides the draw above temperature 0.")] = 0,
    force: Force = False,
) -> None:
    """Ask a run or any adapter, once or in a conversation."""
    from topwork.common.errors import RequestError
    from topwork.common.streams import readable

    place, (prompt, question) = named_first((run, prompt, question), adapter, ("RUN", "PROMPT", "PROMPT"))
    log = starting(to_errors=True)
    from topwork.generation.sampling import Sampling
    from topwork.run.opened import open_run
    from topwork.run.talk import ask_once, converse

    if system is not None:
        system = readable(system, "--system", log)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    if compare:
        if base:
            raise RequestError("--base leaves the adapter out, and --compare compares with it; give one of them")
        others = [text for text in (prompt, question) if text is not None]
        _compare(place, others, sampling, system, model, checkpoint, force, log)
        return
    if question is not None:
        raise RequestError(f"{question!r}: only with --compare A B; a question is one argument, in quotes")
    opened = open_run(place, force=force, log=log, model=model, checkpoint=checkpoint)
    log.quiet()
    if prompt is None:
        converse(opened, sampling, system, not base)
    else:
        ask_once(opened, prompt, sampling, system, not base)


def _compare(
    first: "Path | str", words: list[str], sampling: Any, system: str | None, model: str | None, checkpoint: str | None,
    force: bool, log: "Teller",
) -> None:  # fmt: skip
    """`first` and `words`: A B [PROMPT], or RUN [PROMPT] for a run without and with its adapter."""
    from topwork.common.errors import RequestError
    from topwork.run.compare import BASE, names_a_side, open_pair, with_and_without
    from topwork.run.opened import open_run
    from topwork.run.talk import ask_both, converse_with_both

    if len(words) == 2 or (len(words) == 1 and names_a_side(words[0])):
        if checkpoint is not None:
            raise RequestError(
                f"--checkpoint {checkpoint}: of which of the two? Name its folder instead, say {first}/checkpoints/…"
            )
        pair = open_pair((str(first), words[0]), sampling, system, model, force, log)
        asked = words[1:]
    elif str(first) == BASE:
        raise RequestError("--compare: give two of runs, PEFT folders and `base`")
    else:
        run = open_run(first, force=force, log=log, model=model, checkpoint=checkpoint)
        pair = with_and_without(run, sampling, system)
        asked = words
    log.quiet()
    if asked:
        ask_both(pair, asked[0])
    else:
        converse_with_both(pair)
