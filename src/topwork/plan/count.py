"""How many parameters an adapter trains: from a model's config alone, no weights read and no torch imported.

    LoRA on a layer of `in` inputs and `out` outputs:  r * (in + out)

A module of `modules_to_save` counts whole, because it is copied whole. Tied weights count once. The "before" of a model
is `frozen`: its own parameters, which an adapter leaves as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from topwork.adapters.config import AdapterConfig, LoraConfig
from topwork.adapters.sizes import trained_sizes
from topwork.models.structure import Structure

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


def count_adapter(base: Structure, config: AdapterConfig) -> ParameterCount:
    """What `config` would train in a base. Raises AdapterError where the config does not fit it."""
    return counted(trained_sizes(base, config), base.parameters)


def counted(trained: Mapping[str, int], frozen: int) -> ParameterCount:
    """Of parameters by the path of the module where they are trained, and those that are not."""
    trainable = sum(trained.values())
    total = trainable + frozen
    return ParameterCount(trainable, frozen, total, trainable / total, _by_name(trained))


def count_table(
    base: Structure, ranks: Sequence[int] = RANKS, target_sets: Sequence[str] = TARGET_SETS
) -> list[CountRow]:
    """A row for every target set and rank. Sets: q,v / q,k,v,o / mlp / all-linear; a set that the family lacks (q,v
    where one layer holds queries, keys and values) is left out."""
    rows = []
    for name in target_sets:
        targets = targets_of(base, name)
        for r in ranks if targets else ():
            count = count_adapter(base, LoraConfig(r=r, target_modules=targets))
            rows.append(CountRow(name, targets if isinstance(targets, str) else tuple(targets), r, count))
    return rows


def targets_of(base: Structure, target_set: str) -> str | list[str]:
    """`target_modules` of a set in this base, as `self_attn.q_proj`; empty where the family has no such set."""
    if target_set == "all-linear":
        return target_set
    linear = [module.path.split(".") for module in base.by_path.values() if module.kind == "linear"]
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


def _by_name(trained: Mapping[str, int]) -> tuple[ModuleCount, ...]:
    groups: dict[str, list[int]] = {}
    for path, count in trained.items():
        groups.setdefault(path.rpartition(".")[2], []).append(count)
    return tuple(ModuleCount(name, len(counts), sum(counts)) for name, counts in groups.items())


def _role(parts: list[str]) -> str | None:
    inside = "attn" in parts[-2].lower() or "attention" in parts[-2].lower()
    if inside:
        return "attention" if parts[-1] in ATTENTION else None
    return "mlp" if parts[-1] in MLP else None
