"""Adapters of experts that were linear layers of their own, as transformers had them before release 5, by the names and
in the shapes that experts in one tensor have: Mixtral's `block_sparse_moe.experts.3.w1.lora_A.weight`, and Qwen's
`mlp.experts.3.gate_proj.lora_A.weight`.

    A [E r, in]     the experts' under one another; of gate and up, each expert's two under one another, rank 2 r
    B [out, r E]    the experts side by side for each of the r; of gate and up block by block, [B1, 0; 0, B2]
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from topwork.adapters.methods.lora.parameters import FUSED, OLD_NAMES
from topwork.adapters.places import Places
from topwork.common.errors import AdapterError

_KEY = re.compile(r"(?P<parent>.*)\.experts\.(?P<expert>\d+)\.(?P<name>[^.]+)\.lora_(?P<side>[AB])\.weight")
_WRAPPED = re.compile(r"(?P<module>.*?)\.(?:base_layer\.)?lora_A\.weight")
_PARENTS = {".block_sparse_moe": ".mlp"}
"""What the module around the experts was called, and is."""


def with_joined_experts(base: Places, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by our names, its experts' joined where the base holds them in one tensor.

    Raises AdapterError, by name, where one of them is missing, or one of gate and up.
    """
    old = OLD_NAMES.get(base.family)
    if old is None:
        return _turned(base, tensors)
    found = _by_module(base, tensors, old)
    joined = {key: tensor for key, tensor in tensors.items() if _place(base, key, old) is None}
    for module, layers in found.items():
        joined |= _joined(base, module, layers, old)
    return _turned(base, {_renamed(base, key): tensor for key, tensor in joined.items()})


def _turned(base: Places, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT before it looked which way round experts lie (0.18: vLLM #52194) wrote A [E r, out] and B [in, r E] of
    experts that are held as [E, out, in]: of W' what it writes now of W. Told by their shapes; where they fit both ways
    they are taken as they are written now."""
    found = dict(tensors)
    for key, a in tensors.items():
        match = _WRAPPED.fullmatch(key)
        other = key.replace(".lora_A.", ".lora_B.")
        module = base.by_path.get(match["module"]) if match else None
        if module is None or other not in tensors or a.dim() != 2 or tensors[other].dim() != 2:
            continue
        b, sides = tensors[other], {(m.inputs, m.outputs): m.experts for m in module.matrices if m.experts > 1}
        now, before = (a.shape[1], b.shape[0]), (b.shape[0], a.shape[1])
        experts = sides.get(before)
        if now in sides or experts is None or len(a) % experts or len(a) != b.shape[1]:
            continue
        r = len(a) // experts
        found[key] = b.t().reshape(r, experts, -1).transpose(0, 1).flatten(0, 1).contiguous()
        found[other] = a.reshape(experts, r, -1).permute(2, 1, 0).flatten(1).contiguous()
    return found


Layers = dict[str, dict[int, dict[str, Tensor]]]
"""By old name, expert and side (A or B)."""


def _by_module(base: Places, tensors: Mapping[str, Tensor], old: Mapping[str, str]) -> dict[str, Layers]:
    found: dict[str, Layers] = {}
    for key, tensor in tensors.items():
        place = _place(base, key, old)
        if place is not None:
            module, name, expert, side = place
            found.setdefault(module, {}).setdefault(name, {}).setdefault(expert, {})[side] = tensor
    return found


def _place(base: Places, key: str, old: Mapping[str, str]) -> tuple[str, str, int, str] | None:
    """(the experts' module, old name, number, side); None of any other tensor."""
    match = _KEY.fullmatch(key)
    if match is None or match["name"] not in old:
        return None
    module = f"{_current(match['parent'])}.experts"
    return (module, match["name"], int(match["expert"]), match["side"]) if module in base.by_path else None


def _current(parent: str) -> str:
    before = next((before for before in _PARENTS if parent.endswith(before)), None)
    return parent if before is None else parent.removesuffix(before) + _PARENTS[before]


def _renamed(base: Places, key: str) -> str:
    """A router's tensor beside them."""
    for before, after in _PARENTS.items():
        parent, found, rest = key.partition(f"{before}.")
        if found and f"{parent}{after}" in base.by_path:
            return f"{parent}{after}.{rest}"
    return key


def _joined(base: Places, module: str, layers: Layers, old: Mapping[str, str]) -> dict[str, Tensor]:
    """By the names that PEFT gives a wrapped module: of two parameters the first one's lies deeper."""
    matrices = base.by_path[module].matrices
    there = [matrix for matrix in matrices if any(old[name] == matrix.name for name in layers)]
    joined = {}
    for depth, matrix in enumerate(reversed(there)):
        names = [name for name, new in old.items() if new == matrix.name]
        lacking = [name for name in names if name not in layers]
        if lacking:
            raise AdapterError(
                f"{module} is adapted at {', '.join(sorted(set(names) - set(lacking)))} and not at "
                f"{', '.join(lacking)}, and this base holds these in one parameter ({FUSED}); PEFT refuses it too"
            )
        a, b = (_stack(module, layers, names, side, matrix.experts) for side in "AB")
        key = f"{module}.{'base_layer.' * depth}"
        joined[f"{key}lora_A.weight"] = torch.cat(a, 1).flatten(0, 1)
        joined[f"{key}lora_B.weight"] = _blocks(b).permute(1, 2, 0).flatten(1)
    return joined


def _stack(module: str, layers: Layers, names: Sequence[str], side: str, experts: int) -> list[Tensor]:
    """For each name all experts' tensors [E, …]."""
    stacks = []
    for name in names:
        missing = [e for e in range(experts) if side not in layers[name].get(e, {})]
        if missing:
            raise AdapterError(
                f"{module} has {experts} experts, and the file's lora_{side} of {name} lacks those of "
                f"{', '.join(map(str, missing[:8]))}; an adapter of some experts alone cannot be read"
            )
        shapes = {tuple(layers[name][e][side].shape) for e in range(experts)}
        if len(shapes) > 1:
            raise AdapterError(
                f"{module}: the file's lora_{side} of {name} has the shapes {sorted(shapes)}; experts of unlike ranks "
                "do not fit into one tensor"
            )
        stacks.append(torch.stack([layers[name][e][side] for e in range(experts)]))
    return stacks


def _blocks(stacks: Sequence[Tensor]) -> Tensor:
    """[E, out, r] of each -> [E, sum out, sum r], block by block."""
    outputs, ranks = (sum(stack.shape[axis] for stack in stacks) for axis in (1, 2))
    whole = stacks[0].new_zeros(len(stacks[0]), outputs, ranks)
    row = column = 0
    for stack in stacks:
        whole[:, row : row + stack.shape[1], column : column + stack.shape[2]] = stack
        row, column = row + stack.shape[1], column + stack.shape[2]
    return whole
