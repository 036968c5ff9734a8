"""A recipe: everything a run is, in one strict and typed YAML file. Free of torch, so that it reads in a blink."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from topwork.adapters.config import CONFIGS, AnyAdapterConfig, LoraConfig
from topwork.common.errors import RecipeError, did_you_mean
from topwork.common.options import Options
from topwork.common.os_errors import why
from topwork.common.paths import missed, plain_path
from topwork.data.config import SOURCE_TAGS, DataConfig
from topwork.evaluation.config import EvaluationConfig
from topwork.models.config import ModelConfig
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.beginning import with_beginning
from topwork.recipe.pasted import setting, unfolded
from topwork.recipe.places import named_here, named_in_file
from topwork.training.config import TrainingConfig

PEERS_NAMES = {
    "lora_r": "adapter.r", "lora_rank": "adapter.r", "rank": "adapter.r", "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules", "base_model": "model.model_name_or_path",
    "model_name": "model.model_name_or_path", "cutoff_len": "data.max_length", "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length", "num_epochs": "training.num_train_epochs", "epochs": "training.num_train_epochs",
    "micro_batch_size": "training.batch_size (or training.tokens_per_pass)", "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type", "train_on_inputs": "data.train_on", "dataset": "data.train",
    "packing": "nothing: a batch never has padding here", "output": "output_dir", "out_dir": "output_dir",
    "gradient_checkpointing": "training.activation_checkpointing",
    "resume_from_checkpoint": "the command line's --resume",
    "bnb_4bit_compute_dtype": "model.dtype", "bnb_4bit_quant_storage": "nothing: codes are always held as uint8",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant", "quantization_bit": "quantization.load_in_4bit",
    "double_quantization": "quantization.bnb_4bit_use_double_quant", "quant_type": "quantization.bnb_4bit_quant_type",
}  # fmt: skip
"""Where other tools' names live here; told to whoever uses one."""
BATCH_PARTS = ("per_device_train_batch_size", "gradient_accumulation_steps")
SEVERAL = ("sweep", "jobs")
"""Sections that describe several runs (`recipe/sweep_config.py`)."""


class Recipe(Options):
    """The sections of a recipe. Only the model and the training data have no default."""

    model: ModelConfig
    """The frozen base."""
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    """The base in fewer bits; left out, it is held in model.dtype."""
    adapter: AnyAdapterConfig = Field(default_factory=LoraConfig)
    """What is trained."""
    data: DataConfig
    """What it is trained on."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """How it is trained."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """How it is measured."""
    output_dir: str = "runs/run"
    """The run's folder, from the current folder on."""

    @field_validator("output_dir")
    @classmethod
    def _from_home(cls, value: str) -> str:
        """A file's ~ is no shell's: without this it would be a folder of that name."""
        return plain_path(value)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        """What needs no base to be told, so that it is told before one is loaded."""
        ratio, adapter = self.training.loraplus_lr_ratio, self.adapter
        if ratio is not None and not adapter.has_b:
            raise ValueError(
                f"training.loraplus_lr_ratio is {ratio}, and an adapter of method {adapter.method} has no B matrices "
                "for it; leave it out, or take method lora"
            )
        if self.training.init_optimizer != "fresh" and adapter.init_from is None:
            raise ValueError(
                f"training.init_optimizer is {self.training.init_optimizer}, which takes along that of "
                "adapter.init_from; name a run there, or leave it out"
            )
        if adapter.needs_quantized and not self.quantization.active:
            raise ValueError(
                "adapter.init_lora_weights: loftq begins as what quantizing lost; set quantization.load_in_4bit: true, "
                "or take another beginning"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `a.b=c` overrides. What the file names is looked for beside it first, what an override
    names in the current folder first (`places.py`).

    Raises RecipeError naming the file, the key, what was expected and the nearest key that exists.
    """
    path = Path(plain_path(str(path)))
    values = read_values(path, overrides)
    several = [name for name in SEVERAL if values.get(name) is not None]
    if several:
        raise RecipeError(f"{path} has {several[0]}:, which describes several runs; use `topwork sweep {path}`")
    return make_recipe(values, str(path), path.parent)


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe's file says, with `a.b=c` overrides, as plain values. Raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = missed(path) if isinstance(error, FileNotFoundError) else ""
        raise RecipeError(f"recipe {path} cannot be read ({why(error)}); give a YAML file{near}") from error
    return overridden(unfolded(parse_yaml(text, str(path)), {*Recipe.model_fields, *SEVERAL}, str(path)), overrides)


def overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values with `a.b=c` overrides put in. Raises RecipeError."""
    for override in overrides:
        _apply(values, override)
    return values


def make_recipe(values: dict[str, Any], source: str = "recipe", folder: Path | None = None) -> Recipe:
    """A Recipe from plain values."""
    empty = {key for key in (*Recipe.model_fields, *SEVERAL) if key in values and values[key] is None}
    values = _translated({key: value for key, value in values.items() if key not in empty})
    if folder is not None:
        values = with_beginning(named_in_file(values, folder), folder)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join([f"{source}:", *(f"  {_explained(entry)}" for entry in error.errors())])) from error


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every option written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """A YAML mapping; a key given twice is an error, not the last one's win."""
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{source} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{source} holds {type(values).__name__}, expected sections such as model:, data:, training:")
    return values


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _apply(values: dict[str, Any], override: str) -> None:
    given = setting(override)
    if given is None:
        raise RecipeError(f"--set {override!r}: expected a.b=value, for example training.learning_rate=1e-4")
    key, text = given
    at: Any = values
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents, 1):
        if at.get(parent) is None:  # absent, or a section left empty
            at[parent] = {}
        elif isinstance(at[parent], str) and "name" in options_at(parents[:depth]):
            at[parent] = {"name": at[parent]}  # a section that may be given by its name alone
        at = at[parent]
        if not isinstance(at, dict):
            raise RecipeError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from error
    at[last] = named_here(key.strip(), value)


def _translated(values: dict[str, Any]) -> dict[str, Any]:
    """`per_device_train_batch_size` and `gradient_accumulation_steps` are the names people know for one number here."""
    training = values.get("training")
    if not isinstance(training, dict):
        return values
    training = dict(training)
    given = {name: training.pop(name) for name in BATCH_PARTS if training.get(name) is not None}
    if not given:
        return values
    if "batch_size" in training:
        raise RecipeError(
            "training.batch_size is the sequences of an optimizer step; give it, or per_device_train_batch_size and "
            "gradient_accumulation_steps, not both"
        )
    for name, count in given.items():
        if type(count) is not int or count < 1:
            raise RecipeError(f"training.{name}: expected a count of at least 1, given {count!r}")
    training["batch_size"] = math.prod(given.values())
    return {**values, "training": training}


def _explained(entry: Any) -> str:
    keys = [str(part) for part in entry["loc"]]
    if keys[:1] == ["adapter"] and keys[1:] and keys[1] in CONFIGS:
        del keys[1]  # no key, but the method by whose options pydantic went
    if keys[:1] == ["data"] and keys[1:2] in (["train"], ["eval"]):
        keys[2:] = [key for key in keys[2:] if key not in SOURCE_TAGS]
    where = ".".join(keys)
    if entry["type"] == "value_error" and isinstance(entry["input"], dict):  # a section, or all of them
        told = str(entry["ctx"]["error"])
        return f"{where}: {told}" if where else told
    if entry["type"] == "extra_forbidden":
        *parents, last = keys
        return f"unknown key {where!r}{key_hint(parents, last)}"
    if entry["type"] == "missing":
        return f"{where!r} is needed and missing"
    given = entry.get("input")
    return f"{where!r}: {entry['msg'].lower()}, given {given!r}"


def key_hint(parents: Sequence[str], key: str) -> str:
    """'; did you mean …?' or where a key belongs that is not known at `parents`."""
    elsewhere = [path for path in all_keys() if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"; it belongs at {elsewhere[0]!r}"
    if key in PEERS_NAMES:
        return f"; here it is {PEERS_NAMES[key]}"
    known = options_at(parents)
    near = did_you_mean(key, known, limit=1)
    if near:
        return near
    near = did_you_mean(key, {path.rpartition(".")[2]: path for path in all_keys()}, limit=1)
    return near or f"; known here: {', '.join(sorted(known))}"


def options_at(path: Sequence[str]) -> dict[str, Any]:
    """The fields of the section at `path`; where it is of one of several kinds, those of all. A number in the path is
    an entry of a list."""
    fields: dict[str, Any] = dict(Recipe.model_fields)
    for name in path:
        if not name.isdigit():
            kinds = _kinds(fields[name].annotation) if name in fields else []
            fields = {key: field for kind in kinds for key, field in kind.model_fields.items()}
    return fields


def _kinds(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _kinds(inner)]


def all_keys() -> list[str]:
    """Every key of a recipe as a dotted path."""
    keys = []
    for name in Recipe.model_fields:
        inner = options_at([name])
        keys += [f"{name}.{key}" for key in inner] if inner else [name]
    return keys
