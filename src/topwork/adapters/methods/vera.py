"""VeRA: LoRA whose A and B are random and shared by all layers; two vectors are learned (Kopiczko et al., arXiv
2310.11454).

    y = W x + diag(b) B diag(d) A x        A [r, in], B [out, r], b [out], d [r]

A layer takes the first columns of A and the first rows of B, which are as wide as the widest. b begins at zero, so a
fresh adapter changes nothing. They are drawn as PEFT draws them, by `projection_prng_key`.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from topwork.adapters.config import VeraConfig
from topwork.adapters.files import Files, Grafted, has_conv1d, names_of, peft_keys, sorted_or_none
from topwork.adapters.method import Bare, Method, Plan, Planned
from topwork.adapters.methods.factored import Factored
from topwork.adapters.methods.factored_places import vera_sizes, widest
from topwork.adapters.methods.shared_tensors import gathered, spread
from topwork.adapters.peft_options_other import vera_options


class Projections:
    """The shared matrices A [r, widest inputs] and B [widest outputs, r], which nobody learns; once on each device."""

    def __init__(self, r: int, inputs: int, outputs: int, key: int) -> None:
        generator = torch.Generator().manual_seed(key)
        self.a = _uniform((r, inputs), generator)
        self.b = _uniform((outputs, r), generator)
        self._elsewhere: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def at(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both there."""
        if device == self.a.device:
            return self.a, self.b
        if device not in self._elsewhere:
            self._elsewhere[device] = self.a.to(device), self.b.to(device)
        return self._elsewhere[device]

    def set(self, a: Tensor, b: Tensor) -> None:
        """Take the values of a file, which another machine may have drawn."""
        self.a.copy_(a)
        self.b.copy_(b)
        self._elsewhere.clear()


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform over a row's values: within sqrt(6 / columns)."""
    bound = math.sqrt(2) / math.sqrt(shape[1]) * math.sqrt(3.0)
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


class Vera(Factored):
    """The two vectors at one linear layer. `stores`: whether its files hold the shared matrices as well."""

    def __init__(
        self, inputs: int, outputs: int, shared: Projections, d_initial: float, dropout: float, stores: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.vera_lambda_b = nn.Parameter(torch.zeros(outputs))
        self.vera_lambda_d = nn.Parameter(torch.full((shared.a.shape[0],), d_initial))
        self.inputs, self.shared, self.dropout, self.stores = inputs, shared, dropout, stores

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.shared.at(self.vera_lambda_b.device)
        first = self.vera_lambda_d[:, None] * a[:, : self.inputs]
        return first, self.vera_lambda_b[:, None] * b[: len(self.vera_lambda_b)]

    def held(self) -> Iterator[Tensor]:
        yield from super().held()
        yield from self.shared.at(self.vera_lambda_b.device)

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({"vera_A": self.shared.a, "vera_B": self.shared.b} if self.stores else {})

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        if self.stores:
            self.shared.set(state["vera_A"], state["vera_B"])


def vera_plan(bare: Bare, config: VeraConfig) -> Plan:
    """Two vectors at every target."""
    sizes = vera_sizes(bare.seen, config)
    inputs, outputs = widest(bare.seen, list(sizes))
    shared = cache(lambda: Projections(config.r, inputs, outputs, config.projection_prng_key))

    def at(path: str) -> Planned:
        module = bare.seen.by_path[path]
        own = module.columns, module.rows
        d_initial, dropout, stores = config.d_initial, config.vera_dropout, config.save_projection
        return Planned(lambda: Vera(*own, shared(), d_initial, dropout, stores), sum(sizes[path]), 1.0)

    return {path: at(path) for path in sizes}


def _keys(adapter: Grafted[VeraConfig]) -> dict[str, Any]:
    config, modules = adapter.config, adapter.modules
    paths = [path for path, part in adapter.parts.items() if isinstance(part, Vera)]
    return {
        **peft_keys("VERA"),
        "r": config.r,
        "target_modules": names_of(paths, modules),
        "projection_prng_key": config.projection_prng_key,
        "save_projection": config.save_projection,
        "vera_dropout": config.vera_dropout,
        "d_initial": config.d_initial,
        "fan_in_fan_out": has_conv1d(modules, paths),
        "bias": "none",
        "modules_to_save": sorted_or_none(config.modules_to_save),
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


SHARED = {"vera_A": "vera_lambda_b", "vera_B": "vera_lambda_b"}
VERA = Method(VeraConfig, vera_plan, Files("VERA", _keys, vera_options, gathered(SHARED), spread(SHARED)))
