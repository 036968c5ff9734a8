"""A training step of every method through the Triton kernels, beside the same step through the plain-torch truths.

`python triton_step_cases.py`, with TRITON_INTERPRET=1 and TOPWORK_NO_NATIVE=1, prints a JSON object a line: the case,
how far the step's loss and gradients are from the truths' (relative, in norms), and how often it called which kernel.
While kernels run, a truth that runs in a kernel's place is an error, and so is an adapter that runs as a module.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from reference.families import added, learning_batch, sequences, tiny_base
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.module import AdaptedLayer
from topwork.models.base import Base
from topwork.objectives.sft import Sft
from topwork.ops import dropout, gain, gated, norm, residual, rotary, row_lengths
from topwork.ops.batch import Batch, Segment
from topwork.ops.triton import load
from topwork.training.step import Learner, StepResult, train_step

LENGTHS = (4, 2, 3, 3)
METHODS: dict[str, dict[str, Any]] = {
    "lora with dropout": {"r": 3, "lora_alpha": 8, "lora_dropout": 0.3},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "ia3": {"method": "ia3"},
    "ia3 of attention": {"method": "ia3", "target_modules": ["k_proj", "o_proj"], "feedforward_modules": ["o_proj"]},
    "bitfit": {"method": "bitfit"},
    "prefix": {"method": "prefix", "num_virtual_tokens": 2},
}
CASES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in METHODS if name != "ia3 of attention"},
    "together": ("lora with dropout", "dora", "ia3 of attention", "bitfit"),
}
"""Who shares a pass."""
KERNELS = {
    "gain": ("multiply_", "add_", "gain_sums_", "column_sums"), "layer": ("drop",), "residual": ("add_and_round",),
    "row_lengths": ("row_lengths",),
}  # fmt: skip
"""Which are counted."""
TRUTHS = (dropout, gain, gated, norm, residual, rotary, row_lengths)


class Kept(torch.optim.SGD):
    """Keeps the gradients that it was given, and updates nothing."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.given = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def cases() -> Iterator[dict[str, Any]]:
    """Each on a base of qwen2, whose attention has biases; in bf16 those that share a pass, which are nearly all."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, methods in CASES.items() if dtype is torch.float32 else [("together", CASES["together"])]:
            with patch.object(load, "INTERPRETED", False):
                base = tiny_base("qwen2", dtype, num_hidden_layers=2)
                adapters = added(base, **{m: AdapterConfig.model_validate(METHODS[m]) for m in methods})
                truth = stepped(base, adapters, methods)
            called: Counter[str] = Counter()
            with kernels_alone(called):
                found = stepped(base, adapters, methods)
            far = {what: relative(one, found[what], 1e-30) for what, one in truth.items()}
            yield {"name": name, "dtype": str(dtype).removeprefix("torch."), "far": far, "called": called}


def stepped(base: Base, adapters: Adapters, methods: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """The loss and the gradients of each adapter."""
    learners = []
    for name in methods:
        adapters.train(name)
        parameters = list(adapters.parameters(name).values())
        learners.append(Learner(name, Sft(), parameters, Kept(parameters, lr=0.0), 0.0))
    results, found = train_step(base, learners, [a_pass(methods)]), {}
    for learner, result in zip(learners, results, strict=True):
        assert isinstance(result, StepResult), result
        found[f"loss of {learner.name}"] = [torch.tensor(result.loss)]
        found[f"gradients of {learner.name}"] = learner.optimizer.given  # type: ignore[attr-defined]
    return found


def a_pass(methods: tuple[str, ...]) -> Batch:
    """A sequence for each method; all of them where there is one method."""
    batch = learning_batch(sequences(LENGTHS), methods[0])
    if len(methods) == 1:
        return batch
    spans = zip(batch.cu_seqlens, batch.cu_seqlens[1:])
    segments = tuple(Segment(*span, method) for span, method in zip(spans, methods, strict=True))
    return replace(batch, segments=segments)


@contextmanager
def kernels_alone(called: Counter[str]) -> Iterator[None]:
    """No truth and no adapter's module may run; counts the kernels that do."""

    def refused(*given: Any, **more: Any) -> Any:
        raise AssertionError("what a kernel is for ran without it")

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            called[name] += 1
            return kernel(*given)

        return run

    by_segment = AdaptedLayer._by_segment

    def by_module(self: AdaptedLayer, *given: Any) -> Tensor:
        return refused() if isinstance(self.base_layer, nn.Linear) else by_segment(self, *given)

    patches = [patch.object(AdaptedLayer, "_by_segment", by_module)]
    for module in TRUTHS:
        patches += [patch.object(module, name, refused) for name in vars(module) if "_reference" in name]
    for file, names in KERNELS.items():
        kernels = load.module(file)
        patches += [patch.object(kernels, name, counted(name, getattr(kernels, name))) for name in names]
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        yield


if __name__ == "__main__":
    for case in cases():
        print(json.dumps(case))
