"""Where the time of one training step goes, by torch's profiler.

    python benchmarks/profile_step.py --data-dir DATA [--rows gsm8k|banking77] [--tokens 2048] [--quantized]
        [--ranks 16] [--model smollm2-135m] [--steps 5] [--top 12] [--out OUT]

One pass of whole rows, LoRA r16 on all linear layers, bf16 (--quantized: on NF4 with double quantization; --ranks
2,4,8,16,32,64: that many adapters, the rows dealt to them). Every
event's own time, without its children's, goes to the first rule of RULES that fits; what no event covers is Python. The
C kernels are called without torch, so their time is the own time of the autograd Functions that call them, with the
Python in these. Medians of several steps after a warm-up; the wall time without the profiler stands beside. Prints
Markdown, and writes OUT.json and OUT.md where asked to.
"""

import argparse
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from common import (
    model_argument,
    model_title,
    read_rows,
    surroundings,
    surroundings_text,
    table,
    write_chats,
    write_record,
)

if TYPE_CHECKING:
    from peers.topwork_step import Trained

    from topwork.ops.batch import Batch
    from topwork.training.step import Learner

SKINNY = 64
"""A product with a side of at most this (an A or B, or a few stacked ones) is an adapter's."""
WARM_UP = 2
REST = "Python and the rest"
GROUPS = (
    "base products", "adapter products", "unpacking 4-bit weights", "attention forward", "attention backward",
    "head and loss", "native kernels (C)", "element-wise in torch", "optimizer and clipping", "copies, casts, memory",
    REST,
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """Events of `group`: their own name matches `name`, and an event around them (or they) matches `inside`.

    skinny  for products alone: whether one of their sides is at most SKINNY
    """

    group: str
    name: str = ""
    inside: str = ""
    skinny: bool | None = None


PRODUCTS = r"^aten::(mm|addmm_?|bmm|baddbmm_?|mkldnn_\w*linear\w*|_?linear)$|^mkldnn::"
RULES = (
    Rule("optimizer and clipping", inside=r"^Optimizer\.|topwork::optimizer"),
    Rule("attention backward", inside=r"^_(Flat|Self)AttentionBackward|topwork::attention_backward"),
    Rule("attention forward", inside=r"^_(Flat|Self)Attention$|topwork::attention"),
    Rule("head and loss", inside=r"^_(InForward|LogProb\w*)(Backward)?$|topwork::(log_?prob|head)"),
    Rule("unpacking 4-bit weights", name=r"^topwork::dequantize"),
    Rule("base products", inside=r"^topwork::base_products"),
    Rule("adapter products", inside=r"^topwork::grouped_products"),
    Rule("adapter products", name=PRODUCTS, skinny=True),
    Rule("base products", name=PRODUCTS),
    Rule("optimizer and clipping", name=r"_foreach_|linalg_vector_norm|^aten::(_?fused_adam\w*)"),
    Rule(
        "copies, casts, memory",
        name=r"^aten::(copy_|clone|contiguous|to|_to_copy|cat|stack|fill_|zero_|zeros\w*|ones\w*|empty\w*|new_\w+|index\w*|"
        r"resize_\w*|constant_pad_nd)$",
    ),
    Rule(
        "native kernels (C)",
        name=r"^_(Project|QuantizedLinear|Residual|\w*Norm|\w*Gated|\w*Rotary)(Backward)?$|^topwork::",
    ),
    Rule(
        REST,
        name=r"^aten::(t|transpose|as_strided|slice|view|select|expand|detach|resolve_\w+|unsqueeze|squeeze|chunk|split\w*|"
        r"narrow|reshape|permute|alias|item|_local_scalar_dense|unbind|\w*view\w*|matmul|flatten|unflatten|lift_fresh)$",
    ),
    Rule("element-wise in torch", name=r"^aten::"),
)
"""Looked through in this order; an event that fits none is the rest."""


def group_of(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> str:
    """The group of an event: its name and those around it, innermost first, and its inputs' shapes."""
    for rule in RULES:
        if rule.name and not re.search(rule.name, names[0]):
            continue
        if rule.inside and not any(re.search(rule.inside, name) for name in names):
            continue
        if rule.skinny is None or rule.skinny == is_skinny(shapes):
            return rule.group
    return REST


def is_skinny(shapes: Sequence[Sequence[int]]) -> bool:
    """Whether a product's inputs have a side of at most SKINNY."""
    matrices = [shape for shape in shapes if len(shape) >= 2]
    return min((side for shape in matrices for side in shape[-2:]), default=SKINNY + 1) <= SKINNY


def main() -> None:
    given = arguments()
    trained, batch = prepared(given)
    learners = [trained.learner(name) for name in trained.adapters.configs]
    plain, steps = [], []
    for number in range(WARM_UP + given.steps):
        start = time.perf_counter()
        trained.steps(learners, [batch])
        seconds = time.perf_counter() - start
        if number >= WARM_UP:
            plain.append(seconds)
            steps.append(profiled(trained, batch, learners))
    groups = {group: median(step["groups"].get(group, 0.0) for step in steps) for group in GROUPS}
    record = {
        "question": {key: getattr(given, key) for key in ("rows", "quantized", "ranks", "steps")},
        "model": model_title(trained.base.name), "tokens": len(batch.tokens), "learned_tokens": len(batch.labels),
        "sequences": len(batch.cu_seqlens) - 1, "seconds": median(plain),
        "profiled_seconds": median(step["seconds"] for step in steps), "groups": groups,
        "events": median(step["events"] for step in steps), "top": largest(steps, given.top),
        "surroundings": surroundings(),
    }  # fmt: skip
    if given.out:
        write_record(given.out, record, text(record))
    print(text(record))


def arguments(description: str | None = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rows", choices=("gsm8k", "banking77"), default="gsm8k")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--quantized", action="store_true")
    parser.add_argument("--ranks", default="16", help="of the adapters, comma-separated")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--top", type=int, default=12, help="how many single kinds of events are listed")
    parser.add_argument("--out", type=Path, help="the record's path without its ending; left out, it is only printed")
    return parser.parse_args()


def prepared(given: argparse.Namespace) -> tuple["Trained", "Batch"]:
    """A model with an adapter whose B is not zero, and whole rows that fill a pass."""
    from peers.topwork_step import open_adapted, read_examples

    first, *others = (int(rank) for rank in given.ranks.split(","))
    trained = open_adapted(model_argument(given.model), first, 2 * first, nf4=given.quantized, others=others)
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows.jsonl"
        write_chats(rows, read_rows(given.rows, given.data_dir))
        examples = read_examples(trained.base, str(rows), 512)
    chosen, room = [], given.tokens
    for example in examples:
        if len(example.tokens) <= room:
            chosen.append(example)
            room -= len(example.tokens)
    (batch,) = trained.passes(chosen, given.tokens)
    return trained, batch


def profiled(trained: "Trained", batch: "Batch", learners: "Sequence[Learner]") -> dict[str, Any]:
    """One step: its wall time, the own time of every group and of every kind of event, in seconds."""
    from torch.profiler import ProfilerActivity, profile

    with named_grouped_products(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        start = time.perf_counter()
        trained.steps(learners, [batch])
        seconds = time.perf_counter() - start
    groups: dict[str, float] = defaultdict(float)
    kinds: Counter[tuple[str, str, str]] = Counter()
    events = profiler.events()
    for event in events:
        names, around = [event.name], event.cpu_parent
        while around is not None:
            names.append(around.name)
            around = around.cpu_parent
        shapes = [shape for shape in event.input_shapes or [] if shape]
        group, spent = group_of(names, shapes), event.self_cpu_time_total / 1e6
        groups[group] += spent
        kinds[group, event.name, " ".join("×".join(map(str, shape)) for shape in shapes[:3])] += spent
    groups[REST] += max(0.0, seconds - sum(groups.values()))
    return {"seconds": seconds, "groups": dict(groups), "kinds": kinds, "events": len(events)}


@contextmanager
def named_grouped_products() -> Iterator[None]:
    """The C kernel of products is called without torch, so it needs a name to be seen by: one for what holds a frozen
    layer's product (on AMX, with its terms and the gradients beside it), another for terms alone."""
    from torch.profiler import record_function

    from topwork.ops import grouped, project

    plain = grouped.grouped_products

    def named(products: Sequence[Any]) -> None:
        sides = [(*product.left.shape, product.right.shape[1]) for product in products]
        wide = any(min(each) > SKINNY for each in sides)
        with record_function("topwork::base_products" if wide else "topwork::grouped_products"):
            plain(products)

    for module in (grouped, project):
        module.grouped_products = named  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in (grouped, project):
            module.grouped_products = plain  # type: ignore[attr-defined]


def largest(steps: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The kinds of events with the most own time, by the last step."""
    return [
        {"group": group, "event": event, "inputs": inputs, "seconds": spent}
        for (group, event, inputs), spent in steps[-1]["kinds"].most_common(count)
    ]


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    total, held = (
        record["profiled_seconds"],
        "NF4 with double quantization" if record["question"]["quantized"] else "bf16",
    )
    lines = [[name, f"{1e3 * spent:,.0f}", f"{spent / total:.1%}"] for name, spent in record["groups"].items() if spent]
    lines.append(["the step", f"{1e3 * total:,.0f}", ""])
    top = [
        [f"{kind['event']} {kind['inputs']}".strip(), kind["group"], f"{1e3 * kind['seconds']:,.1f}"]
        for kind in record["top"]
    ]
    ranks = record["question"]["ranks"]
    return "\n\n".join([
        f"# Where a step's time goes: {record['model']}, base in {held}, LoRA r = {ranks} on all linear layers",
        f"{record['tokens']:,} tokens of {record['question']['rows']} in {record['sequences']} rows, "
        f"{record['learned_tokens']:,} learned; medians of {record['question']['steps']} steps. Without the profiler a "
        f"step takes {1e3 * record['seconds']:,.0f} ms ({record['tokens'] / record['seconds']:,.0f} tokens/s), with it "
        f"{1e3 * total:,.0f} ms and {record['events']:,.0f} events.",
        table(["part", "ms", "share"], lines),
        "The most expensive kinds of events (own time in one step):",
        table(["event, inputs", "part", "ms"], top),
        surroundings_text(record["surroundings"]),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
