"""How many parameters an adapter trains: from a model's config alone, no weights read.

    LoRA on a layer of `in` inputs and `out` outputs:  r * (in + out)

A module of `modules_to_save` counts whole, because it is copied whole. Tied weights count once. The "before" of a model
is `frozen`: its own parameters, which an adapter leaves as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from topwork.adapters.config import AdapterConfig, LoraConfig
from topwork.adapters.graft import adapted_layers, bare_modules, plan_adapter
from topwork.adapters.module_copy import parameters_of
from topwork.adapters.targets import LINEAR
from topwork.common.errors import ModelError
from topwork.common.os_errors import why
from topwork.models.config import ModelConfig
from topwork.models.config_files import find_config
from topwork.models.skeleton import skeleton

RANKS = (4, 8, 16, 32, 64, 128)
TARGET_SETS = ("q,v", "q,k,v,o", "all-linear")

QUERY_VALUE = {"q_proj", "v_proj"}
ATTENTION = {
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "c_attn", "c_proj", "query_key_value", "Wqkv",
    "dense",
}  # fmt: skip
MLP = {
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "c_proj", "dense_h_to_4h",
    "dense_4h_to_h", "fc_in", "fc_out", "w1", "w2", "w3",
}  # fmt: skip
"""What families call their projections. Some names stand in both sets; whether `attn` holds the layer tells."""


@dataclass(frozen=True)
class ModuleCount:
    """The layers of one name (`q_proj`): how many there are, and what is trained in all of them."""

    name: str
    modules: int
    trainable: int


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model with one adapter; `share` is trainable / total."""

    trainable: int
    frozen: int
    total: int
    share: float
    by_module: tuple[ModuleCount, ...]


@dataclass(frozen=True)
class CountRow:
    """One line of the table: a target set, the modules that it means in this family, a rank, and the count."""

    target_set: str
    target_modules: str | tuple[str, ...]
    r: int
    count: ParameterCount


def count_adapter(model: PreTrainedModel, config: AdapterConfig) -> ParameterCount:
    """What `config` would train in `model`, which may be a skeleton without weights or hold other adapters already.

    Raises AdapterError where the config does not fit the model.
    """
    trained = {path: planned.trained for path, planned in plan_adapter(model, config).items()}
    trainable, frozen = sum(trained.values()), _own_parameters(model)
    total = trainable + frozen
    return ParameterCount(trainable, frozen, total, trainable / total, _by_name(trained))


def count_table(
    model: PreTrainedModel, ranks: Sequence[int] = RANKS, target_sets: Sequence[str] = TARGET_SETS
) -> list[CountRow]:
    """A row for every target set and rank. Sets: q,v / q,k,v,o / mlp / all-linear; a set that the family lacks (q,v
    where one layer holds queries, keys and values) is left out."""
    rows = []
    for name in target_sets:
        targets = _targets_of(model, name)
        for r in ranks if targets else ():
            count = count_adapter(model, LoraConfig(r=r, target_modules=targets))
            rows.append(CountRow(name, targets if isinstance(targets, str) else tuple(targets), r, count))
    return rows


def base_skeleton(model: ModelConfig) -> PreTrainedModel:
    """`skeleton` of the base that a recipe names. Raises ModelError."""
    known = config_of(model.model_name_or_path, model.revision, model.trust_remote_code)
    return skeleton(known, model.trust_remote_code)


def config_of(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """transformers' config of a model by any of its names (`models/config_files.py`). Raises ModelError."""
    found = find_config(name, revision)
    if found.shipped:
        given = found.values()
        return AutoConfig.for_model(given.pop("model_type"), **given)
    try:
        if found.hub_id is not None:  # by its name, under which the code lies that it may come with
            return AutoConfig.from_pretrained(found.hub_id, revision=revision, trust_remote_code=trust_remote_code)
        path = Path(str(found.file))
        if found.is_gguf:
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{found.name} does not hold a model config that transformers knows: {why(error)}") from error


def _own_parameters(model: PreTrainedModel) -> int:
    """The base's parameters, tied ones once (`parameters()` gives each tensor once)."""
    grafted = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}
    return sum(count for key, count in parameters_of(model).items() if key not in grafted)


def _by_name(trained: dict[str, int]) -> tuple[ModuleCount, ...]:
    groups: dict[str, list[int]] = {}
    for path, count in trained.items():
        groups.setdefault(path.rpartition(".")[2], []).append(count)
    return tuple(ModuleCount(name, len(counts), sum(counts)) for name, counts in groups.items())


def _targets_of(model: PreTrainedModel, target_set: str) -> str | list[str]:
    """`target_modules` of a set in this model, as `self_attn.q_proj`; empty where the family has no such set."""
    if target_set == "all-linear":
        return target_set
    modules = bare_modules(model)
    linear = [path.split(".") for path, module in modules.items() if isinstance(module, LINEAR)]
    roles = {".".join(parts[-2:]): _role(parts) for parts in linear if len(parts) > 1}
    attention = sorted(name for name, role in roles.items() if role == "attention")
    query_value = [name for name in attention if name.rpartition(".")[2] in QUERY_VALUE]
    sets = {
        "q,v": query_value if {name.rpartition(".")[2] for name in query_value} == QUERY_VALUE else [],
        "q,k,v,o": attention,
        "mlp": sorted(name for name, role in roles.items() if role == "mlp"),
    }
    if target_set not in sets:
        raise ValueError(f"unknown target set {target_set!r}; there are {', '.join([*sets, 'all-linear'])}")
    return sets[target_set]


def _role(parts: list[str]) -> str | None:
    inside = "attn" in parts[-2].lower() or "attention" in parts[-2].lower()
    if inside:
        return "attention" if parts[-1] in ATTENTION else None
    return "mlp" if parts[-1] in MLP else None
