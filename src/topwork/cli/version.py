"""`topwork --version`: what somebody who is asked for help wants to know first. Imports nothing of what it names."""

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Annotated

import typer

import topwork

NAMED = ("torch", "transformers")
"""Packages whose versions decide most."""


def _print(asked: bool) -> None:
    if asked:
        print(f"topwork {topwork.__version__}")
        print(f"Python {platform.python_version()}, {', '.join(map(_told, NAMED))}, {platform.platform()}")
        raise typer.Exit


def _told(package: str) -> str:
    try:
        return f"{package} {installed(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def version(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print, is_eager=True, help="Versions of Topwork and what it stands on."),
    ] = False,
) -> None:
    """What stands before any command."""
