"""Ready experiments of `topwork sweep`: what each varies, and what it shows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from topwork.adapters.config import LoraConfig
from topwork.adapters.methods.lora.method import LORAPLUS_RATIO
from topwork.adapters.methods.table import METHODS
from topwork.common.errors import RequestError, TopworkError
from topwork.models.structure import Structure
from topwork.plan.count import count_adapter, count_table
from topwork.recipe.grid import Axis, Variant, axis_values
from topwork.recipe.recipe import Recipe
from topwork.recipe.sweep_config import SweepRequest

RANKS = (2, 4, 8, 16, 32, 64)
SCALES = (0.25, 1, 4, 16, 64, 256)
SCALING_RANK = 16
LEARNING_RATES = "1e-5..1e-2*7"
TARGET_SETS = ("q,v", "q,k,v,o", "mlp", "all-linear")


@dataclass(frozen=True)
class Experiment:
    """A preset for one base: what it shows, the axis, and the variants left out with why."""

    name: str
    text: str
    axis: Axis
    left_out: tuple[str, ...] = ()


def experiment(name: str, request: SweepRequest, structure: Structure) -> Experiment:
    """The ready experiment of this name on the request's base. Raises RequestError for a name that there is not, or
    where the base takes fewer than two of its variants."""
    if name not in PRESETS:
        raise RequestError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    made = PRESETS[name](request, structure)
    if len(made.axis.variants) < 2:
        raise RequestError(f"preset {name} needs two variants that the base can take; left out: {list(made.left_out)}")
    return made


def _rank(request: SweepRequest, _: Structure) -> Experiment:
    adapter = _lora(request)
    scale = adapter.lora_alpha / adapter.r
    variants = [
        Variant(r, f"r-{r}", {"adapter.r": r, "adapter.lora_alpha": r * scale, "adapter.use_rslora": False})
        for r in RANKS
    ]
    text = (
        f"Rank: how many directions of each weight may change. Ranks {_listed(RANKS)}, with lora_alpha / r held at "
        f"{scale:g} so that the update's scale stays and the rank alone differs. It shows how small a rank is enough: "
        "most tasks are learned at a low one, and memory, file and time grow with it."
    )
    return Experiment("rank", text, Axis("r", tuple(variants)))


def _targets(request: SweepRequest, structure: Structure) -> Experiment:
    adapter = _lora(request)
    scale = adapter.lora_alpha / adapter.r
    rows = {row.target_set: row for row in count_table(structure, (1,), TARGET_SETS)}
    budget = rows["all-linear"].count.trainable * adapter.r
    variants, told = [], []
    for name, row in rows.items():
        r = max(1, round(budget / row.count.trainable))
        modules = row.target_modules if isinstance(row.target_modules, str) else list(row.target_modules)
        changes = {
            "adapter.target_modules": modules, "adapter.r": r, "adapter.lora_alpha": r * scale,
            "adapter.use_rslora": False,
        }  # fmt: skip
        variants.append(Variant(name, f"targets-{name.replace(',', '')}", changes))
        told.append(f"{name} at r {r} ({row.count.trainable * r:,} parameters)")
    missing = tuple(f"{name}: this family has no such layers" for name in TARGET_SETS if name not in rows)
    text = (
        f"Targets: where the same number of trained parameters does most. {'; '.join(told)}; lora_alpha / r is "
        f"{scale:g} in all. It shows whether few layers at a high rank or all at a low one learn better."
    )
    return Experiment("targets", text, Axis("targets", tuple(variants)), missing)


def _scaling(_request: SweepRequest, _: Structure) -> Experiment:
    variants = [
        Variant(
            scale,
            f"scale-{scale:g}",
            {"adapter.r": SCALING_RANK, "adapter.lora_alpha": SCALING_RANK * scale, "adapter.use_rslora": False},
        )
        for scale in SCALES
    ]
    text = (
        f"Scaling: the update is multiplied by lora_alpha / r. {_listed(SCALES)} at r {SCALING_RANK}, all at the "
        "recipe's learning rate. It shows what goes wrong at the ends: too small, and little is learned in the steps "
        "there are; too large, and steps overshoot until the loss is unsteady or runs away."
    )
    return Experiment("scaling", text, Axis("alpha/r", tuple(variants)))


def _learning_rate(_request: SweepRequest, _: Structure) -> Experiment:
    rates = axis_values("training.learning_rate", LEARNING_RATES)
    variants = [Variant(rate, f"learning_rate-{rate:g}", {"training.learning_rate": rate}) for rate in rates]
    text = (
        f"Learning rate: {_listed(rates)}, evenly spaced in the logarithm. It shows the valley: too low and the run "
        "ends before it has learned, too high and it forgets or diverges. LoRA's best is often ten times that of full "
        "fine-tuning."
    )
    return Experiment("learning-rate", text, Axis("learning rate", tuple(variants)))


def _methods(request: SweepRequest, structure: Structure) -> Experiment:
    base = request.base()
    presets = {name: (method, preset) for method in METHODS for name, preset in METHODS[method].presets.items()}
    variants, left_out, told = [], [], []
    for name, (method, preset) in presets.items():
        rate = float(f"{base.training.learning_rate * preset.rate:.6g}")
        plain = {"adapter.method": method, "training.learning_rate": rate, "training.loraplus_lr_ratio": None}
        changes = plain | dict(preset.changes)
        try:
            recipe = request.base(changes, f" as {name}")
            trained = _trained(structure, recipe)
        except TopworkError as error:
            left_out.append(f"{name}: {error}")
            continue
        variants.append(Variant(name, f"method-{name}", changes))
        told.append(f"{name} {trained:,} at {rate:g}")
    rates = {name: preset.rate for name, (_, preset) in presets.items() if preset.rate != 1}
    text = (
        "Methods: the same rows and steps for each, from the recipe's options where they apply to it. Trained "
        f"parameters and learning rate: {'; '.join(told)}. Learning rates are the recipe's for LoRA and its kin, "
        f"{', '.join(f'{rate:g} times that for {name}' for name, rate in rates.items())}; "
        f"lora+ lets B learn at {LORAPLUS_RATIO} times A's, rslora scales by lora_alpha / sqrt(r). It shows what "
        "each method pays for its parameters; a fair choice between two needs each one's own best learning rate."
    )
    return Experiment("methods", text, Axis("method", tuple(variants)), tuple(left_out))


def _trained(structure: Structure, recipe: Recipe) -> int:
    """What a method trains in this base. Raises AdapterError, RequestError where the base cannot take it."""
    if recipe.quantization.active and recipe.adapter.method == "full":
        raise RequestError("a quantized base has no weights that could be trained whole")
    return count_adapter(structure, recipe.adapter).trainable


def _lora(request: SweepRequest) -> LoraConfig:
    """The recipe's adapter, for presets that vary a LoRA. Raises RequestError where it is none."""
    adapter = request.base().adapter
    if not isinstance(adapter, LoraConfig):
        raise RequestError(
            f"this preset varies LoRA's options, and the recipe's adapter is of method {adapter.method}; take method "
            "lora, or preset learning-rate or methods"
        )
    return adapter


def _listed(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


PRESETS: dict[str, Callable[[SweepRequest, Structure], Experiment]] = {
    "rank": _rank, "targets": _targets, "scaling": _scaling, "learning-rate": _learning_rate, "methods": _methods,
}  # fmt: skip
"""Name -> the experiment on a base."""
