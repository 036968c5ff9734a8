"""Full fine-tuning: every module is trained as a copy of its own (`module_copy.py`); a head that is tied to the
embedding shares its copy, and is not repeated in the file."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from topwork.adapters.config import FullConfig
from topwork.adapters.files import own_files
from topwork.adapters.method import Bare, Method, Plan, Planned, Preset
from topwork.adapters.module import AdapterModule
from topwork.adapters.module_copy import ModuleCopy, planned_copy
from topwork.adapters.targets import matching
from topwork.common.errors import AdapterError
from topwork.quantization.linear import QuantizedLinear


class TiedHead(AdapterModule):
    """A head whose weight is the embedding's: it runs with the embedding's copy and has nothing of its own but a bias.

    The copy is held in a tuple, so that it is the embedding's part alone that has it as a parameter.
    """

    def __init__(self, base_layer: nn.Module, embedding: ModuleCopy) -> None:
        super().__init__()
        self.embedding = (embedding,)
        self.outputs = embedding.module.get_parameter("weight").shape[0]
        bias = getattr(base_layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        weight = self.embedding[0].module.get_parameter("weight").to(y.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(y.dtype))

    @torch.no_grad()
    def replacement(self, base_layer: nn.Module) -> nn.Module:
        """A dense head of the base's type, its weight still to be tied to the embedding's."""
        dense = base_layer.dense(torch.float32) if isinstance(base_layer, QuantizedLinear) else base_layer
        if self.bias is not None:
            dense.get_parameter("bias").copy_(self.bias)
        return dense


def full_plan(bare: Bare, config: FullConfig) -> Plan:
    """A copy of every module; a head that is tied to the embedding shares its copy."""
    paths = whole_targets(bare.modules, config)
    plan = {path: planned_copy(bare.modules[path]) for path in paths}
    if bare.head in plan and bare.embedding in plan and bare.head != bare.embedding:
        head, embedding = bare.modules[bare.head], bare.modules[bare.embedding]
        if head.get_parameter("weight") is embedding.get_parameter("weight"):
            copied = cache(lambda: ModuleCopy(embedding))
            bias = getattr(head, "bias", None)
            plan[bare.embedding] = replace(plan[bare.embedding], make=copied)
            plan[bare.head] = Planned(lambda: TiedHead(head, copied()), 0 if bias is None else bias.numel())
    return plan


def whole_targets(modules: Mapping[str, nn.Module], config: FullConfig) -> list[str]:
    """Paths of every module with parameters of its own, but those left out.

    Raises AdapterError where one cannot be held as a copy: it is given more than the tokens' rows, or mixes them.
    """
    out = set(matching(modules, config.exclude_modules)) if config.exclude_modules else set()
    chosen = [path for path, module in modules.items() if path not in out and _has_own(module)]
    wrong = [path for path in chosen if not _is_by_row(modules[path])]
    if wrong:
        raise AdapterError(
            f"method full cannot train {wrong[0]} ({type(modules[wrong[0]]).__name__}) or {len(wrong) - 1} others: a "
            "copy can stand for modules that take every token's row by itself; leave these out with exclude_modules: "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in wrong}))}"
        )
    if not chosen:
        raise AdapterError(f"exclude_modules {config.exclude_modules!r} leaves nothing to train; loosen it")
    return chosen


def _has_own(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _is_by_row(module: nn.Module) -> bool:
    """A leaf that is called with rows and nothing else."""
    arguments = list(inspect.signature(module.forward).parameters.values())
    mixes = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not mixes and not list(module.children()) and len(arguments) == 1


FULL = Method(FullConfig, full_plan, own_files(FullConfig), {"full": Preset(rate=0.1)})
