"""Command lines in a script or a text: `trl sft --learning_rate 2e-4 …`, over several lines where they end in `\\`."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from topwork.run.importing.records import Given
from topwork.run.importing.yaml_lines import number

_ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(\S+|\"[^\"]*\"|'[^']*')\s*")
_USED = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
_TO_FILL_IN = re.compile(r"\$|^<[\w .-]+>$")
_PROCESSES = ("num_processes", "nproc_per_node", "nproc-per-node", "num_gpus", "n_devices")


@dataclass
class Command:
    """A command: the words that name it, its options by their names, and on how many devices it runs, where it says."""

    line: int
    words: tuple[str, ...]
    options: list[Given] = field(default_factory=list)
    devices: int | None = None

    def says(self, *names: str) -> bool:
        """Whether its words, one after the other, are these: `trl sft`, `mlx_lm.lora`."""
        words = [word.rpartition("/")[2] for word in self.words]
        return any(words[at : at + len(names)] == list(names) for at in range(len(words)))


def commands_in(text: str) -> list[Command]:
    """All of a text's commands that have options."""
    variables: dict[str, str] = {}
    found = []
    for line, command in _joined(text):
        assigned = _ASSIGNED.fullmatch(command.strip())
        if assigned:
            variables[assigned[1]] = assigned[2].strip("\"'")
            continue
        filled = _USED.sub(lambda match: variables.get(match[1], match[0]), command)
        tokens = _tokens(filled)
        if any(token.startswith("--") or token in ("-c",) for token, _ in tokens):
            found.append(_command(line, tokens))
    return found


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Commands with the number of their first line; a line break inside of one stays, so that its lines are told."""
    held: list[str] = []
    first = 0
    for number_, line in enumerate(text.splitlines(), 1):
        first = first if held else number_
        held.append(line.rstrip().removesuffix("\\"))
        if not line.rstrip().endswith("\\"):
            yield first, "\n".join(held)
            held = []
    if held:
        yield first, "\n".join(held)


def _tokens(command: str) -> list[tuple[str, int]]:
    """Its words, each with the number of line breaks before it."""
    tokens = []
    for offset, line in enumerate(command.split("\n")):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quote that is not closed: prose, or a text over several lines
            words = line.split()
        tokens += [(word, offset) for word in words]
    return tokens


def _command(line: int, tokens: list[tuple[str, int]]) -> Command:
    words: list[str] = []
    options: list[tuple[str, int, list[str]]] = []
    script = False  # what stands before the program's own name belongs to a launcher
    for token, offset in tokens:
        if token.startswith("--") or token == "-c":
            name, equals, value = token.lstrip("-").partition("=")
            options.append((name, line + offset, [value] if equals else []))
        elif options and not _is_program(token, options, script):
            options[-1][2].append(token)
        else:
            script = script or _names_program(token)
            words.append(token)
    devices = next((int(values[0]) for name, _, values in options if name in _PROCESSES and _is_count(values)), None)
    own = [(name, at, values) for name, at, values in options if name not in _PROCESSES]
    return Command(line, tuple(words), [_given(*each) for each in own], devices)


def _names_program(token: str) -> bool:
    return token.endswith(".py") or token in (
        "sft",
        "train",
        "lora",
        "mlx_lm.lora",
        "mlx_lm",
        "trl",
        "llamafactory-cli",
    )


def _is_program(token: str, options: list[tuple[str, int, list[str]]], script: bool) -> bool:
    """Whether a word after an option is the program that a launcher starts: `accelerate launch --num_processes 4 "
    "sft.py`"""
    return not script and _names_program(token) and (bool(options[-1][2]) or token.endswith(".py"))


def _is_count(values: list[str]) -> bool:
    return len(values) == 1 and values[0].isdigit() and int(values[0]) > 0


def _given(name: str, line: int, values: list[str]) -> Given:
    code = next((value for value in values if _TO_FILL_IN.search(value)), None)
    read = [_typed(value) for value in values]
    value = True if not read else read[0] if len(read) == 1 else read
    return Given(name.replace("-", "_"), None if code else value, line, code)


def _typed(value: str) -> object:
    try:
        return number(yaml.safe_load(value))
    except yaml.YAMLError:
        return value
