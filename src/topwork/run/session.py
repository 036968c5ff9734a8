"""A session: one loaded base and the adapters on it, to train on more than once and to ask afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topwork.adapters.graft import Adapters
from topwork.common.errors import RequestError
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.source import find_source
from topwork.models.weights import original_weight
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import packed_kinds, weight_bytes
from topwork.recipe.recipe import Recipe

Log = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """The base, its adapters by name, and the options that it was loaded by."""

    base: Base
    adapters: Adapters
    model: ModelConfig
    quantization: QuantizationConfig
    weight_bytes: int
    held_as: str

    def check(self, recipe: Recipe) -> None:
        """Raises RequestError where a recipe asks for another base."""
        if (self.model, self.quantization) != (recipe.model, recipe.quantization):
            raise RequestError(
                f"{recipe.output_dir} asks for {recipe.model.model_name_or_path}, and the base that is loaded is "
                f"{self.base.name} by other options of model or quantization; load the one that the recipe names"
            )


def open_session(recipe: Recipe, log: Log = print, tokenizer: PreTrainedTokenizerBase | None = None) -> Session:
    """Load the base that a recipe names, for `train_together(on=...)` and whatever asks it; `tokenizer` as in
    `load_base`."""
    base = load_base(recipe.model, log, recipe.quantization, tokenizer)
    weights, held_as = weight_bytes(base.module), _held_as(base)
    log(f"base weights: {weights / 2**20:,.0f} MiB, {held_as}")
    adapters = Adapters(base.module, base.tokenizer, _original(recipe.model, base))
    return Session(base, adapters, recipe.model, recipe.quantization, weights, held_as)


def _original(config: ModelConfig, base: Base) -> Callable[[str], Tensor]:
    """Reads a layer's weight as it was before it was quantized, once somebody asks (LoftQ)."""

    @cache
    def reader() -> Callable[[str], Tensor]:
        return original_weight(find_source(config, lambda _: None), base.module)

    return lambda path: reader()(path)


def _held_as(base: Base) -> str:
    """In which types the frozen base is held."""
    dense = str(base.module.dtype).removeprefix("torch.")
    kinds = [f"{count} layers in {kind}" for kind, count in packed_kinds(base.module).items()]
    return ", ".join([*kinds, f"the rest in {dense}"]) if kinds else f"in {dense}"
