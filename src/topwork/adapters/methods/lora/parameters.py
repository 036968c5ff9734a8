"""Raw parameters that LoRA goes into, `target_parameters`: experts' matrices, a router's weight. Chosen as PEFT chooses
them. Free of torch.

Where a family's experts were modules of their own before transformers 5, PEFT (0.21,
utils/transformers_weight_conversion.py) takes their old names among `target_modules`, and `all-linear`, for the tensors
that hold them now. Gate and up, which became one matrix, then have twice the rank and twice the alpha, so that a LoRA
of each fits in.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from topwork.adapters.config import LoraConfig
from topwork.adapters.places import Module, Places
from topwork.adapters.targets import matching, near_names
from topwork.common.errors import AdapterError
from topwork.common.kinds import Matrix

_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
OLD_NAMES: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(
        (
            "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe",
            "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "longcat_flash", "solar_open", "mellum", "qwen3_moe", "beam",
            "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "qwen3_next", "hunyuan_v1_moe",
            "flex_olmo", "olmoe", "exaone_moe", "cohere2_moe",
        ),
        _QWEN,
    ),
}  # fmt: skip
"""model_type -> what its experts and its router were called -> the parameter that holds them now. (PEFT has no entry
for qwen2_moe itself: there `all-linear` means the modules alone.)"""
FUSED = "gate_up_proj"


@dataclass(frozen=True)
class ParameterTarget:
    """One parameter that gets A [experts r, inputs] and B [outputs, r experts]; `module` is the path of its module."""

    module: str
    matrix: Matrix
    r: int
    alpha: float

    @property
    def sizes(self) -> tuple[int, int]:
        """Of A and B."""
        held = self.r * self.matrix.experts
        return held * self.matrix.inputs, held * self.matrix.outputs


def parameter_targets(base: Places, config: LoraConfig) -> list[tuple[str, Matrix]]:
    """(module's path, parameter) of all that `target_parameters` names by whole paths or endings, in the model's order;
    linear layers' weights too, which are LoRA as ever.

    Raises AdapterError for a name that matches none, and for what LoRA is no plain product at.
    """
    names, there = config.target_parameters or (), parameter_paths(base)
    for name in names:
        if not matching(there, [name]):
            near = near_names(name, [key for key in there if base.by_path[there[key][0]].kind == "other"] or there)
            raise AdapterError(
                f"target_parameters names {name!r}, which matches no parameter that LoRA can go into{near}; those are "
                f"weights of linear layers, and here {_told(base) or 'nothing else'}"
            )
    found = [there[key] for key in matching(there, list(names))]
    other = [f"{path}.{matrix.name}" for path, matrix in found if base.by_path[path].kind == "other"]
    if other:
        _refuse_more_than_lora(other[0], base, config)
    return found


def refuse_parameters_as_modules(base: Places, config: LoraConfig) -> None:
    """Raises AdapterError where `target_modules` names what is a parameter of experts."""
    names = config.target_modules if isinstance(config.target_modules, list) else []
    there = [key for key, (path, _) in parameter_paths(base).items() if base.by_path[path].kind == "other"]
    for name in names:
        found = matching(there, [name])
        if found and not matching(base.by_path, [name]):
            raise AdapterError(
                f"target_modules names {name!r}, which is a parameter here ({found[0]}) and no module; name it in "
                "target_parameters"
            )


def parameter_paths(base: Places) -> dict[str, tuple[str, Matrix]]:
    """The path of each parameter that LoRA can go into -> its module's, and what it is."""
    held = [(path, matrix) for path, module in base.by_path.items() for matrix in matrices_at(module)]
    return {f"{path}.{matrix.name}": (path, matrix) for path, matrix in held}


def matrices_at(module: Module) -> tuple[Matrix, ...]:
    """Of experts, of a router, of a linear layer."""
    if module.kind == "linear":
        return (Matrix("weight", 1, module.columns, module.rows),)
    return module.matrices


def with_parameters(base: Places, config: LoraConfig) -> LoraConfig:
    """A config in which experts and routers are named by parameters, and by no module's name. Raises AdapterError where
    one of two that are held together is named without the other."""
    old = OLD_NAMES.get(base.family, {})
    kept, named = _apart(base, config.target_modules, old)
    if not named:
        return config
    together = sorted(name for name, new in old.items() if new == FUSED)
    lacking = sorted(set(together) - named) if named & set(together) else []
    if lacking:
        raise AdapterError(
            f"target_modules names {', '.join(sorted(named & set(together)))}, which {base.family} holds in one "
            f"parameter with {', '.join(lacking)} ({FUSED}); name both, or {FUSED} in target_parameters"
        )
    new = {old[name] for name in named}
    update: dict[str, object] = {
        "target_modules": kept, "target_parameters": sorted(new | set(config.target_parameters or ())),
    }  # fmt: skip
    if FUSED in new:
        key = rf".*\.{re.escape(FUSED)}"
        update["rank_pattern"] = {**config.rank_pattern, key: len(together) * config.r}
        update["alpha_pattern"] = {**config.alpha_pattern, key: len(together) * config.lora_alpha}
    return config.model_copy(update=update)


def told_of_experts(base: Places, config: LoraConfig) -> list[str]:
    """What is to be said of a base with experts before training: which of their parameters are adapted, and which are
    not; nothing of other bases."""
    held = [(path, matrix) for path, module in base.by_path.items() for matrix in module.matrices]
    if not any(matrix.experts > 1 for _, matrix in held):
        return []
    inside = parameter_targets(base, with_parameters(base, config))
    found = [(path, matrix) for path, matrix in inside if base.by_path[path].kind == "other"]
    lines = []
    if found:
        dropout = ", which train without lora_dropout" if config.lora_dropout else ""
        lines.append(f"LoRA goes into parameters of experts and routers too: {_endings(found)}{dropout}")
    idle = _endings([one for one in held if one not in found and one[1].experts > 1])
    if idle:
        lines.append(f"experts stay as they are: {idle}; adapter.target_parameters names what of them is to be trained")
    return lines


def _apart(base: Places, targets: str | list[str], old: Mapping[str, str]) -> tuple[list[str], set[str]]:
    """What `target_modules` names of modules, and the old names among them."""
    if not old:
        return [], set()
    if isinstance(targets, list):
        found = {name: name.rpartition(".")[2] for name in targets}
        return [name for name in targets if found[name] not in old], {name for name in found.values() if name in old}
    if targets == "all-linear":
        linear = {path for path, module in base.by_path.items() if module.kind == "linear" and path != base.head}
        return sorted({path.rpartition(".")[2] for path in linear} - old.keys()), set(old)
    chosen = matching(base.by_path, targets)
    named = {path.rpartition(".")[2] for path in chosen} & old.keys()
    held = [path for path, module in base.by_path.items() if any(m.experts > 1 for m in module.matrices)]
    named |= {name for name in old if matching([f"{path}.{name}" for path in held], targets)}
    return [path for path in chosen if path.rpartition(".")[2] not in old], named


def _refuse_more_than_lora(path: str, base: Places, config: LoraConfig) -> None:
    """Raises AdapterError: the parameter is multiplied inside of its module, and PEFT has LoRA there in its plain form
    alone."""
    init = config.init_lora_weights
    begun = init in ("pissa", "olora", "loftq")
    if not (config.use_dora or begun):
        return
    linear = sorted({p.rpartition(".")[2] for p, m in base.by_path.items() if m.kind == "linear" and p != base.head})
    names = [name for name in linear if name not in OLD_NAMES.get(base.family, {})]
    raise AdapterError(
        f"{'use_dora' if config.use_dora else f'init_lora_weights: {init}'} goes into linear layers, and {path} is a "
        f"parameter of experts or their router, which takes plain LoRA (in PEFT too; all-linear means it in some "
        f"families); name layers instead: target_modules: [{', '.join(names)}]"
    )


def _told(base: Places) -> str:
    """The endings of what is no linear layer's."""
    return _endings([(path, matrix) for path, module in base.by_path.items() for matrix in module.matrices])


def _endings(held: Sequence[tuple[str, Matrix]]) -> str:
    return ", ".join(sorted({".".join([*path.split(".")[-2:], matrix.name]) for path, matrix in held}))


def ending_names(wanted: Sequence[str], others: Iterable[str]) -> list[str]:
    """The fewest endings that choose exactly the paths `wanted` among these and `others`; the paths where none do."""
    everything = [*wanted, *others]
    for count in (1, 2, 3):
        names = sorted({".".join(path.split(".")[-count:]) for path in wanted})
        if len(matching(everything, names)) == len(wanted):
            return names
    return sorted(wanted)
