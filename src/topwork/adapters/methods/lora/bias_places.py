"""Which biases are trained beside LoRA (`bias`, `lora_bias`), as PEFT chooses them. Free of torch."""

from collections.abc import Container

from topwork.adapters.config import LoraConfig
from topwork.adapters.places import Module, Places
from topwork.common.errors import AdapterError

OF_BASE, AFTER_B = "base_layer.bias", "lora_B.bias"
"""PEFT's names behind a target's path: of the base's own bias, and of the one that B has."""


def biases_at(module: Module, config: LoraConfig) -> tuple[str, ...]:
    """The names of those of a target, each of as many values as it has outputs. Raises AdapterError for an embedding,
    whose rows are looked up: B has no bias there."""
    if config.lora_bias and module.kind == "embedding":
        raise AdapterError(
            "lora_bias is for linear layers, and target_modules names an embedding; leave that out, or lora_bias"
        )
    own = (OF_BASE,) if config.bias != "none" and module.bias else ()
    return (*own, AFTER_B) if config.lora_bias else own


def other_biases(base: Places, config: LoraConfig, taken: Container[str]) -> list[str]:
    """Paths of all other modules whose bias is trained (`bias: all`): linear layers and norms that are not `taken`, nor
    saved whole, nor in what is."""
    if config.bias != "all":
        return []
    endings = tuple(config.saved_modules)
    saved = [path for path in base.by_path if endings and path.endswith(endings)]

    def is_saved(path: str) -> bool:
        return any(path == whole or path.startswith(f"{whole}.") for whole in saved)

    return [path for path, module in base.by_path.items() if module.bias and path not in taken and not is_saved(path)]
