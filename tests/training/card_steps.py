"""What steps launch on a card and wait for, as JSON: `python card_steps.py DEVICE_LIBRARY`.

On a fake card (`reference/fake_card`), which is why it is a process of its own.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from reference.fake_card import FakeCard, Log, register
from reference.families import tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.data.examples import Example
from topwork.objectives.sft import Sft
from topwork.ops import attention, varlen
from topwork.ops.packed import pack_4bit
from topwork.ops.triton import load as triton
from topwork.quantization.linear import QuantizedLinear
from topwork.training.passes import step_passes
from topwork.training.step import Learner, train_step

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (1, {"r": 8}),
    "six loras": (6, {"r": 8}),
    "qlora": (1, {"r": 8}),
    "lora with dropout": (1, {"r": 8, "lora_dropout": 0.1}),
    "dora": (1, {"r": 8, "use_dora": True}),
    "ia3": (1, {"method": "ia3"}),
    "prefix": (1, {"method": "prefix", "num_virtual_tokens": 2}),
    "prompt": (1, {"method": "prompt", "num_virtual_tokens": 2}),
}
"""How many adapters, and what each is; a name that begins with a q has a base in 4 bits."""


def step_log(card: FakeCard, layers: int, packed: bool, adapters_count: int, options: dict[str, Any]) -> Log:
    """The second step of some adapters, which share its one pass: batches as they are made and sent, forward,
    backward, update."""
    card.log = Log()
    base = tiny_base("llama", torch.bfloat16, num_hidden_layers=layers, **SIZES)
    if packed:
        pack(base.module)
    names = [f"adapter{number}" for number in range(adapters_count)]
    with card.launches_written_down():
        base.module.to(card.device)
        adapters = Adapters(base.module)
        learners = []
        for name in names:
            adapters.add(name, AdapterConfig(**options))
            adapters.train(name)
            parameters = list(adapters.parameters(name).values())
            learners.append(Learner(name, Sft(), parameters, torch.optim.AdamW(parameters, fused=True), 1.0))
        groups = [(name, [example(length) for length in (4, 5, 6)]) for name in names]
        virtual = {name: base.virtual_tokens(name) for name in names}
        for _ in range(2):
            card.log = Log()
            passes = step_passes(groups, 512, card.device, virtual, dict.fromkeys(names, 1))
            train_step(base, learners, passes)
    assert len(passes) == 1
    return card.log


def pack(model: torch.nn.Module) -> None:
    """Its layers' linear modules in NF4 with double quantization."""
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and path != "lm_head":
            layer = QuantizedLinear(module.in_features, module.out_features)
            model.set_submodule(path, layer.hold(pack_4bit(module.weight, "nf4", 64, True)))


def example(length: int) -> Example:
    """A row of which all but the first token is learned."""
    return Example(np.arange(length, dtype=np.int32), np.minimum(np.arange(length), 1).astype(np.float32), "a row")


def told(card: FakeCard, packed: bool, adapters_count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Of a step of two layers what it waits for, and the launches that a third layer adds."""
    two, three = (step_log(card, layers, packed, adapters_count, options) for layers in (2, 3))
    a_layer = Counter(three.launches)
    a_layer.subtract(two.launches)
    return {"waits": two.waits, "layer": {name: count for name, count in a_layer.items() if count}, "step": two.total}


if __name__ == "__main__":
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    card = FakeCard(register(Path(sys.argv[1])))
    triton.kernels = lambda name, near: triton.module(name) if near.device.type == "card" else None
    by_torch, ours = varlen.KERNELS[1:]
    attention.chosen = lambda _: by_torch
    found = {name: told(card, name[0] == "q", *kind) for name, kind in KINDS.items()}
    attention.chosen = lambda _: ours
    json.dump(found | {"lora with our attention": told(card, False, *KINDS["lora"])}, sys.stdout)
