"""Ready experiments of `topwork sweep`: what each varies, and what it shows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from topwork.adapters.config import OWN_TARGETS, AdapterConfig
from topwork.adapters.methods import METHODS
from topwork.common.errors import RequestError, TopworkError
from topwork.plan.count import count_adapter, count_table
from topwork.recipe.grid import Axis, Variant, axis_values
from topwork.recipe.recipe import Recipe
from topwork.recipe.sweep_config import SweepRequest

RANKS = (2, 4, 8, 16, 32, 64)
SCALES = (0.25, 1, 4, 16, 64, 256)
SCALING_RANK = 16
LEARNING_RATES = "1e-5..1e-2*7"
TARGET_SETS = ("q,v", "q,k,v,o", "mlp", "all-linear")
LORAPLUS_RATIO = 16

RATES: dict[str, float] = {"ia3": 10, "prefix": 10, "prompt": 30, "full": 0.1}
"""A method's learning rate, as a multiple of the recipe's, which is meant for LoRA: the papers of the methods with few
parameters ask for much more, full fine-tuning for less."""
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"adapter.method": "lora"},
    "rslora": {"adapter.method": "lora", "adapter.use_rslora": True},
    "dora": {"adapter.method": "lora", "adapter.use_dora": True},
    "lora+": {"adapter.method": "lora", "training.loraplus_lr_ratio": LORAPLUS_RATIO},
    "pissa": {"adapter.method": "lora", "adapter.init_lora_weights": "pissa"},
    "olora": {"adapter.method": "lora", "adapter.init_lora_weights": "olora"},
    "ia3": {"adapter.method": "ia3"},
    "prefix": {"adapter.method": "prefix"},
    "prompt": {"adapter.method": "prompt"},
    "full": {"adapter.method": "full"},
}
"""What each of the methods sets beside a learning rate of its own."""
PLAIN: dict[str, dict[str, Any]] = {
    "lora": {
        "adapter.use_rslora": False, "adapter.use_dora": False, "adapter.init_lora_weights": True,
        "training.loraplus_lr_ratio": None,
    },
    "other": {"training.loraplus_lr_ratio": None},
}  # fmt: skip
"""What a recipe may have set and a method must begin without: LoRA in its plain form, and all others."""


@dataclass(frozen=True)
class Experiment:
    """A preset for one base: what it shows, the axis, and the variants left out with why."""

    name: str
    text: str
    axis: Axis
    left_out: tuple[str, ...] = ()


def experiment(name: str, request: SweepRequest, skeleton: PreTrainedModel) -> Experiment:
    """The ready experiment of this name on the request's base. Raises RequestError for a name that there is not, or
    where the base takes fewer than two of its variants."""
    if name not in PRESETS:
        raise RequestError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    made = PRESETS[name](request, skeleton)
    if len(made.axis.variants) < 2:
        raise RequestError(f"preset {name} needs two variants that the base can take; left out: {list(made.left_out)}")
    return made


def _rank(request: SweepRequest, _: PreTrainedModel) -> Experiment:
    scale = _scale(request.base())
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


def _targets(request: SweepRequest, skeleton: PreTrainedModel) -> Experiment:
    base = request.base()
    scale = _scale(base)
    rows = {row.target_set: row for row in count_table(skeleton, (1,), TARGET_SETS)}
    budget = rows["all-linear"].count.trainable * base.adapter.r
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


def _scaling(_request: SweepRequest, _: PreTrainedModel) -> Experiment:
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


def _learning_rate(_request: SweepRequest, _: PreTrainedModel) -> Experiment:
    rates = axis_values("training.learning_rate", LEARNING_RATES)
    variants = [Variant(rate, f"learning_rate-{rate:g}", {"training.learning_rate": rate}) for rate in rates]
    text = (
        f"Learning rate: {_listed(rates)}, evenly spaced in the logarithm. It shows the valley: too low and the run "
        "ends before it has learned, too high and it forgets or diverges. LoRA's best is often ten times that of full "
        "fine-tuning."
    )
    return Experiment("learning-rate", text, Axis("learning rate", tuple(variants)))


def _methods(request: SweepRequest, skeleton: PreTrainedModel) -> Experiment:
    base = request.base()
    variants, left_out, told = [], [], []
    for name, options in METHOD_OPTIONS.items():
        method = options["adapter.method"]
        rate = float(f"{base.training.learning_rate * RATES.get(method, 1.0):.6g}")
        changes = PLAIN["lora" if method == "lora" else "other"] | options | {"training.learning_rate": rate}
        if method == "ia3":
            changes["adapter.target_modules"] = OWN_TARGETS
        changes = {key: value for key, value in changes.items() if _known(key) or value}
        try:
            recipe = request.base(changes, f" as {name}")
            trained = _trained(skeleton, recipe)
        except TopworkError as error:
            left_out.append(f"{name}: {error}")
            continue
        variants.append(Variant(name, f"method-{name}", changes))
        told.append(f"{name} {trained:,} at {rate:g}")
    text = (
        "Methods: the same rows and steps for each, from the recipe's options where they apply to it. Trained "
        f"parameters and learning rate: {'; '.join(told)}. Learning rates are the recipe's for LoRA and its kin, "
        f"{', '.join(f'{factor:g} times that for {method}' for method, factor in RATES.items())}; "
        f"lora+ lets B learn at {LORAPLUS_RATIO} times A's, rslora scales by lora_alpha / sqrt(r). It shows what "
        "each method pays for its parameters; a fair choice between two needs each one's own best learning rate."
    )
    return Experiment("methods", text, Axis("method", tuple(variants)), tuple(left_out))


def _trained(skeleton: PreTrainedModel, recipe: Recipe) -> int:
    """What a method trains in this base. Raises AdapterError, RequestError where the base cannot take it."""
    config: AdapterConfig = recipe.adapter
    if config.method not in METHODS:
        raise RequestError(f"method {config.method} is not here")
    if recipe.quantization.active and config.method == "full":
        raise RequestError("a quantized base has no weights that could be trained whole")
    return count_adapter(skeleton, config).trainable


def _known(key: str) -> bool:
    section, _, name = key.partition(".")
    return name in Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def _scale(recipe: Recipe) -> float:
    return recipe.adapter.lora_alpha / recipe.adapter.r


def _listed(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


PRESETS: dict[str, Callable[[SweepRequest, PreTrainedModel], Experiment]] = {
    "rank": _rank, "targets": _targets, "scaling": _scaling, "learning-rate": _learning_rate, "methods": _methods,
}  # fmt: skip
"""Name -> the experiment on a base."""
