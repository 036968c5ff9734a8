"""What a recipe may say about the adapter. The names are PEFT's, and so are their meanings."""

from typing import Literal

from pydantic import Field

from topwork.common.options import Options


class AdapterConfig(Options):
    method: Literal["lora"] = "lora"
    """The adapter method."""
    r: int = Field(16, ge=1)
    """The rank: A is [r, in], B is [out, r]."""
    lora_alpha: float = Field(32, gt=0)
    """The update is scaled by lora_alpha / r (with rsLoRA by lora_alpha / sqrt(r))."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the output head), a list of module names or name endings, or a regular
    expression that must match a module's whole path."""
    exclude_modules: str | list[str] | None = None
    """Names, endings or a regular expression of modules left out of `target_modules`."""
    layers_to_transform: int | list[int] | None = None
    """Only these layers (counted from 0)."""
    layers_pattern: str | list[str] | None = None
    """The name of the list of layers, where it is not found by itself (`layers`, `h`, `blocks` …)."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for some modules: {name ending or regular expression: r}."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Other alphas for some modules: {name ending or regular expression: lora_alpha}."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r), which keeps the update's size the same for every rank."""
    modules_to_save: list[str] | None = None
    """Modules trained whole beside the adapter and saved with it (`lm_head`, `embed_tokens`, a norm)."""
    init_lora_weights: Literal[True, "gaussian"] = True
    """How A begins: True is Kaiming-uniform as in PEFT, `gaussian` is normal with deviation 1/r. B begins at zero."""
