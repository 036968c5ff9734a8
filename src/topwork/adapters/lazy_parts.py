"""An adapter's parts made one at a time, over a base that is not in memory.

What a part is made of is in the adapter's file; what PEFT's PiSSA and OLoRA folders leave out is found again from the
one weight that the part stands at.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from topwork.adapters.fitting import Parts, checked, key_of, plan_on, state_of
from topwork.adapters.method import Bare, Method
from topwork.adapters.methods.table import METHODS
from topwork.adapters.module import AdapterModule
from topwork.adapters.on_base import Stored
from topwork.adapters.peft_format import SavedAdapter, placed, refuse_more_than_file, with_beginnings


class LazyParts:
    """The parts of an adapter read from disk, as they go into a base of which only the skeleton is there.

    config  the adapter's options as this base takes them
    shapes  the parts by path, on the meta device: their classes and shapes, no values
    """

    def __init__(
        self, bare: Bare, saved: SavedAdapter, stored: Stored, methods: Mapping[str, Method[Any]] = METHODS
    ) -> None:  # fmt: skip
        """Nothing is made yet but shapes. Raises AdapterError where config, tensors and base do not fit one another."""
        saved = placed(saved, bare, stored)
        self.config, tensors = saved.config, saved.tensors
        plan = plan_on(bare, saved.config, methods)
        refuse_more_than_file(plan, saved)
        with torch.device("meta"):
            self.shapes: Parts = {path: planned.make() for path, planned in plan.items()}
        own = state_of(self.shapes)
        whole = with_beginnings(self.config, {key: tensor.to("meta") for key, tensor in tensors.items()}, own)
        checked(own, whole)
        self._tensors = tensors
        self._begun = {key for key, tensor in tensors.items() if whole[key].shape != tensor.shape}
        self._plan = plan_on(bare, saved.config, methods)  # another: some of its makers keep what they made

    def stored(self, path: str, key: str) -> Tensor:
        """A part's tensor in the adapter's file."""
        return self._tensors[key_of(path, key)]

    @torch.no_grad()
    def part(self, path: str, weight: Callable[[], Tensor]) -> AdapterModule:
        """The part at a module, filled. `weight` gives the module's [out, in], and is asked only for what the file
        leaves out."""
        part = self._plan[path].make()
        if any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers())):
            part = part.to_empty(device="cpu")  # what it copied of the base's skeleton
        file = {key_of(path, key): self.stored(path, key) for key in part.state()}
        if file.keys() & self._begun:
            part.reset_parameters(_linear(weight()), 0, path)
            file = with_beginnings(self.config, file, state_of({path: part}))
        part.load_state({key: file[key_of(path, key)] for key in part.state()})
        return part.train(False)


def _linear(weight: Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
