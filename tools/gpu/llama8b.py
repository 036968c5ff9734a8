"""An 8B-shaped base: LoRA and QLoRA, sequences of 4,096 and of chats' lengths, beside PEFT; memory, and a profile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from gpu.bases import chat_lengths, rows_of, shaped
from gpu.profile import profiled, waits
from gpu.result import Result, main
from gpu.training import NAME, Ours, Peer, beside, speed
from topwork.data.examples import Example

SHAPE = "llama-3.1-8b"
LOSSES_APART = 2e-2
"""Of ours and PEFT's, as a share: both compute in bf16, each in its own order, and their adapters learn."""


@dataclass(frozen=True)
class Size:
    """Tokens of a pass and of a full sequence; rows of a step over chats, and how many of them PEFT has at once; how
    many steps are counted, alone and beside PEFT, and how many go before."""

    tokens_per_pass: int = 16384
    sequence: int = 4096
    rows: int = 16
    rows_at_once: int = 8
    steps: int = 5
    rounds: int = 6
    warm_up: int = 2


TINY = Size(8, 4, 2, 1, 1, 1, 1)


def part(result: Result) -> None:
    config, size = shaped(SHAPE, result.tiny), TINY if result.tiny else Size()
    result.put("shape", SHAPE)
    full = rows_of([size.sequence] * (size.tokens_per_pass // size.sequence), config.vocab_size, 0, learned=1.0)
    with result.section("LoRA"):
        lora(result, config, full, size)
    with result.section("QLoRA"):
        measured(result, "qlora", Ours(result.card, config, nf4=True), full, size)


def lora(result: Result, config: PretrainedConfig, full: Sequence[Example], size: Size) -> None:
    """Full sequences, then chats beside PEFT."""
    ours = Ours(result.card, config)
    measured(result, "lora", ours, full, size)
    with result.section("chats, beside PEFT"):
        chats = [
            rows_of(chat_lengths(size.rows, turn, result.tiny), config.vocab_size, turn)
            for turn in range(size.warm_up + size.rounds)
        ]
        found = beside_peft(result, ours, chats, size)
        result.put("chats", found)
        result.tell(
            f"chats: {found['tokens_per_second']['ours']:,.0f} tokens/s, {found['times_as_fast']['median']:.2f} times "
            f"PEFT's ({found['padding']:.0%} of whose tokens are padding)"
        )
        result.check("chats: ours and PEFT's losses apart", found["losses_apart"], LOSSES_APART)


def beside_peft(result: Result, ours: Ours, chats: Sequence[Sequence[Example]], size: Size) -> dict[str, Any]:
    """PEFT gets as many rows at once as it has memory for."""
    rows_at_once = size.rows_at_once
    while rows_at_once > 1:
        try:
            return both(result, ours, chats, size, rows_at_once)
        except torch.cuda.OutOfMemoryError:
            result.tell(f"chats: for {rows_at_once} rows at once PEFT lacks memory")
        result.card.free()
        rows_at_once //= 2
    return both(result, ours, chats, size, 1)


def both(
    result: Result, ours: Ours, chats: Sequence[Sequence[Example]], size: Size, rows_at_once: int
) -> dict[str, Any]:
    """Steps of both from fresh adapters, and PEFT's peak."""
    ours.begin_anew()
    peer = Peer(result.card, ours.config, ours.adapters.state(NAME))
    found = beside(ours, peer, chats, size.tokens_per_pass, rows_at_once, size.warm_up)
    return found | {"rows_at_once": rows_at_once, "peer_peak": peer.peak(chats[0], rows_at_once)}


def measured(result: Result, name: str, ours: Ours, full: Sequence[Example], size: Size) -> None:
    """Speed of full sequences, one step under the profiler, and its memory."""
    found = speed(ours, full, size.tokens_per_pass, size.steps, size.warm_up)
    result.put(name, found)
    told = ", ".join(f"{share:.1%} by {count}" for count, share in found["share_of_datasheet"].items())
    result.tell(f"{name}: {found['tokens_per_second']:,.0f} tokens/s, of the datasheet's speed {told}")
    result.check(f"{name}: the loss rises", found["losses"][-1] - found["losses"][0], 0.0)
    passes = ours.passes(full, size.tokens_per_pass)
    with result.section(f"{name}: one step under the profiler"):
        result.put(f"{name}_profile", profiled(result.card, lambda: ours.step(passes)))
    with result.section(f"{name}: waits"):
        found_at = waits(result.card, lambda: ours.arm.train(passes))
        result.put(f"{name}_waits", found_at)
        result.check(f"{name}: waits of a step ({', '.join(found_at)})", len(found_at), 1)
    with result.section(f"{name}: memory"):
        result.put(f"{name}_memory", ours.memory(passes))


if __name__ == "__main__":
    main(part)
