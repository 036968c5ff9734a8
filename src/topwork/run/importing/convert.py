"""Conversions that several tools share: batches, optimizers, schedules, splits, targets."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from topwork.run.importing.records import Convert, Lacking, Needless, Put, Result

if TYPE_CHECKING:
    from topwork.run.importing.draft import Draft

A_DEVICE = "a device"
"""Stands in what is told of a batch that the number of devices multiplies."""
ADAMW = (
    "adamw",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_apex_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
)
IN_8_BITS = ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "ao_adamw_8bit")
PAGED = ("paged_adamw", "paged_adamw_32bit")
KERNELS = "how it is computed, not what: the fastest way that the machine has is taken here by itself"
DISTRIBUTED = "how a run is spread over devices, which decides no result; Topwork trains on one device"
LOGGING = "where metrics go; metrics.jsonl and the report are always written (training.report_to adds others)"
HUB = "nothing is uploaded while it trains; `topwork push` does that afterwards"
PRECISION = "adapters are held in float32 and multiplied in model.dtype here, in any case"
RECOMPUTED = "training.activation_checkpointing: auto keeps as much as fits into memory, with the same result"
NO_PADDING = "a batch never has padding here, packed or not"
LOADING = "how rows are read and prepared, which changes none; Topwork keeps no prepared copies"
PEFT_OF = "q_proj and v_proj are PEFT's choice for most families where no targets are given; see to it for others"


def batch(per_device: str, first: int, accumulation: str, second: int) -> Convert:
    """Sequences of an optimizer step: per device, times passes, times devices."""

    def convert(_: Any, draft: "Draft") -> Result:
        sizes = whole(draft.known(per_device, first)), whole(draft.known(accumulation, second)), draft.devices
        told = f"{sizes[0]} {A_DEVICE} x {_count(sizes[1], 'pass', 'es')} x {_count(sizes[2], 'device')}"
        return Put({"training.batch_size": sizes[0] * sizes[1] * sizes[2]}, told)

    return convert


def _count(count: int, name: str, more: str = "s") -> str:
    return f"{count} {name}{'' if count == 1 else more}"


def whole(value: Any) -> int:
    """A whole number; raises ValueError for what is none."""
    if isinstance(value, bool) or float(value) != int(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def optimizer(value: Any, _: "Draft") -> Result:
    """AdamW in its three forms; others are told, and AdamW is taken."""
    name = str(value).removeprefix("OptimizerNames.").lower()
    if name in ADAMW:
        return Put({"training.optim": "adamw"})
    if name in IN_8_BITS:
        return Put({"training.optim": "adamw_8bit"})
    if name == "paged_adamw_8bit":
        return Put({"training.optim": "paged_adamw_8bit"})
    if name in PAGED:
        return Put({"training.optim": "adamw"}, "the same weights; what is paged here is 8-bit (paged_adamw_8bit)")
    return Lacking(
        "there are adamw, adamw_8bit and paged_adamw_8bit here, and adamw is taken: its results differ, and so may the "
        "best learning rate"
    )


def schedule(value: Any, _: "Draft") -> Result:
    """The schedules here end at zero, or do not fall."""
    name = str(value).removeprefix("SchedulerType.").lower()
    if name in ("cosine", "linear"):
        return Put({"training.lr_scheduler_type": name})
    if name == "constant_with_warmup":
        return Put({"training.lr_scheduler_type": "constant"})
    if name == "constant":
        return Put({"training.lr_scheduler_type": "constant", "training.warmup_ratio": 0.0}, "it has no warm-up there")
    near = "cosine" if "cosine" in name else "linear" if name in ("polynomial", "inverse_sqrt") else "cosine"
    return Put({"training.lr_scheduler_type": near}, f"{name} has no equal; {near} is the nearest here")


def warmup(value: Any, draft: "Draft") -> Result:
    """A number of steps, or below 1 a share of them."""
    count = float(value)
    if draft.value("lr_scheduler_type") == "constant" or draft.value("lr_scheduler") == "constant":
        return Needless("a constant schedule has no warm-up there")
    if 0 < count < 1:
        return Put({"training.warmup_ratio": count})
    return Put({"training.warmup_steps": whole(count)})


def ratio(value: Any, draft: "Draft") -> Result:
    """A share of steps, where no number of them is given."""
    if draft.value("warmup_steps"):
        return Needless("warmup_steps goes before it")
    return warmup(value, draft) if 0 < float(value) < 1 else Put({"training.warmup_ratio": float(value)})


def steps(value: Any, _: "Draft") -> Result:
    """Optimizer steps; -1 and 0 mean none."""
    return Put({"training.max_steps": whole(value)}) if float(value) > 0 else Needless("no limit, as here")


def epochs(value: Any, draft: "Draft") -> Result:
    if float(draft.value("max_steps") or 0) > 0:
        return Needless("max_steps goes before it")
    return Put({"training.num_train_epochs": number_of(value)}) if float(value) > 0 else Lacking("there are no epochs")


def number_of(value: Any) -> float | int:
    """A number, whole where it is."""
    found = float(value)
    return int(found) if found.is_integer() else found


def every(ours: str) -> Convert:
    """Every so many steps. A share of the run has no equal: it is known when the rows have been counted."""

    def convert(value: Any, _: "Draft") -> Result:
        if float(value) <= 0:
            return Needless("never, which the whole run decides")
        if float(value) < 1:
            return Lacking(f"a share of the run; {ours} counts steps: left out, it validates ten times a run")
        return Put({ours: whole(value)})

    return convert


def fraction(value: Any, _: "Draft") -> Result:
    """A share that is held out; a number of rows has no equal."""
    if float(value) >= 1:
        return Lacking("a number of rows; data.eval_fraction is a share: name a file in data.eval")
    return Put({"data.eval_fraction": float(value)})


def optional(ours: str, note: str = "") -> Convert:
    """An option that is on where the value is, and off by itself."""
    return lambda value, _: Put({ours: True}, note) if value is True else Needless("off, as here")


def targets(value: Any, _: "Draft") -> Result:
    """Names of modules, a regular expression, or all linear layers."""
    if isinstance(value, str) and value.strip() in ("all", "all-linear", "all_linear"):
        return Put({"adapter.target_modules": "all-linear"})
    if isinstance(value, str) and re.fullmatch(r"\w+", value):
        value = [value]
    if value == ["all-linear"]:
        value = "all-linear"
    return Put({"adapter.target_modules": value}) if value else Needless("left empty, which is the tool's default")


def listed_targets(value: Any, draft: "Draft") -> Result:
    """As `targets`, with several names in one text between commas."""
    several = isinstance(value, str) and "," in value
    return targets([name.strip() for name in value.split(",")] if several else value, draft)


def names(ours: str) -> Convert:
    """A list of names, or several in one text."""

    def convert(value: Any, _: "Draft") -> Result:
        found = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
        return Put({ours: found}) if found else Needless("left empty, which is the tool's default")

    return convert


def starting(value: Any, _: "Draft") -> Result:
    """How LoRA's matrices begin, by PEFT's names."""
    if value is True or value == "true":
        return Needless("as PEFT does, as here")
    name = str(value).lower()
    if name in ("gaussian", "pissa", "olora", "loftq"):
        return Put({"adapter.init_lora_weights": name})
    if name.startswith("pissa_niter"):
        return Put({"adapter.init_lora_weights": "pissa"}, "by an exact decomposition, not one of so many iterations")
    return Lacking("there are gaussian, pissa, olora and loftq here, and PEFT's usual beginning, which is taken")


def biases(value: Any, _: "Draft") -> Result:
    """Which biases are trained beside A and B, by PEFT's names."""
    name = str(value).lower()
    if name in ("none", "false"):
        return Needless("no biases are trained, as here")
    if name in ("all", "lora_only"):
        return Put({"adapter.bias": name})
    return Lacking("bias is none, lora_only or all; none is taken")


def dtype(value: Any, _: "Draft") -> Result:
    """A data type by PyTorch's name."""
    name = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}.get(
        str(value).removeprefix("torch."), str(value).removeprefix("torch.")
    )
    if name in ("bfloat16", "float16", "float32", "auto"):
        return Put({"model.dtype": name})
    return Lacking("model.dtype is bfloat16, float16, float32 or auto; bfloat16 is taken")


def sinks(value: Any, _: "Draft") -> Result:
    """Where metrics go."""
    asked = [str(each).lower() for each in (value if isinstance(value, list) else [value])]
    known = [name for name in ("tensorboard", "wandb") if name in asked or "all" in asked]
    rest = [name for name in asked if name not in (*known, "none", "all", "null")]
    if rest:
        return Lacking(f"{', '.join(rest)}: training.report_to knows tensorboard and wandb; metrics.jsonl has them all")
    return Put({"training.report_to": known}) if known else Needless("metrics.jsonl has them all")


def off_is(wanted: Sequence[Any], why: str) -> Convert:
    """For keys of which some values are as here, and others have no equal."""
    return lambda value, _: Needless("as here") if value in wanted else Lacking(why)


def because(why: str) -> Convert:
    """For a key for which nothing has to be set, whatever its value."""
    return lambda *_: Needless(why)


def lacks(why: str) -> Convert:
    """For a key that has no equal, whatever its value."""
    return lambda *_: Lacking(why)


def sink(name: str) -> Convert:
    """A switch that sends metrics somewhere."""
    return lambda value, _: Put({"training.report_to": [name]}) if value else Needless("off, as here")


def switch(ours: str, value: Any) -> Convert:
    """A switch that is another value here."""
    return lambda on, _: Put({ours: value}) if on is True else Needless("off, as here")


def revision(value: Any, _: "Draft") -> Result:
    return Needless("main, as here") if value == "main" else Put({"model.revision": value})


def packed(sizes: str) -> Convert:
    """Packing: nothing to set, but the batch counts other things where it is on."""
    why = (
        f"a batch never has padding here. But packed, the batch counts sequences of {sizes} tokens that hold several "
        f"rows "
        f"each: for the same rows a step raise training.batch_size by {sizes} / the rows' mean length"
    )
    return lambda value, _: Needless(why if value is True else NO_PADDING)
