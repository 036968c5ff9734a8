"""Where adapters of methods that are only read have their parts, and how large they are. Free of torch."""

from math import prod

from topwork.adapters.config import ReadOnlyConfig
from topwork.adapters.methods.factored_places import widest
from topwork.adapters.methods.readonly.forms import FORMS, Layer
from topwork.adapters.places import Places, Sizes
from topwork.adapters.targets import find_targets


def readonly_sizes(base: Places, config: ReadOnlyConfig) -> Sizes:
    """What was learned at every target, but for what all layers share."""
    form, layers = FORMS[config.peft_type], readonly_layers(base, config)
    return {layer.path: tuple(map(prod, form.learned(config.options, layer).values())) for layer in layers}


def readonly_layers(base: Places, config: ReadOnlyConfig) -> list[Layer]:
    """The linear layers that it goes into."""
    modules = {path: base.by_path[path] for path in find_targets(base, config)}
    return [Layer(path, module.columns, module.rows) for path, module in modules.items()]


def widest_layer(base: Places, layers: list[Layer]) -> Layer:
    """One with the most inputs and the most outputs that any of them has."""
    return Layer("", *widest(base, [layer.path for layer in layers]))
