"""A file of theirs, read as keys with values and lines, and which tool it is for."""

import os
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from yaml import MappingNode

from topwork.common.errors import RequestError, did_you_mean
from topwork.common.os_errors import why
from topwork.common.paths import missed
from topwork.run.importing.command_lines import Command, commands_in
from topwork.run.importing.python_calls import calls_in, notebook_source
from topwork.run.importing.records import Given, Tool, unnumbered
from topwork.run.importing.scripts import given_in, is_unsloth
from topwork.run.importing.tools.table import TOOLS
from topwork.run.importing.yaml_lines import given_in as given_in_yaml
from topwork.run.importing.yaml_lines import parsed

_MOST = {".ipynb": 64 * 2**20}
_MOST_BYTES = 2 * 2**20
_COMMANDS = {
    "mlx-lm": (("mlx_lm.lora",), ("mlx_lm", "lora")),
    "trl": (("trl", "sft"), ("sft.py",), ("sft_trainer.py",), ("trl", "dpo"), ("trl", "grpo"), ("trl", "kto")),
    "llamafactory": (("llamafactory-cli", "train"), ("src", "train.py"), ("llamafactory", "train"), ("train_bash.py",)),
}
_LIKELY, _LOOKED_AT = 0.8, 100
_OURS = frozenset(("model.model_name_or_path", "training.objective", "adapter.method", "data.train"))


@dataclass
class Read:
    """What a file gives, and on how many devices it runs, where it says."""

    tool: Tool
    given: list[Given]
    recognised: bool
    devices: int | None = None
    remarks: list[str] = field(default_factory=list)


def read(path: Path, named: str | None = None) -> Read:
    """Reads a file as a config of the tool that is named, or that its keys are of. Raises RequestError."""
    if named is not None and named not in TOOLS:
        raise RequestError(f"there is no tool {named!r}; there are {', '.join(TOOLS)}{did_you_mean(named, TOOLS)}")
    text = _text(path)
    suffix = path.suffix.lower()
    if suffix in (".py", ".ipynb"):
        return _script(path, text, named)
    if suffix in (".sh", ".bash", ".txt", ".md"):
        return _commands(path, text, named)
    return _keys(path, text, named)


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise RequestError(f"{path} is a folder; name the file of the training config in it")
        most = _MOST.get(path.suffix.lower(), _MOST_BYTES)
        size = os.stat(path).st_size
        if size > most:
            raise RequestError(f"{path} has {size:,} bytes, which no training config has (at most {most:,} are read)")
        data = path.read_bytes()
    except OSError as error:
        near = missed(path) if isinstance(error, FileNotFoundError) else ""
        raise RequestError(
            f"{path} cannot be read ({why(error)}); give another tool's training config{near}"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no text in UTF-8; give a YAML, JSON, Python or shell file") from error
    if "\0" in text:
        raise RequestError(f"{path} is no text; give a YAML, JSON, Python or shell file")
    if not text.strip():
        raise RequestError(f"{path} is empty; give a training config of another tool")
    return text


# YAML and JSON


def _keys(path: Path, text: str, named: str | None) -> Read:
    root = parsed(text, str(path))
    tool = TOOLS[named] if named else _recognised(path, root)
    return Read(tool, given_in_yaml(root, str(path), tool.has_inside), named is None)


def _recognised(path: Path, root: MappingNode) -> Tool:
    """The tool of which the file has the most own keys. Raises RequestError where there is none, or two."""
    given = {unnumbered(each.key) for each in given_in_yaml(root, str(path), lambda _: True)}
    given |= {_head(key) for key in given}
    scores = {name: len(given & tool.signs) for name, tool in TOOLS.items()}
    best, second = sorted(scores, key=lambda name: -scores[name])[:2]
    if scores[best] > scores[second]:
        return TOOLS[best]
    if given & _OURS:
        raise RequestError(f"{path} is a recipe of Topwork's already; `topwork train {path}` trains it")
    if scores[best]:
        tied = [name for name in scores if scores[name] == scores[best]]
        raise RequestError(f"{path} may be for {' or '.join(tied)}; say which: --from {tied[0]}")
    raise RequestError(_unknown(path, sorted(given)))


def _head(key: str) -> str:
    return key.partition(".")[0].partition("[")[0]


def _unknown(path: Path, given: list[str]) -> str:
    every = {key.theirs: tool.name for tool in TOOLS.values() for key in tool.keys}
    likely = (
        (key, get_close_matches(key, every, n=1, cutoff=_LIKELY)) for key in given[:_LOOKED_AT] if key not in every
    )
    near = [f"{key!r} may be {every[known[0]]}'s {known[0]!r}" for key, known in likely if known][:1]
    told = f"; {near[0]}" if near else f" (it has {', '.join(given[:6])})" if given else ""
    return f"{path} has the keys of no tool that is read here: {', '.join(TOOLS)}{told}; say which it is with --from"


# Scripts and notebooks


def _script(path: Path, text: str, named: str | None) -> Read:
    places: list[tuple[int, int]] = []
    if path.suffix.lower() == ".ipynb":
        text, places = notebook_source(text, str(path))
    calls = calls_in(text, str(path))
    given = given_in(calls)
    tool = TOOLS[named] if named else TOOLS["unsloth" if is_unsloth(calls) else "trl"]
    if not any(each.value not in (None, True) for each in given) and (not given or _has_commands(text)):
        return _documented(path, text, named)
    if places:
        given = [
            replace(each, line=places[each.line - 1][1], cell=places[each.line - 1][0]) for each in given if each.line
        ]
    return Read(tool, given, named is None)


def _has_commands(text: str) -> bool:
    return any(_tool_of(command) for command in commands_in(text))


def _documented(path: Path, text: str, named: str | None) -> Read:
    """A script without a call that is known, whose text may hold a command line."""
    if _has_commands(text):
        return _commands(path, text, named)
    kinds = "FastLanguageModel, SFTConfig, TrainingArguments, LoraConfig or SFTTrainer"
    raise RequestError(f"{path} calls none of {kinds}; give the script or notebook that trains")


# Command lines


def _commands(path: Path, text: str, named: str | None) -> Read:
    known = [(name, command) for command in commands_in(text) if (name := _tool_of(command))]
    found = [(name, command) for name, command in known if named in (None, name)]
    if not found:
        asked = f" of {named}" if named else ""
        raise RequestError(
            f"{path} holds no command{asked} that trains: expected `trl sft …`, `mlx_lm.lora …`, `llamafactory-cli "
            f"train …`"
        )
    trains = [each for each in found if _trains(each[1])]
    found_for, command = max(trains or found, key=lambda each: sum(option.code is None for option in each[1].options))
    tool = TOOLS[found_for]
    given = command.options + _refused(command)
    remarks = [
        f"line {other.line}: another command is not read, as one makes one recipe: that with the most options"
        for _, other in found
        if other is not command
    ]
    given = _with_config(path, tool, command, given, remarks)
    return Read(tool, given, named is None, command.devices, remarks)


def _trains(command: Command) -> bool:
    """Whether it is no test of what was trained, and has an objective that is here."""
    options = {each.key for each in command.options}
    return not _refused(command) and not ({"test"} & options and "train" not in options) and "help" not in options


def _refused(command: Command) -> list[Given]:
    trainers = {"dpo": "DPOTrainer", "grpo": "GRPOTrainer", "kto": "KTOTrainer"}
    return [Given(trainer, True, command.line) for word, trainer in trainers.items() if command.says("trl", word)]


def _tool_of(command: Command) -> str | None:
    return next((tool for tool, words in _COMMANDS.items() if any(command.says(*each) for each in words)), None)


def _with_config(path: Path, tool: Tool, command: Command, given: list[Given], remarks: list[str]) -> list[Given]:
    """The config file that a command names, under what the command gives itself."""
    named = [str(each.value) for each in given if each.key in ("config", "c")]
    named += [word for word in command.words if word.endswith((".yaml", ".yml", ".json"))]
    for name in named[:1]:
        file = next((base / name for base in (path.parent, Path()) if (base / name).is_file()), None)
        if file is None:
            remarks.append(
                f"{name}, which the command reads first, is not there: only the command's own options are read"
            )
            continue
        own = {each.key for each in given}
        root = parsed(_text(file), str(file))
        below = [each for each in given_in_yaml(root, str(file), tool.has_inside) if each.key not in own]
        remarks.append(f"{name} is read first, under the command's own options; its lines are counted for themselves")
        given = [*below, *given]
    return [each for each in given if each.key != "c"]
