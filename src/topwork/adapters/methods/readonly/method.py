"""PEFT's other methods, each read as it is: run, merged and served beside all others, and written as it was read.

No recipe begins one. What a file holds is in `forms.py`; what it does in `updates.py` (a matrix is added to the weight,
as two factors) and `turns.py` (what a layer is given or gives is turned).
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.adapters.base_weight import dense_weight
from topwork.adapters.config import ReadOnlyConfig
from topwork.adapters.files import Files, Grafted, has_conv1d, names_of, peft_keys, sorted_or_none
from topwork.adapters.method import Bare, Method, Plan, Planned
from topwork.adapters.methods.readonly.forms import FORMS, Layer
from topwork.adapters.methods.readonly.places import readonly_layers, readonly_sizes, widest_layer
from topwork.adapters.methods.readonly.turns import TURNS
from topwork.adapters.methods.readonly.updates import UPDATES, At, Pair
from topwork.adapters.methods.shared_tensors import gathered, spread
from topwork.adapters.module import AdapterModule, FusedTerms
from topwork.adapters.peft_options_other import readonly_options
from topwork.ops.bundles import LowRank

BESIDE = {name: beside for form in FORMS.values() for name, beside in form.beside.items()}
"""Tensors that layers share, and the tensor beside which each layer needs them."""
WHOLE_NUMBERS = ("shira_indices",)


class ReadOnlyPart(AdapterModule):
    """One method's tensors at one linear layer; `shared` are those of all layers."""

    def __init__(self, config: ReadOnlyConfig, layer: Layer, shared: dict[str, Tensor]) -> None:
        super().__init__()
        form, self.kind, self.options = FORMS[config.peft_type], config.peft_type, config.options
        self.layer, self.shared = layer, shared
        self.merges = ("weight", "bias") if self.kind == "ROAD" else ("weight",)
        learned, fixed = form.learned(config.options, layer), form.fixed(config.options, layer)
        self.names = {name.replace(".", "_"): name for name in learned}  # a module's attributes have no dots
        self.fixed = tuple(fixed)
        for attribute, name in self.names.items():
            self.register_parameter(attribute, nn.Parameter(torch.zeros(learned[name])))
        for name, shape in fixed.items():
            dtype = torch.int32 if name in WHOLE_NUMBERS else torch.float32
            self.register_buffer(name, torch.zeros(shape, dtype=dtype), persistent=False)

    def at(self, weight: Callable[[], Tensor]) -> At:
        """The tensors as the formulas take them."""
        device = next(self.parameters()).device
        everywhere = {name: tensor.to(device) for name, tensor in self.shared.items()}
        return At(self.layer, {**self.tensors(), **self._fixed(), **everywhere}, self.options, weight)

    def pair(self, weight: Callable[[], Tensor]) -> Pair:
        """A and B of what it adds to the weight."""
        a, b = UPDATES[self.kind](self.at(weight))
        return a.contiguous(), b.contiguous()

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
        if self.kind in TURNS:
            return TURNS[self.kind].forward(self.at(lambda: dense_weight(base_layer)), y, x, base_layer)
        a, b = self.pair(lambda: dense_weight(base_layer))
        return torch.addmm(y, F.linear(x, a.to(x.dtype)), b.to(x.dtype).t())

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> FusedTerms | None:
        if self.kind in TURNS:
            return None
        return FusedTerms((LowRank(start, stop, *self.pair(lambda: dense_weight(base_layer)), 1.0),))

    @torch.no_grad()
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.kind in TURNS:
            return TURNS[self.kind].merged(self.at(lambda: weight), weight, bias)
        a, b = self.pair(lambda: weight)
        return weight + (b @ a).to(weight.device), bias

    def tensors(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(attribute) for attribute, name in self.names.items()}

    def held(self) -> Iterator[Tensor]:
        yield from super().held()
        yield from self.shared.values()

    def state(self) -> dict[str, Tensor]:
        return super().state() | self._fixed() | self.shared

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        for name, tensor in (self._fixed() | self.shared).items():
            tensor.copy_(state[name])

    def _fixed(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self.fixed}


def readonly_plan(bare: Bare, config: ReadOnlyConfig) -> Plan:
    """What the file has at every target."""
    layers, sizes = readonly_layers(bare.seen, config), readonly_sizes(bare.seen, config)
    shapes = FORMS[config.peft_type].shared(config.options, widest_layer(bare.seen, layers))
    shared = cache(lambda: {name: torch.zeros(shape, device="cpu") for name, shape in shapes.items()})

    def at(layer: Layer) -> Planned:
        return Planned(lambda: ReadOnlyPart(config, layer, shared()), sum(sizes[layer.path]))

    return {layer.path: at(layer) for layer in layers}


def _keys(adapter: Grafted[ReadOnlyConfig]) -> dict[str, Any]:
    config, paths = adapter.config, [path for path, part in adapter.parts.items() if isinstance(part, ReadOnlyPart)]
    return {
        **peft_keys(config.peft_type),
        **config.options,
        **({"fan_in_fan_out": True} if has_conv1d(adapter.modules, paths) else {}),
        "target_modules": names_of(paths, adapter.modules),
        "modules_to_save": sorted_or_none(config.modules_to_save),
    }


READONLY = Method(
    ReadOnlyConfig,
    readonly_plan,
    Files(None, _keys, readonly_options, gathered(BESIDE), spread(BESIDE), also=tuple(FORMS)),
)
