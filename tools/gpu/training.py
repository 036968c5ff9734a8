"""Training on a random base: our step, a PEFT loop's beside it, both in turns; their memory, and what they compute."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from checkpointing import Arm
from floor import floor_flops, shape_of_config
from transformers import PretrainedConfig
from transformers.utils import is_flash_attn_2_available

from gpu.bases import learned_lengths, random_base, random_model
from gpu.card import Card
from topwork.adapters.graft import Adapters
from topwork.data.examples import Example
from topwork.ops.batch import Batch
from topwork.ops.context import training_pass
from topwork.training.config import TrainingConfig
from topwork.training.memory_held import state_bytes
from topwork.training.passes import step_passes

R, ALPHA = 16, 32
NAME = "lora"
DATASHEET = 989.5e12
"""Dense bf16 of an H100 or H200, floating-point operations a second: what shares of it are counted against."""


class Ours:
    """A base with LoRA r16 on all linear layers, and its optimizer."""

    def __init__(self, card: Card, config: PretrainedConfig, nf4: bool = False) -> None:
        self.card, self.config = card, config
        self.before = card.allocated()
        self.base = random_base(config, card.device, nf4=nf4)
        card.free()
        self.weight_bytes = card.allocated() - self.before
        self.adapters = Adapters(self.base.module)
        self.arm = Arm(self.base, self.adapters, NAME)

    def begin_anew(self) -> None:
        """A fresh adapter in the place of the trained one."""
        self.adapters.remove(NAME)
        self.arm = Arm(self.base, self.adapters, NAME)

    def passes(self, rows: Sequence[Example], tokens_per_pass: int) -> list[Batch]:
        """Rows as they are trained on."""
        return step_passes([(NAME, rows)], tokens_per_pass, self.base.device)

    def step(self, passes: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step, timed from an idle device to an idle device."""
        found: dict[str, float] = {}
        seconds = self.card.timed(lambda: found.update(self.arm.train(passes)))
        return found | {"seconds": seconds}

    def memory(self, passes: Sequence[Batch]) -> dict[str, Any]:
        """Bytes by part, of a step like those made before, while nothing else is on the card. What it needs beyond
        weights, adapter and what its largest pass keeps are its temporaries. For what was foreseen see `gpu.memory`."""
        card, batch = self.card, max(passes, key=len)
        card.free()
        still = card.allocated() - self.before
        with training_pass(self.base.workspace):
            gradient = -batch.labels.loss_weights
            logprobs = self.base.log_probabilities(batch, gradient)
            kept = card.allocated() - self.before - still
            logprobs.backward(gradient)
        self.arm.optimizer.zero_grad()
        card.free()
        card.forget_peak()
        self.step(passes)
        peak = card.peak() - self.before
        adapter = still - self.weight_bytes
        sizes = [parameter.numel() for parameter in self.arm.parameters]
        foreseen = 8 * sum(sizes) + state_bytes(TrainingConfig().optim, sizes)
        return {
            "tokens": len(batch), "weights": self.weight_bytes, "adapter_and_optimizer": adapter, "kept": kept,
            "temporaries": peak - self.weight_bytes - adapter - kept, "peak": peak,
            "peak_reserved": card.peak_reserved(), "adapter_foreseen": foreseen,
        }  # fmt: skip


class Peer:
    """The same model in transformers with the same adapter in PEFT: padded batches, its fastest attention."""

    def __init__(self, card: Card, config: PretrainedConfig, adapter: dict[str, torch.Tensor]) -> None:
        from peers import peft_loop  # only here: without PEFT all but the comparison goes on

        self.card, self.loop = card, peft_loop
        model = random_model(config, card.device)
        self.attention = "flash_attention_2" if card.measured and is_flash_attn_2_available() else "sdpa"
        model.set_attn_implementation(self.attention)
        named = {f"base_model.model.{name}": tensor for name, tensor in adapter.items()}
        self.model = peft_loop.with_adapter(model, R, ALPHA, named, config.dtype).train()
        self.optimizer = torch.optim.AdamW(peft_loop.trained_parameters(self.model), lr=2e-4, fused=True)

    def step(self, rows: Sequence[Example], rows_at_once: int) -> dict[str, float]:
        """One optimizer step over so many rows at a time, timed as ours is."""
        pairs = [(row.tokens.tolist(), len(row.tokens) - int(row.weights.sum())) for row in rows]
        cut = [pairs[at : at + rows_at_once] for at in range(0, len(pairs), rows_at_once)]
        batches = [{key: x.to(self.card.device) for key, x in self.loop.collate(part, 0).items()} for part in cut]
        found: list[float] = []
        seconds = self.card.timed(lambda: found.extend(self.loop.train_step(self.model, self.optimizer, batches, 1.0)))
        return {"seconds": seconds, "loss": found[0], "grad_norm": found[1]}

    def peak(self, rows: Sequence[Example], rows_at_once: int) -> int:
        """The most bytes that a step takes, once others were made, with all that is the peer's."""
        self.card.free()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        own = sum(tensor.nbytes for tensor in (*self.model.parameters(), *filter(torch.is_tensor, states)))
        others = self.card.allocated() - own
        self.card.forget_peak()
        self.step(rows, rows_at_once)
        return self.card.peak() - others if self.card.measured else 0


def beside(
    ours: Ours, peer: Peer, steps: Sequence[Sequence[Example]], tokens_per_pass: int, rows_at_once: int,
    warm_up: int,
) -> dict[str, Any]:  # fmt: skip
    """Steps over the same rows in turns, the first `warm_up` uncounted: what each took, how far losses are apart."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for turn, rows in enumerate(steps):
        for side in ("ours", "peer") if turn % 2 else ("peer", "ours"):
            if side == "ours":
                found[side].append(ours.step(ours.passes(rows, tokens_per_pass)))
            else:
                found[side].append(peer.step(rows, rows_at_once))
    tokens = [sum(len(row.tokens) for row in rows) for rows in steps]
    counted = range(warm_up, len(steps))
    ratios = [found["peer"][at]["seconds"] / found["ours"][at]["seconds"] for at in counted]
    return {
        "tokens": tokens, "attention_of_peer": peer.attention, "steps": found,
        "padding": 1 - sum(tokens) / sum(padded(rows, rows_at_once) for rows in steps),
        "tokens_per_second": {
            side: median(tokens[at] / own[at]["seconds"] for at in counted) for side, own in found.items()
        },
        "times_as_fast": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
        "losses_apart": furthest_apart(found, "loss"), "grad_norms_apart": furthest_apart(found, "grad_norm"),
    }  # fmt: skip


def padded(rows: Sequence[Example], rows_at_once: int) -> int:
    """Tokens and padding of a peer's step."""
    lengths = [len(row.tokens) for row in rows]
    cut = [lengths[at : at + rows_at_once] for at in range(0, len(lengths), rows_at_once)]
    return sum(max(part) * len(part) for part in cut)


def furthest_apart(found: dict[str, list[dict[str, float]]], figure: str) -> float:
    """The largest difference of both sides' figure, as a share of it."""
    return max(abs(one[figure] / other[figure] - 1) for one, other in zip(found["ours"], found["peer"]))


def speed(ours: Ours, rows: Sequence[Example], tokens_per_pass: int, count: int, warm_up: int) -> dict[str, Any]:
    """Steps over the same rows again and again: tokens a second, and shares of the datasheet's speed."""
    passes = ours.passes(rows, tokens_per_pass)
    steps = [ours.step(passes) for _ in range(warm_up + count)]
    seconds = [step["seconds"] for step in steps[warm_up:]]
    flops = needed_flops(ours.config, rows)
    tokens = sum(len(row.tokens) for row in rows)
    return {
        "tokens": tokens, "passes": len(passes), "sequences": len(rows), "seconds": seconds,
        "tokens_per_second": tokens / median(seconds), "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps], "flops": flops,
        "share_of_datasheet": {name: total / median(seconds) / DATASHEET for name, total in flops.items()},
    }  # fmt: skip


def needed_flops(config: PretrainedConfig, rows: Sequence[Example]) -> dict[str, float]:
    """Floating-point operations of a step, counted in two ways.

    least  what nobody can leave out (`benchmarks/floor.py`): causal attention, the head on learned tokens
    nemo   NeMo's count for LoRA, of 2/3 (and the adapter's share) of full fine-tuning's: less of attention, whose way
           back is three times what is counted of it here, and the head on all tokens
    """
    lengths, shape = learned_lengths(rows), shape_of_config(config)
    tokens, squares = sum(length for length, _ in lengths), sum(length**2 for length, _ in lengths)
    d, layers = config.hidden_size, config.num_hidden_layers
    keys = config.num_key_value_heads / config.num_attention_heads
    weights = sum(inputs * outputs * count for inputs, outputs, count in shape.linear) + 2 * d * config.vocab_size
    adapter = R * sum((inputs + outputs) * count for inputs, outputs, count in shape.linear)
    full = layers * d * (tokens * (d * (12 + 12 * keys) + 18 * config.intermediate_size) + 6 * squares)
    full += 6 * config.vocab_size * d * tokens
    return {
        "least": sum(floor_flops(shape, lengths, R).values()),
        "nemo": (2 + adapter / weights) / 3 * full,
    }
