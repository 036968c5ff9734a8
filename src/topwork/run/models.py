"""`topwork models`: bases that are known by name, what they take, and which are on this machine. Free of torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from topwork.adapters.config import LoraConfig
from topwork.adapters.sizes import trained_sizes
from topwork.common.errors import ModelError
from topwork.common.hub import is_hub_id
from topwork.common.os_errors import explained
from topwork.models.config import ModelConfig
from topwork.models.config_files import ConfigFile, find_config, shape_names, shape_values
from topwork.models.light_tokenizer import LightTokenizer, tokenizer_folder
from topwork.models.proven import PROVEN
from topwork.models.source import ALIASES, embedded_file
from topwork.models.structure import Structure
from topwork.models.structures.build import structure_from
from topwork.plan.base import structure_named
from topwork.quantization.config import QuantizationConfig
from topwork.run.planning.place import gigabytes
from topwork.training.memory_held import base_bytes
from topwork.training.memory_setup import Setup

Here = Literal["package", "cache", "file", ""]
_TOLD: dict[Here, str] = {
    "package": "here, in a Python package",
    "cache": "here, in the Hub's cache",
    "file": "here",
    "": "fetched from the Hub",
}


@dataclass(frozen=True)
class ModelRow:
    """A base in the list.

    name        as a recipe may call it, or `topwork init` and `plan` (a shipped shape's)
    hub_id      where its weights are
    alias       whether a recipe takes the name itself
    bf16_bytes  of its weights; nf4_bytes with the linear layers but the head in NF4, with double quantization
    fast        whether its layers run by hand-written backward passes; False: on plain modules
    proven      whether a test compares its family with transformers; False: probed as it is loaded
    here        where its weights are on this machine: in a Python `package`, in the Hub's `cache`, a `file`; or nowhere
    """

    name: str
    hub_id: str
    alias: bool
    family: str
    parameters: int
    context_length: int
    bf16_bytes: int
    nf4_bytes: int
    fast: bool
    proven: bool
    here: Here

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return asdict(self)


@dataclass(frozen=True)
class ModelDetails:
    """A base alone.

    lora_parameters  what LoRA of rank 16 on all linear layers trains
    chat_template    whether its tokenizer has one; None where the tokenizer is not on this machine
    """

    row: ModelRow
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    inner: int
    vocabulary: int
    tied_head: bool
    lora_parameters: int
    chat_template: bool | None

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return {**self.row.as_json(), **{key: value for key, value in asdict(self).items() if key != "row"}}

    def as_text(self) -> str:
        """For people."""
        row = self.row
        template = {None: "its tokenizer is not on this machine", True: "yes", False: "none: data.chat_template"}
        lines = {
            "base": row.name if row.name == row.hub_id else f"{row.name} ({row.hub_id})",
            "family": f"{row.family}, {'proven' if row.proven else 'probed as it is loaded'}, "
            f"{'fast layers' if row.fast else 'plain modules'}",
            "parameters": f"{row.parameters:,}",
            "reads": f"{row.context_length:,} tokens",
            "layers": f"{self.layers}, width {self.hidden:,}, {self.heads} heads ({self.key_value_heads} of keys and "
            f"values), MLP {self.inner:,}",
            "vocabulary": f"{self.vocabulary:,}{', head tied to the embedding' if self.tied_head else ''}",
            "weights": f"{gigabytes(row.bf16_bytes)} in bf16, {gigabytes(row.nf4_bytes)} in NF4",
            "LoRA r = 16": f"{self.lora_parameters:,} trained",
            "chat template": template[self.chat_template],
            "weights are": _TOLD[row.here],
        }
        wide = max(map(len, lines))
        named = row.name if row.alias or row.name == row.hub_id else row.hub_id
        table = "\n".join(f"{name:{wide}}  {text}" for name, text in lines.items())
        return f"{table}\n\nnext: topwork init {named} DATA\n      topwork plan {named}\n      topwork count {named}"


@explained()
def models() -> list[ModelRow]:
    """The aliases and the shipped shapes, and what else the Hub's cache holds; smaller ones first."""
    shapes = {name: str(shape_values(name)["_name_or_path"]) for name in shape_names()}
    named = {**shapes, **ALIASES}
    cached = {hub_id: hub_id for hub_id in cached_ids() if hub_id not in named.values()}
    rows = [row for name, hub_id in {**named, **cached}.items() if (row := _row_of(name, hub_id)) is not None]
    return sorted(rows, key=lambda row: row.parameters)


@explained()
def model_details(name: str) -> ModelDetails:
    """A base as a recipe or `topwork plan` names it. Raises ModelError with near names."""
    config = ModelConfig(model_name_or_path=name)
    structure = structure_named(config)
    found = find_config(name)
    hub_id = ALIASES.get(name) or (str(shape_values(name)["_name_or_path"]) if name in shape_names() else name)
    row = _row(name, hub_id, structure, _here_of(found, hub_id))
    folder = tokenizer_folder(ModelConfig(model_name_or_path=name if name in ALIASES else hub_id))
    return ModelDetails(
        row, structure.layers, structure.hidden, structure.heads, structure.key_value_heads, structure.inner,
        structure.vocabulary, structure.tied, sum(trained_sizes(structure, LoraConfig(r=16)).values()),
        _has_template(folder),
    )  # fmt: skip


_COLUMNS = ("name", "family", "parameters", "reads", "bf16", "NF4", "layers", "family is", "weights")
_WAYS = "<<>>>><<<"


def _cells(row: ModelRow) -> tuple[str, ...]:
    return (
        row.name, row.family, f"{row.parameters:,}", f"{row.context_length:,}", gigabytes(row.bf16_bytes),
        gigabytes(row.nf4_bytes), "fast" if row.fast else "plain", "proven" if row.proven else "probed",
        _TOLD[row.here],
    )  # fmt: skip


def models_text(rows: Sequence[ModelRow]) -> str:
    """A table for people."""
    table = [_COLUMNS, *map(_cells, rows)]
    wide = [max(len(cells[at]) for cells in table) for at in range(len(_COLUMNS))]
    lines = [
        "  ".join(f"{cell:{way}{wide[at]}}" for at, (cell, way) in enumerate(zip(cells, _WAYS))) for cells in table
    ]
    aliases = ", ".join(ALIASES)
    after = (
        f"A recipe takes {aliases} by name, any Hub id, a folder or a .gguf file; `topwork init`, `plan` and `count` "
        "take all of these names."
    )
    return "\n".join(
        [
            *(line.rstrip() for line in lines),
            "",
            after,
            "One of them: topwork models NAME. Other families: docs/families.md",
        ]
    )


def cached_ids() -> list[str]:
    """Hub ids of which the Hub's cache on this machine has a config and weights."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE)
    if not root.is_dir():
        return []
    names = [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in sorted(root.glob("models--*--*"))]
    return [name for name in names if is_hub_id(name) and _is_cached(name)]


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return isinstance(found, str) and any(Path(found).parent.glob("*.safetensors"))


def _here_of(found: ConfigFile, hub_id: str) -> Here:
    if found.hub_id is None and not found.shipped:
        return "file"
    return _here(hub_id)


def _here(hub_id: str) -> Here:
    if hub_id in ALIASES.values() and embedded_file(hub_id) is not None:
        return "package"
    return "cache" if _is_cached(hub_id) else ""


def _row_of(name: str, hub_id: str) -> ModelRow | None:
    """None of a cached model that a config alone does not tell of."""
    try:
        structure = structure_from(find_config(name).values())
    except ModelError:
        return None
    return None if structure is None else _row(name, hub_id, structure, _here(hub_id))


def _row(name: str, hub_id: str, structure: Structure, here: Here) -> ModelRow:
    plain = Setup(structure, "bfloat16", QuantizationConfig(), ())
    packed = Setup(structure, "bfloat16", QuantizationConfig(load_in_4bit=True), ())
    return ModelRow(
        name, hub_id, name in ALIASES, structure.family, structure.parameters, structure.context_length,
        sum(base_bytes(plain)), sum(base_bytes(packed)), structure.fast, structure.family in PROVEN, here,
    )  # fmt: skip


def _has_template(folder: Path | None) -> bool | None:
    if folder is None:
        return None
    try:
        return LightTokenizer(folder).chat_template is not None
    except Exception:  # `tokenizers` raises Exception itself
        return None
