"""Paths as people write them: with `~`, in quotes, as `file://` URLs; and what is said of one that is not there."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from topwork.common.errors import did_you_mean

MODEL_FILES = (".gguf", ".safetensors")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?|%[A-Za-z_]\w*%")
_QUOTES = "\"'"


def plain_path(given: str) -> str:
    """The path that somebody means: without white space and quotes around it, out of a `file://` URL, and with `~` and
    `~user` as the homes that they stand for. Variables are not expanded, and an unknown user's `~` stays."""
    text = given.strip()
    if len(text) > 2 and text[0] == text[-1] and text[0] in _QUOTES and not os.path.lexists(text):
        text = text[1:-1].strip()
    if text.lower().startswith("file://"):
        text = _of_url(text) or text
    return os.path.expanduser(text)


def is_there(path: Path) -> bool:
    """Whether there is a file or folder; a name that no file system takes is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder; as `is_there`."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_path(given: str) -> bool:
    """Whether a name can only be meant as a path, and not as `owner/name` of the Hub, by how it is written. A folder of
    the owner's name does not tell: people keep copies of some models in one, and name others of the same owner."""
    parts = re.split(r"[\\/]", given)
    return (
        given.startswith((".", "/", "\\", "~"))
        or _DRIVE.match(given) is not None
        or "\\" in given
        or len(parts) > 2
        or given.lower().endswith(MODEL_FILES)
    )


def variable_in(path: str) -> str | None:
    """`$HOME` or `%HOME%`, where a path has one of the kind as a shell would expand it."""
    found = _VARIABLE.search(path)
    return found[0] if found else None


def missed(path: str | Path) -> str:
    """'; …' about a path that is not there: what in it is never expanded, or names like it in the nearest folder that
    is there."""
    text = str(path)
    if text.startswith("~"):
        return f"; {text.partition('/')[0]} is no home that is known here"
    if "$" in text or "%" in text:
        return f"; variables ({variable_in(text) or '$ or %'}) are not expanded in paths: write it out"
    if os.sep == "/" and "\\" in text:
        slashed = text.replace("\\", "/")
        there = f"; did you mean {slashed!r}?" if Path(slashed).exists() else ""
        return there or "; folders are parted by / on this system, not by \\"
    return _nearest(Path(path))


def _nearest(path: Path) -> str:
    """Names like the first part of a path that is not there, with what leads to it."""
    above = path.parent
    while not is_folder(above):
        if above == above.parent:
            return ""
        path, above = above, above.parent
    try:
        beside = [str(above / entry.name) for entry in above.iterdir()]
    except OSError:
        return ""
    return did_you_mean(str(path), beside) if _like(path.name, beside) else ""


def _like(name: str, beside: list[str]) -> bool:
    """Whether one of them has nearly this name, whatever the folder that they share."""
    return bool(did_you_mean(name, [Path(other).name for other in beside]))


def _of_url(url: str) -> str | None:
    host, _, rest = url[len("file://") :].partition("/")
    if host not in ("", "localhost"):
        return None
    path = unquote(f"/{rest}")
    return path[1:] if _DRIVE.match(path[1:]) else path
