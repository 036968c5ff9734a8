"""How many values an adapter trains at which modules of a base, of which a config alone need be here. Free of torch.

The same functions choose and count when a base is in memory (`Bare.seen`), so the two cannot differ.
"""

from collections.abc import Callable, Mapping
from typing import Any

from topwork.adapters.config import AdapterConfig
from topwork.adapters.methods.factored_places import loha_sizes, lokr_sizes, oft_sizes, vera_sizes
from topwork.adapters.methods.lora.places import lora_sizes
from topwork.adapters.methods.places import bitfit_sizes, full_sizes, ia3_sizes, prefix_sizes, prompt_sizes
from topwork.adapters.methods.readonly.places import readonly_sizes
from topwork.adapters.places import Places, Sizes, inside
from topwork.adapters.settling import begun
from topwork.adapters.targets import find_saved, refuse_overlap
from topwork.common.errors import AdapterError

SIZES: Mapping[str, Callable[[Places, Any], Sizes]] = {
    "lora": lora_sizes, "ia3": ia3_sizes, "prefix": prefix_sizes, "prompt": prompt_sizes, "bitfit": bitfit_sizes,
    "full": full_sizes, "vera": vera_sizes, "loha": loha_sizes, "lokr": lokr_sizes, "oft": oft_sizes,
    "readonly": readonly_sizes,
}  # fmt: skip
"""By method."""


def trained_sizes(base: Places, config: AdapterConfig) -> dict[str, int]:
    """Path of each module that gets a part -> how many values are trained there.

    Raises AdapterError where the config does not fit the base.
    """
    return {path: sum(sizes) for path, sizes in tensor_sizes(base, config).items()}


def tensor_sizes(base: Places, config: AdapterConfig) -> Sizes:
    """The same tensor by tensor, as an optimizer holds them."""
    if config.method not in SIZES:
        raise AdapterError(f"how much method {config.method} trains is not known here; {', '.join(SIZES)} are")
    config = begun(base, config)
    sizes = SIZES[config.method](base, config)
    saved = find_saved(base, config.saved_modules)
    refuse_overlap(list(sizes), saved)
    return sizes | {path: inside(base, path) for path in saved}
