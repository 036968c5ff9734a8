"""LoRA that was learned on top of another embedding or head than the base's: of a vocabulary that grew, whose new rows
nobody else has. PEFT writes that weight beside the LoRA and sets the base's to it. Here the base stays as it is, so the
two together, W + s B A, are a module that was trained whole.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from topwork.adapters.config import LoraConfig
from topwork.adapters.method import Bare
from topwork.adapters.methods.lora.places import lora_places

BELOW = "base_layer.weight"
"""What PEFT writes of a module's own weight, behind its path."""
_FACTORS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


def can_be_whole(config: Any, tensors: Mapping[str, Tensor], path: str, bare: Bare) -> bool:
    """Whether what the file has at a module is a weight of this base's shape, and plain LoRA of it."""
    module, weight = bare.seen.by_path.get(path), tensors.get(f"{path}.{BELOW}")
    if module is None or module.bias or weight is None or tuple(weight.shape) != (module.rows, module.columns):
        return False
    found = {key[len(path) + 1 :] for key in tensors if key.startswith(f"{path}.")} - {BELOW}
    plain = any(found == {a, b} for a, b in _FACTORS.items())
    return isinstance(config, LoraConfig) and not config.use_dora and plain


def as_whole(
    config: LoraConfig, tensors: Mapping[str, Tensor], paths: Sequence[str], bare: Bare
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Options and tensors in which these modules, each with a weight and LoRA (`can_be_whole`), are saved whole. The
    other end of a tied pair, of which the file has nothing, is that weight without LoRA."""
    targets = {target.path: target for target in lora_places(bare.seen, config)[0]}
    found, whole = dict(tensors), []
    for path in paths:
        a, b = next((a, b) for a, b in _FACTORS.items() if f"{path}.{a}" in found)
        target = targets.get(path)
        if target is None or len(found[f"{path}.{a}"]) != target.r:
            continue  # it is refused as what it is
        whole.append(path)
        weight = found.pop(f"{path}.{BELOW}")
        scale = target.alpha / (math.sqrt(target.r) if config.use_rslora else target.r)
        delta = scale * (found.pop(f"{path}.{b}").float() @ found.pop(f"{path}.{a}").float())
        found[f"{path}.weight"] = weight.float() + (delta if a == "lora_A.weight" else delta.t())
        other = bare.embedding if path == bare.head else bare.head
        alone = bare.seen.tied and path in (bare.head, bare.embedding)
        if alone and other is not None and not any(key.startswith(f"{other}.") for key in tensors):
            found[f"{other}.weight"] = weight
            whole.append(other)
    return config.model_copy(update={"modules_to_save": [*config.saved_modules, *whole]}), found
