"""What a recipe may say about the adapter. The names are PEFT's, and so are their meanings."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from topwork.common.options import Options

OWN_TARGETS = "own"
"""The modules that a method is meant for, where a recipe names none."""
OPTIONS_OF: dict[str, frozenset[str]] = {
    name: frozenset(options.split())
    for name, options in {
        "lora": "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern "
        "rank_pattern alpha_pattern use_rslora use_dora modules_to_save init_lora_weights trainable_token_indices",
        "ia3": "target_modules feedforward_modules exclude_modules layers_to_transform layers_pattern modules_to_save",
        "prefix": "num_virtual_tokens",
        "prompt": "num_virtual_tokens prompt_tuning_init prompt_tuning_init_text",
        "bitfit": "target_modules exclude_modules layers_to_transform layers_pattern",
        "full": "exclude_modules",
    }.items()
}
"""Method -> the options that say something to it."""


class AdapterConfig(Options):
    method: Literal["lora", "ia3", "prefix", "prompt", "bitfit", "full"] = "lora"
    """The adapter method. (`dora` is short for `lora` with `use_dora`.)"""
    r: int = Field(16, ge=1)
    """The rank: A is [r, in], B is [out, r]."""
    lora_alpha: float = Field(32, gt=0)
    """The update is scaled by lora_alpha / r (with rsLoRA by lora_alpha / sqrt(r))."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the output head), a list of module names or name endings, or a regular
    expression that must match a module's whole path. `own` are those that IA3 or BitFit is meant for."""
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
    use_dora: bool = False
    """DoRA: the length of each row of the weight is learned apart from its direction."""
    modules_to_save: list[str] | None = None
    """Modules trained whole beside the adapter and saved with it (`lm_head`, `embed_tokens`, a norm)."""
    trainable_token_indices: list[int] | None = None
    """Tokens whose embedding rows are trained (new special tokens, for one), and their rows in a tied head."""
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora", "loftq"] = True
    """How A and B begin. True: A Kaiming-uniform as in PEFT, B zero. `gaussian`: A normal with deviation 1/r. `pissa`
    and `olora`: the weight's largest singular directions or its first orthogonal ones, which the base then lacks.
    `loftq`: what quantizing the base lost."""
    feedforward_modules: str | list[str] | None = None
    """IA3: those of `target_modules` whose inputs are scaled, not their outputs. Left out: the MLP's last layers."""
    num_virtual_tokens: int = Field(20, ge=1)
    """Prefix and prompt tuning: how many learned tokens stand before the text."""
    prompt_tuning_init: Literal["random", "text", "vocabulary"] = "random"
    """Prompt tuning begins as noise, as the embeddings of `prompt_tuning_init_text`, or as those of random tokens."""
    prompt_tuning_init_text: str | None = None
    """What a prompt begins as with `prompt_tuning_init: text`; it is cut or repeated to `num_virtual_tokens`."""

    @model_validator(mode="before")
    @classmethod
    def _short_names(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("method") == "dora":
            return {**values, "method": "lora", "use_dora": True}
        return values

    @model_validator(mode="after")
    def _fits_its_method(self) -> Self:
        known = OPTIONS_OF[self.method]
        idle = sorted(self.model_fields_set - known - {"method"})
        changed = [
            name
            for name in idle
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} say{'s' if len(changed) == 1 else ''} nothing to method {self.method}, which "
                f"knows {', '.join(sorted(known))}; leave out what it does not know, or take another method"
            )
        if (self.prompt_tuning_init == "text") != (self.prompt_tuning_init_text is not None):
            raise ValueError("prompt_tuning_init: text and prompt_tuning_init_text need each other; give both")
        if self.use_dora and self.init_lora_weights in ("pissa", "olora", "loftq"):
            raise ValueError(
                f"use_dora begins from the base's own weights, not from {self.init_lora_weights}; take one"
            )
        return self

    @property
    def virtual_tokens(self) -> int:
        """How many positions of the context its learned tokens take before every text."""
        return self.num_virtual_tokens if self.method in ("prefix", "prompt") else 0

    @property
    def targets(self) -> str | list[str]:
        """`target_modules`, or the method's own where it has some and the recipe names none."""
        return (
            OWN_TARGETS
            if self.method in ("ia3", "bitfit") and self.target_modules == "all-linear"
            else self.target_modules
        )
