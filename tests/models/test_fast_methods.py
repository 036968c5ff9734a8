"""Which methods are parts of a fast layer's projections, and that they are the plain layer's either way."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.families import added, learning_batch, sequences, tiny_model
from reference.measure import GRADIENTS_APART, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.module import AdaptedLayer
from topwork.models.load import as_base
from topwork.ops.batch import Segment

METHODS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "dora": ({"r": 4, "use_dora": True, "target_modules": ["v_proj", "down_proj"]}, set()),
    "dora with dropout": (
        {"r": 4, "use_dora": True, "lora_dropout": 0.3, "target_modules": ["v_proj", "down_proj"]},
        {"v_proj", "down_proj"},
    ),
    "ia3": ({"method": "ia3"}, set()),
    "ia3 of attention": (
        {"method": "ia3", "target_modules": ["k_proj", "o_proj"], "feedforward_modules": ["o_proj"]},
        set(),
    ),
    "ia3 of inputs that others have too": (
        {"method": "ia3", "target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["q_proj", "up_proj"]},
        {"q_proj", "up_proj"},
    ),
    "bitfit": ({"method": "bitfit"}, set()),
}
"""Options, and the targets that run as modules."""


@pytest.mark.parametrize("beside", [None, {"r": 3, "lora_dropout": 0.2}], ids=["alone", "beside lora"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_fast_layers_is_as_on_plain_ones(
    name: str, beside: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, by_module = METHODS[name]
    configs = {"a": options, **({"b": beside} if beside else {})}
    model, results, ran = tiny_model("qwen2"), [], set()
    by_segment = AdaptedLayer._by_segment

    def recorded(self: AdaptedLayer, *given: Any) -> Tensor:
        ran.add(next(key for key, module in base.module.named_modules() if module is self).rpartition(".")[2])
        return by_segment(self, *given)

    monkeypatch.setattr(AdaptedLayer, "_by_segment", recorded)
    for fast in (False, True):
        ran.clear()
        base = as_base(copy.deepcopy(model), None, "tiny", lambda _: None, fast=fast)  # type: ignore[arg-type]
        adapters = added(base, **{key: AdapterConfig.model_validate(config) for key, config in configs.items()})
        batch = learning_batch(sequences(), "a")
        if beside:
            cuts = (*batch.cu_seqlens[:4:2], len(batch.tokens))
            segments = tuple(Segment(*span, key) for span, key in zip(zip(cuts, cuts[1:]), ("a", "b"), strict=True))
            batch = replace(batch, segments=segments)
        for key in configs:
            adapters.train(key)
        logprobs = base.log_probabilities(batch)
        learned = [parameter for key in configs for parameter in adapters.parameters(key).values()]
        found = torch.autograd.grad((batch.labels.loss_weights * logprobs).sum(), learned)
        results.append([logprobs.detach(), *found])
    if beside:
        assert bool(ran) == bool(by_module)  # LoRA's too, where what it shares an input with is a module
    else:
        assert ran == by_module
    for one, other in zip(*results, strict=True):
        assert relative(one, other, 1e-6) < GRADIENTS_APART
