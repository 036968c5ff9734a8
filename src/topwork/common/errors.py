"""Errors a user meets. Each message says what was given, what was expected and what to do.

Every error is a `TopworkError` and also the standard error it stands for, so that `except ValueError` keeps working.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TopworkError(Exception):
    """Base of all of Topwork's own errors. `exit_code` is what the command line ends with."""

    exit_code = 1


class RequestError(TopworkError, ValueError):
    """The request was wrong: nothing was started, nothing was written."""

    exit_code = 2


class RecipeError(RequestError):
    """A recipe with an unknown key, a wrong type or values that contradict each other."""


class DataError(RequestError):
    """Rows, files or templates that cannot be turned into training examples."""


class ModelError(RequestError):
    """A base model that cannot be found, read or trained as a flat batch."""


class AdapterError(RequestError):
    """An adapter that does not fit: targets that match nothing, another base, an unreadable folder."""


class RunError(TopworkError, RuntimeError):
    """The run failed on its way; what was saved before is kept."""


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


class NonFiniteLossError(RunError):
    """The loss or the gradient became NaN or infinite."""


class UnknownAdapterError(AdapterError, LookupError):
    """An adapter of this name, or a folder of this path, is not there."""


def shortened(text: str, limit: int) -> str:
    """Its beginning and that there is more, where it is longer."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def quoted(value: object, limit: int = 80) -> str:
    """As `repr` tells it, in a few characters that any log and any JSON can hold: what strangers send may be long, or
    no text at all."""
    return shortened(ascii(value), limit)


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """'; did you mean 'a' or 'b'?' for the nearest of `known`, or an empty string where none is near."""
    near = get_close_matches(word, list(known), n=limit, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
