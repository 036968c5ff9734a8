"""`~` in the command line's paths where no shell has expanded it: in `--out=~/x`, in quotes, on Windows."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from topwork.common.paths import plain_path


class AtHome(TyperGroup):
    """A group whose commands are given each path as it is meant (`plain_path`)."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None and command.callback is not None:
            command.callback = _with_plain_paths(command.callback)
        return command


def _with_plain_paths(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def called(**given: Any) -> Any:
        return function(**{name: _plain(value) for name, value in given.items()})

    return called


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return Path(plain_path(str(value))) if isinstance(value, Path) else value
