"""The tables of docs/planning.md, from the code that plans: python tools/planning_tables.py (`make docs`)."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from topwork.adapters.config import LoraConfig
from topwork.adapters.sizes import trained_sizes
from topwork.common.errors import AdapterError
from topwork.models.config import ModelConfig
from topwork.models.config_files import shape_names
from topwork.models.structure import Structure
from topwork.plan.base import structure_named
from topwork.plan.devices import shipped_devices
from topwork.plan.fits import Job
from topwork.plan.tokens import Tokens
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.recipe import Recipe, make_recipe
from topwork.run.planning.compared import METHODS, as_method
from topwork.run.planning.place import Place, card_place, gigabytes
from topwork.run.planning.text import dollars, duration
from topwork.run.planning.timing import timing_of

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
RANKS = (8, 16, 64)
TARGETS: dict[str, str | list[str]] = {
    "q, v": ["q_proj", "v_proj"], "q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"], "all linear": "all-linear",
}  # fmt: skip
TIMED = ("smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-3-8b", "qwen2.5-14b", "qwen2.5-32b", "llama-3-70b")
EXAMPLES, LENGTH, EPOCHS = 10_000, 500, 3
HUGE = 10**15


@cache
def base(name: str) -> Structure:
    """A shipped shape."""
    return structure_named(ModelConfig(model_name_or_path=name))


def recipe(name: str, **sections: object) -> Recipe:
    """LoRA's defaults over it, but for what is said."""
    values = {"model": {"model_name_or_path": name}, "data": {"train": "(none)"}, **sections}
    return make_recipe(values)


def rows(examples: int, length: int) -> Tokens:
    """Rows of one length, half of which is learned."""
    total = examples * length
    same = {50: length, 90: length, 99: length}
    return Tokens(examples, examples, total, total // 2, length, same, float(length), 0, 0, "estimated", 0)


def parameters_table() -> Iterator[str]:
    """Trained parameters by rank and targets."""
    heads = [f"r {r}, {name}" for name in TARGETS for r in RANKS]
    yield f"| base | parameters | {' | '.join(heads)} |"
    yield f"|---|---|{'---|' * len(heads)}"
    for name in sorted(shape_names(), key=lambda each: base(each).parameters):
        cells = [_trained(name, r, targets) for targets in TARGETS.values() for r in RANKS]
        yield f"| {name} | {millions(base(name).parameters)} | {' | '.join(cells)} |"


def _trained(name: str, r: int, targets: str | list[str]) -> str:
    try:
        return millions(sum(trained_sizes(base(name), LoraConfig(r=r, target_modules=targets)).values()))
    except AdapterError:  # one layer holds queries, keys and values
        return "-"


def millions(count: int) -> str:
    """`6.8 M`, `8.03 B`."""
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"


def job(
    method: str, name: str, place: Place, tokens: Tokens | None = None, head: str = "16bit", **sections: object
) -> Job:
    """A method on a base at a place."""
    own = as_method(recipe(name, **sections), method)
    if method == "QLoRA" and head != "16bit":
        own = own.model_copy(update={"quantization": QuantizationConfig(load_in_4bit=True, head=head)})
    longest = LENGTH if tokens is None else tokens.longest
    return Job([own], base(name), place.kind, place.memory_bytes, longest)


def memory_table() -> Iterator[str]:
    """What the smallest pass takes, by method and precision."""
    everything = Place("a card", "cuda", HUGE, "")
    yield "| base | full | full, 8-bit AdamW | LoRA r 16 | QLoRA r 16 | QLoRA r 16, NF4 head |"
    yield "|---|---|---|---|---|---|"
    for name in TIMED:
        found = [
            job("full", name, everything),
            job("full", name, everything, training={"optim": "adamw_8bit"}),
            job("LoRA", name, everything),
            job("QLoRA", name, everything),
            job("QLoRA", name, everything, head="nf4"),
        ]
        yield f"| {name} | {' | '.join(gigabytes(each.least.needed_bytes) for each in found)} |"


def time_table(method: str) -> Iterator[str]:
    """Hours and dollars of the standard job."""
    cards = [card_place(card) for card in shipped_devices().values()]
    yield f"| base | {' | '.join(card.name for card in cards)} |"
    yield f"|---|{'---|' * len(cards)}"
    for name in TIMED:
        yield f"| {name} | {' | '.join(_cost(method, name, card) for card in cards)} |"


def _cost(method: str, name: str, card: Place) -> str:
    tokens = rows(EXAMPLES, LENGTH)
    own = job(method, name, card, tokens, training={"num_train_epochs": EPOCHS, "batch_size": 16})
    timing = timing_of(own, own.fit, tokens, card, here=False) if own.fit.fits else None
    if timing is None:
        return "-"
    money = "" if timing.cost.money is None else f" {dollars(timing.cost.money)}"
    return f"{duration(timing.cost.seconds)}{money}"


def quoted() -> Iterator[str]:
    """Figures that people quote, and what the model of memory and time comes to."""
    card, a100 = Place("a card", "cuda", HUGE, ""), shipped_devices()["A100 80GB"]
    short = job("QLoRA", "llama-3-8b", card, rows(1, 512), adapter={"r": 8})
    packed = job("QLoRA", "llama-3-8b", card, rows(1, 512), head="nf4", adapter={"r": 8})
    seven = job("full", "llama-2-7b", card, rows(1, 512))
    seven8 = job("full", "llama-2-7b", card, rows(1, 512), training={"optim": "adamw_8bit"})
    big, place48 = "llama-3-70b", Place("48 GB", "cuda", 48 * 10**9, "")
    seventy = job("QLoRA", big, place48, rows(1, 512), adapter={"r": 16})
    packed70 = job("QLoRA", big, place48, rows(1, 512), head="nf4", adapter={"r": 8}, training={"optim": "adamw_8bit"})
    yield (
        '| **8B QLoRA "in 6 GB"** ([Unsloth\'s absolute minimum](https://www.skills.sh/terminalskills/'
        "skills/unsloth), as told there, read 2026-11-30) | "
        f"{_needs(short)} with r 8 on all linear layers, sequences of 512 tokens and all layers but one checkpointed; "
        f"{_needs(packed)} with the output head in NF4 too. 6 GB is what the base alone comes to "
        f"({gigabytes(short.least.peak.parts['weights'] + short.least.peak.parts['constants'])} packed): the process, "
        "the adapter and a pass come on top. |"
    )
    yield (
        '| **7B, full, "56 GB"** ([capstok](https://www.capstok.com/learn/machine-learning/advanced-ai-engineering/'
        "fine-tuning-fundamentals/full-fine-tune-vs-lora-vs-qlora-memory-time-quality-tradeoffs), of an 8B; "
        "[another](https://code-mentor-xi-gilt.vercel.app/course/ai-llm-intro/lora-qlora) says it of a 7B; both "
        f"read 2026-11-30) | {_needs(seven)} here, with fp32 masters, gradients and moments (16 bytes a parameter) "
        f"beside the bf16 base (2). 56 GB are 8 bytes for each of 7 billion values: AdamW's fp32 moments alone. |"
    )
    yield (
        '| **7B, full, "60–80 GB"** ([VRLA Tech](https://vrlatech.com/how-much-vram-do-you-need-for-llm-fine-tuning-in-2026)'
        f", read 2026-11-30) | {_needs(seven8)} with 8-bit moments; below that weights and moments have to be in 16 "
        "bits, which rounds small updates away. |"
    )
    yield (
        '| **70B QLoRA "on one 48 GB card"** ([VaultLayer](https://vaultlayer.cloud/learn/gpu-memory-to-fine-tune-llm):'
        f" 48–80 GB; read 2026-11-30) | {_needs(seventy)} with r 16 and sequences of 512 tokens: "
        f"{'it fits' if seventy.least.fits else 'it does not fit'}; {_needs(packed70)} with r 8, an NF4 head and 8-bit "
        f"AdamW: {'it fits' if packed70.least.fits else 'it does not fit'}. |"
    )
    hours = [_hours(name, a100, length) for name, length in (("llama-2-7b", 200), ("llama-2-7b", 500))]
    yield (
        '| **50,000 examples × 3 epochs "4 h on an A100"** (a figure that people quote; no page was found that says '
        f"it with its assumptions) | LoRA r 16 on a 7B takes {hours[0]} at 200 tokens an example and {hours[1]} at 500:"
        f" the 4 hours are {_length_for(a100):,.0f} tokens an example. |"
    )


def _needs(own: Job) -> str:
    return f"**{gigabytes(own.least.needed_bytes)}**"


def _hours(name: str, card: object, length: int) -> str:
    return duration(_seconds(name, card, length))


def _seconds(name: str, card: object, length: int) -> float:
    place = card_place(card)  # type: ignore[arg-type]
    tokens = rows(50_000, length)
    own = job("LoRA", name, place, tokens, training={"num_train_epochs": 3, "batch_size": 16})
    timing = timing_of(own, own.fit, tokens, place, here=False)
    assert timing is not None
    return timing.cost.seconds


def _length_for(card: object) -> float:
    """Tokens an example at which the 7B's run takes four hours."""
    lengths = range(20, 600, 10)
    return next(length for length in lengths if _seconds("llama-2-7b", card, length) >= 4 * 3600)


def tables() -> dict[str, Sequence[str]]:
    """Each block of the page by its name."""
    return {
        "parameters": list(parameters_table()),
        "memory": list(memory_table()),
        **{f"time-{method.lower()}": list(time_table(method)) for method in METHODS},
        "quoted": ["| what is said | what it comes to |", "|---|---|", *quoted()],
    }


def page(text: str) -> str:
    """The page with its tables anew."""
    for name, lines in tables().items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(begin)
        _, also, after = rest.partition(end)
        if not found or not also:
            raise SystemExit(f"docs/planning.md has no block {name}")
        text = f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
