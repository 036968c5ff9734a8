"""What steps and generation launch on a card and wait for, as JSON, of the kinds that are named also the launches of a
layer: `python card_steps.py DEVICE_LIBRARY KIND ...`.

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
from topwork.generation.engine import Engine
from topwork.generation.requests import Request
from topwork.models.base import Base
from topwork.models.checkpointing import checkpoint_layers
from topwork.objectives.sft import Sft
from topwork.ops import attention, varlen
from topwork.ops.packed import pack_4bit
from topwork.ops.triton import load as triton
from topwork.quantization.linear import QuantizedLinear
from topwork.training.optimizers import AdamW8bit
from topwork.training.passes import step_passes
from topwork.training.step import Learner, mean_losses, train_step

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
    "checkpointed lora": (1, {"r": 8}),
    "checkpointed prefix": (1, {"method": "prefix", "num_virtual_tokens": 2}),
    "saved head": (2, {"r": 8, "modules_to_save": ["lm_head"]}),
    "head": (1, {"r": 8, "target_modules": ["q_proj", "lm_head"]}),
    "trained tokens": (1, {"r": 8, "trainable_token_indices": [3, 5]}),
    "full": (1, {"method": "full"}),
    "8-bit optimizer": (1, {"r": 64}),
}
"""How many adapters, and what each is; names say what else: qlora has a base in 4 bits."""


def grafted(card: FakeCard, kind: str, layers: int) -> tuple[Base, Adapters]:
    """A base with a kind's adapters, on the card."""
    card.log = Log()
    count, options = KINDS[kind]
    base = tiny_base("llama", torch.bfloat16, num_hidden_layers=layers, **SIZES)
    if kind == "qlora":
        pack(base.module)
    adapters = Adapters(base.module)
    for number in range(count):
        adapters.add(f"adapter{number}", AdapterConfig(**options))
    base.module.to(card.device)
    if kind.startswith("checkpointed"):
        checkpoint_layers(base, layers)
    return base, adapters


def step_logs(card: FakeCard, kind: str, layers: int) -> tuple[Log, Log]:
    """The second step of some adapters, which share its one pass: batches as they are made and sent, forward,
    backward, update. Then a validation."""
    with card.launches_written_down():
        base, adapters = grafted(card, kind, layers)
        names, learners = list(adapters.configs), []
        for name in names:
            adapters.train(name)
            parameters = list(adapters.parameters(name).values())
            eight_bit = kind == "8-bit optimizer"
            optimizer = AdamW8bit(parameters) if eight_bit else torch.optim.AdamW(parameters, fused=True)
            learners.append(Learner(name, Sft(), parameters, optimizer, 1.0))
        groups = [(name, [example(length) for length in (4, 5, 6)]) for name in names]
        virtual = {name: base.virtual_tokens(name) for name in names}
        for _ in range(2):
            card.log = Log()
            passes = step_passes(groups, 512, card.device, virtual, dict.fromkeys(names, 1))
            train_step(base, learners, passes)
        assert len(passes) == 1
        step, card.log = card.log, Log()
        with adapters.evaluating(*names):
            mean_losses(base, dict.fromkeys(names, Sft()), step_passes(groups, 512, card.device, virtual))
    return step, card.log


def token_logs(card: FakeCard, kind: str) -> list[Log]:
    """Prompts of two adapters (or one) and of the bare base that are read, and two tokens more of each."""
    logs = []
    with card.launches_written_down():
        base, adapters = grafted(card, kind, 2)
        engine = Engine(base)
        for name in (*adapters.configs, None):
            engine.submit(Request([3, 4, 5], name))
        for _ in range(3):
            card.log = Log()
            engine.step()
            logs.append(card.log)
    return logs


def pack(model: torch.nn.Module) -> None:
    """Its layers' linear modules in NF4 with double quantization."""
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and path != "lm_head":
            layer = QuantizedLinear(module.in_features, module.out_features)
            model.set_submodule(path, layer.hold(pack_4bit(module.weight, "nf4", 64, True)))


def example(length: int) -> Example:
    """A row of which all but the first token is learned."""
    return Example(np.arange(length, dtype=np.int32), np.minimum(np.arange(length), 1).astype(np.float32), "a row")


def told(card: FakeCard, kind: str) -> dict[str, Any]:
    """Of a step of two layers, of a validation and of generation what each waits for."""
    step, validation = step_logs(card, kind, 2)
    tokens = [log.waits for log in token_logs(card, kind)]
    return {"launches": step.launches, "waits": {"step": step.waits, "validation": validation.waits, "tokens": tokens}}


def a_layer(card: FakeCard, kind: str, launches: Counter[str]) -> dict[str, int]:
    """The launches that a third layer adds to a step of two."""
    added = Counter(step_logs(card, kind, 3)[0].launches)
    added.subtract(launches)
    return {name: count for name, count in added.items() if count}


if __name__ == "__main__":
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    card = FakeCard(register(Path(sys.argv[1])))
    triton.kernels = lambda name, near: triton.module(name) if near.device.type == "card" else None
    by_torch, ours = varlen.KERNELS[1:]
    attention.chosen = lambda _: by_torch
    found = {kind: told(card, kind) for kind in KINDS}
    layers = {kind: a_layer(card, kind, found[kind]["launches"]) for kind in sys.argv[2:]}
    attention.chosen = lambda _: ours
    own = told(card, "lora")
    layers["our attention"] = a_layer(card, "lora", own["launches"])
    waits = {kind: each["waits"] for kind, each in (found | {"our attention": own}).items()}
    json.dump({"waits": waits, "layers": layers}, sys.stdout)
