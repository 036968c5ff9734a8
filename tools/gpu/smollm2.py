"""A SmolLM2-135M-shaped base: golden steps on the card against the CPU's, golden rows, and SFT steps beside PEFT.

`python -m gpu.smollm2 --losses [--tiny]` prints the golden steps' losses on the CPU, as they are without a card.
"""

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from common import run_process
from gpu.bases import based, chat_lengths, random_model, rows_of, shaped
from gpu.marked import ROOT, marked_files, run_marked
from gpu.result import Result, main
from gpu.training import NAME, Ours, Peer, beside
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.objectives.sft import Sft
from topwork.training.passes import step_passes
from topwork.training.step import Learner, train_step

SHAPE = "smollm2-135m"
TYPES = {"float32": 1e-4, "bfloat16": 1e-2}
"""Of the base in the golden steps, and how far apart, as a share, a loss may be after up to ten steps."""
LOSSES_APART = 2e-2
PLAIN = {"TRITON_INTERPRET": "0", "TOPWORK_NO_NATIVE": ""}
"""The CPU's own kernels, whatever this process runs on."""


@dataclass(frozen=True)
class Size:
    """Golden steps, rows of each and their tokens; tokens of a pass over chats, rows of a step, of PEFT's at once,
    steps beside PEFT and those before."""

    steps: int = 10
    rows: int = 4
    longest: int = 40
    tokens_per_pass: int = 16384
    chats: int = 32
    rows_at_once: int = 32
    rounds: int = 8
    warm_up: int = 2


TINY = Size(1, 2, 4, 12, 1, 1, 1, 0)


def part(result: Result) -> None:
    size = TINY if result.tiny else Size()
    result.put("shape", SHAPE)
    tiny = ["--tiny"] if result.tiny else []
    with ThreadPoolExecutor(1) as pool:  # the CPU's steps run beside the card's
        by_cpu = pool.submit(run_process, "gpu.smollm2", "--losses", *tiny, variables=PLAIN)
        for dtype in TYPES:
            with result.section(f"golden steps, {dtype}"):
                golden(result, dtype, by_cpu, size)
    with result.section("chats, beside PEFT"):
        chats(result, size)
    with result.section("golden rows"):
        golden_rows = [] if result.tiny else marked_files([ROOT / "tests" / "golden"])
        if result.in_time("golden rows", 10):
            run_marked(result, "golden_rows", golden_rows)


def losses(dtype: str, size: Size, device: torch.device, tiny: bool) -> list[float]:
    """Steps from weights drawn on the CPU, wherever they run; a smaller learning rate would hardly move the losses."""
    config = shaped(SHAPE, tiny, getattr(torch, dtype))
    base = based(random_model(config, torch.device("cpu")).to(device))  # type: ignore[arg-type]
    adapters = Adapters(base.module)
    adapters.add(NAME, AdapterConfig(r=8, lora_alpha=16), seed=0)
    parameters = list(adapters.parameters(NAME).values())
    learner = Learner(NAME, Sft(), parameters, torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0), 1.0)
    lengths = [size.longest - 3 * row % (size.longest - 2) for row in range(size.rows)]
    found = []
    for step in range(size.steps):
        rows = rows_of(lengths, config.vocab_size, step % 2, learned=0.8)
        [done] = train_step(base, [learner], step_passes([(NAME, rows)], 4 * size.longest, device))
        if isinstance(done, Exception):
            raise done
        found.append(done.loss)
    return found


def golden(result: Result, dtype: str, by_cpu: "Future[dict[str, Any]]", size: Size) -> None:
    """The same steps on both."""
    here = losses(dtype, size, result.card.device, result.tiny)
    there = by_cpu.result()
    if "error" in there:
        raise RuntimeError(f"the steps on the CPU ended: {there['error']}")
    apart = max(abs(one / other - 1) for one, other in zip(here, there[dtype], strict=True))
    result.add("golden_steps", {"dtype": dtype, "here": here, "cpu": there[dtype], "apart": apart})
    result.check(f"golden steps, {dtype}: losses apart from the CPU's", apart, TYPES[dtype])


def chats(result: Result, size: Size) -> None:
    """SFT steps over rows of chats' lengths."""
    config = shaped(SHAPE, result.tiny)
    ours = Ours(result.card, config)
    steps = [
        rows_of(chat_lengths(size.chats, turn, result.tiny), config.vocab_size, turn)
        for turn in range(size.warm_up + size.rounds)
    ]
    passes = ours.passes(steps[0], size.tokens_per_pass)
    ours.step(passes)
    result.put("chats_memory", ours.memory(passes))
    ours.begin_anew()
    peer = Peer(result.card, config, ours.adapters.state(NAME))
    found = beside(ours, peer, steps, size.tokens_per_pass, size.rows_at_once, size.warm_up)
    peaks = {"peer_peak": peer.peak(steps[0], size.rows_at_once)}
    result.put("chats", found | peaks)
    speed, faster = found["tokens_per_second"]["ours"], found["times_as_fast"]["median"]
    result.tell(f"chats: {speed:,.0f} tokens/s, {faster:.2f} times PEFT's")
    result.check("chats: ours and PEFT's losses apart", found["losses_apart"], LOSSES_APART)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--losses"]:
        tiny = "--tiny" in sys.argv
        size = TINY if tiny else Size()
        print(json.dumps({dtype: losses(dtype, size, torch.device("cpu"), tiny) for dtype in TYPES}))
    else:
        main(part)
