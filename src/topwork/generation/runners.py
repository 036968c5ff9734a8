"""Who runs a step's rows: native code where it can, the model's own modules else, over one pool."""

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from topwork.generation.module_runner import ModuleRunner
from topwork.generation.native_runner import NativeRunner, native_runner
from topwork.generation.passes import Rows, Runner
from topwork.generation.pool import KeyValuePool
from topwork.models.base import Base


class Runners:
    """A native runner, and the modules for adapters that it cannot run: these have passes of their own. The modules
    begin when they are first needed: what they hold of every adapter takes a walk through all of them."""

    def __init__(self, native: NativeRunner, modules: Runner) -> None:
        self.native, self.modules, self.most_rows = native, modules, native.most_rows
        self._modules_hold = False

    def begin(self) -> None:
        """Weights do not change from here to `end`."""
        self.native.begin()

    def end(self) -> None:
        """Nothing runs: weights may change."""
        self.native.end()
        if self._modules_hold:
            self.modules.end()
            self._modules_hold = False

    def forget(self, adapter: str) -> None:
        """It will not come again."""
        self.native.forget(adapter)
        self.modules.forget(adapter)

    def run(self, rows: Sequence[Rows]) -> Tensor:
        """As `Runner.run`, whoever runs them."""
        can = {adapter: self.native.can_run(adapter) for adapter in {each.adapter for each in rows}}
        if all(can.values()):
            return self.native.run(rows)
        if not self._modules_hold:
            self.modules.begin()
            self._modules_hold = True
        parts = [(runner, [each for each in rows if can[each.adapter] is mine])
                 for runner, mine in ((self.native, True), (self.modules, False))]  # fmt: skip
        logits = [iter(runner.run(own)) if own else iter(()) for runner, own in parts]
        found = [next(logits[0 if can[each.adapter] else 1]) for each in rows if each.wanted]
        return torch.stack(found) if found else torch.empty(0)


def runner_for(base: Base, pool: KeyValuePool, frozen: Container[str] = ()) -> Runner:
    """The fastest that there is for this base. `frozen`: adapters whose weights never change."""
    modules = ModuleRunner(base, pool)
    native = native_runner(base, pool, frozen)
    return modules if native is None else Runners(native, modules)
