"""A plan for people: the verdict first, then memory by part, rows, time and cost, then what to change."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from topwork.plan.fits import Change
from topwork.plan.tokens import Tokens
from topwork.run.planning.compared import METHODS, Compared
from topwork.run.planning.place import gigabytes

if TYPE_CHECKING:
    from topwork.run.planning.planned import Planned

MOMENTS = {
    "loading": "while the base is read",
    "forward": "going forward",
    "loss": "at the loss",
    "backward": "going backward",
    "update": "at the optimizer's update",
    "saving": "while a checkpoint is saved",
}
WAVES_TOLD = 8
PARTS = {
    "weights": "base weights",
    "constants": "constants of packed weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations kept for going backward",
    "logits": "logits, a chunk of them",
    "scratch": "scratch of a layer",
    "allocator": "freed memory not given back",
    "process": "process: torch and the rest",
}


def text_of(plan: "Planned") -> str:
    """All of it."""
    parts = [
        _head(plan),
        verdict(plan),
        *_several(plan),
        "",
        *_memory(plan),
        "",
        *_pass(plan),
        *_data(plan),
        *_time(plan),
    ]
    if plan.changes:
        parts += ["", *_changes(plan.changes)]
    if plan.table:
        parts += ["", *_table(plan.table, plan.tokens is not None)]
    if plan.notes:
        parts += ["", *(f"note: {note}" for note in plan.notes)]
    return "\n".join(parts)


def verdict(plan: "Planned") -> str:
    """Whether it fits, in a line."""
    fit, of = plan.fit, plan.place.of
    if fit.fits:
        return f"fits: peak {gigabytes(plan.peak.bytes)} of the {of}, {MOMENTS[plan.peak.moment]}"
    when = MOMENTS[fit.peak.moment]
    short = gigabytes(fit.needed_bytes - plan.place.memory_bytes)
    return f"does not fit: it takes {gigabytes(fit.needed_bytes)} {when}, {short} more than the {of}"


def _head(plan: "Planned") -> str:
    recipe, structure = plan.recipe, plan.job.structure
    held = "4-bit " if recipe.quantization.load_in_4bit else "8-bit " if recipe.quantization.load_in_8bit else ""
    trained = plan.trained_parameters
    named = method_named(plan)
    if len(plan.job.recipes) > 1:
        named = f"{len(plan.job.recipes):,} members together (the first: {named})"
    return (
        f"{named} on {held}{recipe.model.model_name_or_path}: {_millions(trained)} of "
        f"{_millions(structure.parameters)} parameters are trained ({trained / structure.parameters:.2%})"
    )


def method_named(plan: "Planned") -> str:
    """`LoRA r 16`, as people call it."""
    adapter = plan.recipe.adapter
    r = getattr(adapter, "r", None)
    name = "DoRA" if getattr(adapter, "use_dora", False) else {
        "lora": "LoRA", "ia3": "IA3", "bitfit": "BitFit", "vera": "VeRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT",
    }.get(
        adapter.method, adapter.method
    )  # fmt: skip
    return "full fine-tuning" if adapter.method == "full" else f"{name} r {r}" if r else name


def _several(plan: "Planned") -> list[str]:
    """Which members of a sweep train together, and how long all take."""
    found = plan.several
    if found is None:
        return []
    if not plan.fits:
        lines = [f"sweep  {found.members:,} members, and this one does not fit, not even alone"]
    elif len(found.waves) == 1:
        lines = [f"sweep  {found.members:,} members, all in one wave"]
    else:
        sizes = ", ".join(f"{size:,}" for size in found.waves[:WAVES_TOLD]) + (" …" if found.waves[WAVES_TOLD:] else "")
        lines = [
            f"sweep  {found.members:,} members in {len(found.waves):,} waves of {sizes}: so many fit together; what "
            "follows is of one wave"
        ]
    if found.seconds is not None:
        money = "" if found.money is None else f", {dollars(found.money)}"
        lines.append(f"       about {duration(found.seconds)}{money} for all of them")
    return lines


def _millions(count: int) -> str:
    return f"{count / 10**9:,.2f} B" if count >= 10**9 else f"{count / 10**6:,.1f} M"


def _memory(plan: "Planned") -> list[str]:
    parts = {part: size for part, size in plan.peak.parts.items() if size >= 10**6}
    rows = [(PARTS[part], gigabytes(size)) for part, size in parts.items()]
    rows.append(("at the peak, in all", gigabytes(plan.peak.bytes)))
    others = ", ".join(f"{usage.moment} {gigabytes(usage.bytes)}" for usage in plan.moments)
    return [f"memory {MOMENTS[plan.peak.moment]}", *_aligned(rows), f"  by moment: {others}"]


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width, right = max(len(left) for left, _ in rows), max(len(right) for _, right in rows)
    return [f"  {name:{width}}  {value:>{right}}" for name, value in rows]


def _pass(plan: "Planned") -> list[str]:
    layers, every = plan.checkpointed_layers, plan.job.structure.checkpointable
    again = f"{layers} of {every} layers run again going backward" if layers else "no layer is checkpointed"
    chosen = "as the recipe says" if plan.recipe.training.tokens_per_pass else "the largest that fits"
    chosen = chosen if plan.fits or plan.recipe.training.tokens_per_pass else "the smallest that holds every sequence"
    lines = [f"pass   {plan.tokens_per_pass:,} tokens ({chosen}); {again}"]
    if plan.shape.tokens < plan.tokens_per_pass:
        full = gigabytes(plan.fit.peak.bytes)
        lines.append(f"       a step of these rows has {plan.shape.tokens:,} at most; a full pass would take {full}")
    return lines


def _data(plan: "Planned") -> list[str]:
    tokens = plan.tokens
    if tokens is None and plan.several is not None:
        return [f"data   members have rows of their own; the longest sequence has at most {plan.job.longest:,} tokens"]
    if tokens is None:
        return [f"data   none was counted: sequences of {plan.job.longest:,} tokens are assumed, all of them learned"]
    held = f", {tokens.held_out_rows:,} more are held out" if tokens.held_out_rows else ""
    return [
        f"data   {_about(tokens)}{tokens.rows:,} rows{held}; {_about(tokens)}{tokens.tokens:,} tokens an epoch, "
        f"{tokens.learned_share:.0%} of them learned",
        f"       lengths: half within {tokens.percentiles[50]:,}, 99 % within {tokens.percentiles[99]:,}, longest "
        f"{tokens.longest:,}",
        f"       {tokens.how()}",
    ]


def _about(tokens: Tokens) -> str:
    return "" if tokens.counted == "all" else "about "


def _time(plan: "Planned") -> list[str]:
    timing = plan.timing
    if timing is None:
        return ["time   not told: no speed is known; name a card with --device, and time and cost follow"]
    lines = []
    if timing.steps is not None:
        each = f"{plan.recipe.training.batch_size:,} rows"
        lines.append(
            f"steps  {timing.steps:,} of {each}, {_number(timing.epochs or 0)} epoch{'' if timing.epochs == 1 else 's'}"
        )
    speed = f"{timing.tokens_per_second:,.0f} tokens/s"
    if timing.steps is None:
        lines.append(f"time   about {duration(timing.cost.seconds)} for a million tokens, {speed}")
    else:
        each = duration(timing.cost.step_seconds)
        lines.append(f"time   about {duration(timing.cost.seconds)} ({each} a step, {speed})")
    lines.append(f"       by {timing.source}")
    if timing.cost.money is not None:
        price = plan.place.price_per_hour
        lines.append(f"cost   about {dollars(timing.cost.money)} at {dollars(price or 0)} an hour")
    return lines


def duration(seconds: float) -> str:
    """`0.38 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for limit, unit, name in ((120, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.2f} {name}" if value < 10 and name == "s" else f"{value:.3g} {name}"
    return f"{seconds / 86_400:,.3g} days"


def dollars(money: float) -> str:
    """In cents where that says something."""
    return f"${money:,.2f}" if money < 1000 else f"${money:,.0f}"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _changes(changes: Sequence[Change]) -> list[str]:
    fits = changes[-1].fits
    head = "what would make it fit" if fits else "nothing makes it fit; nearest come"
    rows = [(f"{change.key}: {written(change.value)}", change) for change in changes]
    width = max(len(line) for line, _ in rows)
    lines = [
        f"  {line:{width}}  saves {gigabytes(change.saved_bytes):>7}, then it needs {gigabytes(change.total_bytes):>7}"
        f"{': it fits' if change.fits else ''}\n  {'':{width}}  {change.says}"
        for line, change in rows
    ]
    return [f"{head}, the least harmful first, each with those above it:", *lines]


def written(value: object) -> str:
    """A value as a recipe has it."""
    if value is None:
        return "(left out)"
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n").removesuffix("...").strip()


def _table(rows: Sequence[Compared], whole: bool) -> list[str]:
    """A line for each device, the methods beside each other."""
    devices = list(dict.fromkeys(row.device for row in rows))
    cells = {(row.device, row.method): _cell(row) for row in rows}
    widths = [max(len(cells[device, method]) for device in devices) for method in METHODS]
    left = max(map(len, devices))
    what = "the run" if whole else "a million tokens"
    found = [f"time and cost of {what}, tokens of a pass in brackets; one card each:"]
    found.append(f"  {'':{left}}  " + "  ".join(f"{method:{width}}" for method, width in zip(METHODS, widths)))
    for device in devices:
        line = "  ".join(f"{cells[device, method]:{width}}" for method, width in zip(METHODS, widths))
        found.append(f"  {device:{left}}  {line}".rstrip())
    return found


def _cell(row: Compared) -> str:
    if not row.fits:
        return f"no: takes {gigabytes(row.needed_bytes)}"
    time = "" if row.seconds is None else duration(row.seconds)
    money = "" if row.money is None else f", {dollars(row.money)}"
    return f"{time}{money} ({row.tokens_per_pass:,})"
