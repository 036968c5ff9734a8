"""What several commands share."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one option of the recipe.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def teller(as_json: bool) -> Callable[[str], None]:
    """Where lines for people go: to standard error where a program reads the output."""
    return (lambda text: print(text, file=sys.stderr)) if as_json else print
