"""Joined weights are the parameters' own values: whatever happens to these, no product with old ones is left."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from reference.families import added, learning_batch, randomise, sequences, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.merging.merge import merge
from topwork.models.base import Base
from topwork.models.fast import FastLayer
from topwork.models.joined import join
from topwork.models.load import as_base
from topwork.ops.packed import pack_4bit
from topwork.quantization.linear import QuantizedLinear
from topwork.run.opened import _cast

BATCH = learning_batch(sequences())
WHOLE, APART = 2 * 4, 2 * 7
"""Products of two layers: q, k and v in one and gate and up in one, or each by itself."""


def based(family: str, quick: bool) -> Base:
    return as_base(tiny_model(family), None, "tiny", [].append, fast=quick)  # type: ignore[arg-type]


def hidden(base: Base) -> tuple[Tensor, int]:
    """The last hidden states, and how many products they took."""
    with profile() as seen, torch.no_grad():
        found = base.hidden(BATCH)
    kinds = ("aten::mm", "aten::addmm")
    return found, sum(event.count for event in seen.key_averages() if event.key in kinds)


def others_like(module: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: x + 0.1 * torch.randn(x.shape) for name, x in sorted(module.state_dict().items())}


def cast(base: Base) -> None:
    base.module.to(torch.float64)


def cast_and_back(base: Base) -> None:
    base.module.to(torch.float64).to(torch.float32)


def cast_as_runs_do(base: Base) -> None:
    _cast(base, torch.float64)


def cast_in_part(base: Base) -> None:
    for layer in base.module.model.layers:
        layer.mlp.to(torch.float64).to(torch.float32)


def load(base: Base) -> None:
    base.module.load_state_dict(others_like(base.module))


def load_in_their_place(base: Base) -> None:
    base.module.load_state_dict(others_like(base.module), assign=True)


def give_other_values(base: Base) -> None:
    others = others_like(base.module)
    for name, parameter in base.module.named_parameters():
        parameter.data = others[name]


def put_in_other_layers(base: Base) -> None:
    """All of them in 4 bits but one."""
    for path, module in list(base.module.named_modules()):
        if type(module) is nn.Linear and "layers." in path and "gate_proj" not in path:
            packed = QuantizedLinear(module.in_features, module.out_features, module.bias)
            base.module.set_submodule(path, packed.hold(pack_4bit(module.weight.detach(), "nf4", 64, True)))


def merge_an_adapter(base: Base) -> None:
    adapters = added(base, a=AdapterConfig(r=4))
    randomise(adapters, "a")
    merge(base, adapters, "a")


CHANGES: dict[str, tuple[Callable[[Base], None], int | None]] = {
    "cast": (cast, WHOLE), "cast and back": (cast_and_back, WHOLE), "cast as runs do": (cast_as_runs_do, WHOLE),
    "cast in part": (cast_in_part, 2 * 5), "load": (load, WHOLE), "load in their place": (load_in_their_place, APART),
    "other values": (give_other_values, APART), "other layers": (put_in_other_layers, None),
    "merge": (merge_an_adapter, WHOLE),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["no bias", "bias"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_whatever_happens_to_the_parameters_is_seen(change: str, family: str) -> None:
    happens, products = CHANGES[change]
    found = []
    for quick in (True, False):
        base = based(family, quick)
        before, count = hidden(base)
        assert count == WHOLE or not quick
        happens(base)
        found.append((before, *hidden(base)))
    (before, after, count), (_, expected, _) = found
    assert relative(after, expected) < 1e-5
    assert products in (None, count)
    assert change in ("cast and back", "cast in part") or not torch.equal(after.float(), before)


def test_with_adapters_grafted_too() -> None:
    found = []
    for quick in (True, False):
        base = based("llama", quick)
        added(base, a=AdapterConfig(r=4))
        base.module.to(torch.float64)
        found.append(hidden(base))
    assert relative(found[0][0], found[1][0]) < 1e-5
    assert found[0][1] == WHOLE


def test_a_copy_has_weights_of_its_own() -> None:
    base = based("llama", True)
    before = hidden(base)[0]
    twin = copy.deepcopy(base.module)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(hidden(base)[0], before)
    assert not as_base(twin, None, "twin", [].append).hidden(BATCH).any()  # type: ignore[arg-type]


def test_what_left_takes_no_memory() -> None:
    base = based("llama", True)
    load_in_their_place(base)
    hidden(base)
    layers = [module for module in base.module.modules() if isinstance(module, FastLayer)]
    assert [layer.joined() for layer in layers] == [[], []]


@pytest.mark.parametrize("second", [{"bias": True}, {"dtype": torch.bfloat16}], ids=str)
def test_layers_that_cannot_be_one_stay_as_they_are(second: dict[str, Any]) -> None:
    layers = [nn.Linear(4, 5, bias=False), nn.Linear(4, 6, **({"bias": False} | second))]
    before = [layer.weight.data_ptr() for layer in layers]
    assert join(layers) is None
    assert [layer.weight.data_ptr() for layer in layers] == before
