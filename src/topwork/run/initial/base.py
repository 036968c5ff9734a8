"""The base that a new recipe names: that it is there, and its tokenizer, as far as that can be had without weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from topwork.common.errors import ModelError
from topwork.common.hub import ask_hub, is_hub_id
from topwork.common.paths import is_there, plain_path
from topwork.models.config import ModelConfig
from topwork.models.config_files import shape_names, shape_values
from topwork.models.light_tokenizer import LightTokenizer, tokenizer_folder
from topwork.models.source import ALIASES, embedded_file, find_source
from topwork.models.structure import Structure
from topwork.plan.base import structure_named

CONVERTED_BYTES = 1 << 30
"""A .gguf file up to this size is converted at once, as training does, for its tokenizer; a larger one takes long."""
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "*.jinja", "config.json")
Log = Callable[[str], None]


@dataclass(frozen=True)
class NewBase:
    """A base, and what is known of it.

    named      as the recipe has it
    why        a line about it, for the recipe
    tokenizer  None where none is on this machine and the Hub gave none
    """

    named: str
    structure: Structure
    why: str
    tokenizer: LightTokenizer | None


def find_base(model: str, log: Log) -> NewBase:
    """An alias, a folder, a `.gguf` file, a Hub id, or the name of a shipped shape, which stands for its Hub id.

    Raises ModelError for what is none of these, with the nearest names.
    """
    given = plain_path(model)
    is_shape = given in shape_names() and given not in ALIASES and not is_there(Path(given))
    named = str(shape_values(given)["_name_or_path"]) if is_shape else given
    config = ModelConfig(model_name_or_path=named)
    structure = structure_named(config, log)
    _look(config, log)
    tokenizer = _opened(config)
    why = (
        f"{structure.family} of {millions(structure.parameters)} parameters, which reads up to "
        f"{structure.context_length:,} tokens"
    )
    if not structure.fast:
        why += "; its layers run on plain modules, which is slower and takes more memory"
    if named != given:
        why += f". {given} is what Topwork calls its shape"
    return NewBase(named, structure, f"{why}.", tokenizer)


def millions(count: int) -> str:
    """135 M, 8.0 B."""
    return f"{count / 1e9:,.1f} B" if count >= 1e9 else f"{count / 1e6:,.0f} M" if count >= 1e6 else f"{count:,}"


def _look(config: ModelConfig, log: Log) -> None:
    """Local files are looked into, so that what training would refuse is told now; the Hub is asked for a tokenizer
    that is not here. Raises ModelError for files that are no base."""
    named = config.model_name_or_path
    if is_there(Path(named)) and named not in ALIASES:
        if Path(named).suffix.lower() != ".gguf" or Path(named).stat().st_size <= CONVERTED_BYTES:
            find_source(config, log)
    elif named in ALIASES and embedded_file(ALIASES[named]) is not None:
        find_source(config, log)
    elif tokenizer_folder(config) is None:
        _fetch(ALIASES.get(named, named), log)


def _fetch(hub_id: str, log: Log) -> None:
    """A tokenizer's files, without weights. Where the Hub cannot be reached, lengths are estimated."""
    if not is_hub_id(hub_id):
        return
    try:
        if ask_hub(hub_id, None, "model") is not None:
            return
        from huggingface_hub import snapshot_download

        snapshot_download(hub_id, allow_patterns=list(_TOKENIZER_FILES))
    except ModelError as error:
        why = str(error).partition("tried as a Hub id: ")[2] or str(error)
        log(f"the tokenizer of {hub_id} could not be fetched, so lengths are estimated: {why}")
    except Exception as error:  # the client raises whatever its network and cache do
        log(
            f"the tokenizer of {hub_id} could not be fetched, so lengths are estimated: {type(error).__name__}: {error}"
        )


def _opened(config: ModelConfig) -> LightTokenizer | None:
    folder = tokenizer_folder(config)
    try:
        return None if folder is None else LightTokenizer(folder)
    except Exception as error:  # `tokenizers` raises Exception itself
        raise ModelError(
            f"the tokenizer of {config.model_name_or_path!r} in {folder} cannot be read: {error}"
        ) from error
