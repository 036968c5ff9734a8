"""What a recipe may say about the adapter: for each method a class of options. The names are PEFT's, and so are their
meanings. Free of torch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from topwork.common.errors import AdapterError, did_you_mean
from topwork.common.options import Options

OWN_TARGETS = "own"
"""The modules that a method is meant for, where a recipe names none."""
PEFT_TARGETS = "peft"
"""The modules that PEFT takes where a config names none."""


def _with_method(schema: dict[str, Any], model: type["AdapterConfig"]) -> None:
    """In the JSON schema, options without a `method` are LoRA's alone."""
    if model is not LoraConfig:
        schema.setdefault("required", []).append("method")


class AdapterConfig(Options):
    """Any method's options, and what the rest of the house asks of them without knowing the method.

    `AdapterConfig(method="ia3")` makes an Ia3Config, and without a method a LoraConfig. An option that belongs to
    another method raises ValueError, unless it has its default.
    """

    model_config = ConfigDict(json_schema_extra=_with_method)

    method: str
    """The adapter method."""
    init_from: str | None = None
    """Train on: a run's folder, any PEFT folder or an id on the Hub, with whose weights the adapter begins. Options
    left out are taken from there, and those given have to agree, but for dropout; steps and rows are new, and the
    optimizer is, unless `training.init_optimizer` takes that of the run along."""

    def __new__(cls, **options: Any) -> Self:
        return super().__new__(_kind(options) if cls is AdapterConfig else cls)  # type: ignore[return-value]

    if TYPE_CHECKING:  # which options there are depends on the method

        def __init__(self, **options: Any) -> None: ...

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_method(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if cls is AdapterConfig and isinstance(values, dict):
            return _kind(values).model_validate(values)  # type: ignore[return-value]
        return validate(values)

    @model_validator(mode="before")
    @classmethod
    def _without_idle(cls, values: Any) -> Any:
        """Leaves out what belongs to other methods and has its default: older runs wrote out all methods' options."""
        if not isinstance(values, dict):
            return values
        known = cls.model_fields.keys()
        others = [kind.model_fields for kind in CONFIGS.values()]
        idle = {
            name: [fields[name].get_default(call_default_factory=True) for fields in others if name in fields]
            for name in sorted(values)
            if name not in known and any(name in fields for fields in others)
        }
        changed = [name for name, defaults in idle.items() if values[name] not in defaults]
        if changed:
            own = sorted(known - {"method", "init_from"})
            raise ValueError(
                f"{', '.join(changed)} say{'s' if len(changed) == 1 else ''} nothing to method "
                f"{cls.model_fields['method'].default}, which knows {', '.join(own)}; leave out what it does not know, "
                f"or take another method{did_you_mean(changed[0], own, limit=1)}"
            )
        return {name: value for name, value in values.items() if name not in idle}

    @property
    def virtual_tokens(self) -> int:
        """How many positions of the context its learned tokens take before every text."""
        return 0

    @property
    def dropout(self) -> float:
        """What share of its input's values drops out while it trains."""
        return 0.0

    @property
    def runs_plain(self) -> bool:
        """Whether its layers run as plain modules while it trains, fast ones too."""
        return False

    @property
    def saved_modules(self) -> Sequence[str]:
        """Names of the modules that are trained whole beside it."""
        return ()

    @property
    def has_b(self) -> bool:
        """Whether there are B matrices, for which LoRA+ has a learning rate of their own."""
        return False

    @property
    def keeps_beginnings(self) -> bool:
        """Whether it holds what its tensors began as, too, as many values as it trains."""
        return False

    @property
    def needs_quantized(self) -> bool:
        """Whether it begins from what quantizing the base lost."""
        return False


class Excluding(AdapterConfig):
    """For methods that go into many modules."""

    exclude_modules: str | list[str] | None = None
    """Names, endings or a regular expression of modules left out of those that are chosen."""


class Targeted(Excluding):
    """For methods that go into the modules that a recipe names."""

    own_targets: ClassVar[bool] = False
    """Whether the method is meant for modules of its own, which `all-linear` then stands for."""

    target_modules: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the output head), a list of module names or name endings, or a regular
    expression that must match a module's whole path; one plain name is a list of one. `own` are those that IA3 or
    BitFit is meant for, `peft` those that PEFT takes by the family where a config names none."""
    layers_to_transform: int | list[int] | None = None
    """Only these layers (counted from 0)."""
    layers_pattern: str | list[str] | None = None
    """The name of the list of layers, where it is not found by itself (`layers`, `h`, `blocks` …)."""

    @property
    def targets(self) -> str | list[str]:
        """`target_modules`, or the method's own where it has some and the recipe names none."""
        return OWN_TARGETS if self.own_targets and self.target_modules == "all-linear" else self.target_modules


class Saving(AdapterConfig):
    """For methods beside which modules may be trained whole."""

    modules_to_save: list[str] | None = None
    """Modules trained whole beside the adapter and saved with it (`lm_head`, `embed_tokens`, a norm)."""

    @property
    def saved_modules(self) -> Sequence[str]:
        return self.modules_to_save or ()


class VirtualConfig(AdapterConfig):
    """For methods whose learned tokens stand before the text."""

    num_virtual_tokens: int = Field(20, ge=1)
    """How many learned tokens stand before the text."""

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens


class LoraConfig(Saving, Targeted):
    method: Literal["lora", "dora"] = "lora"
    """Low-rank updates of linear layers. (`dora` is short for `lora` with `use_dora`.)"""
    r: int = Field(16, ge=1)
    """The rank: A is [r, in], B is [out, r]."""
    lora_alpha: float = Field(32, gt=0, allow_inf_nan=False)
    """The update is scaled by lora_alpha / r (with rsLoRA by lora_alpha / sqrt(r))."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training."""
    target_parameters: list[str] | None = None
    """Raw parameters that get a LoRA beside `target_modules`, by whole paths or endings: `experts.gate_up_proj`,
    `experts.down_proj`, a router's `gate.weight`. Where PEFT's `all-linear` means experts too (Mixtral, Qwen3-MoE,
    OLMoE, DeepSeek …), so does ours. They train without dropout. `target_modules: []` leaves all modules out."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Other ranks for some modules: {name ending or regular expression: r}. Of several that match one module the first
    counts."""
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """Other alphas for some modules: {name ending or regular expression: lora_alpha}; the first that matches counts."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r), which keeps the update's size the same for every rank."""
    use_dora: bool = False
    """DoRA: the length of each row of the weight is learned apart from its direction."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases trained beside A and B, where the base has some: those of the target modules (`lora_only`), or those of
    every linear layer and norm (`all`)."""
    lora_bias: bool = False
    """B has a bias of its own. Such an adapter is merged only where its modules have a bias that can hold it."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose embedding rows are trained, and their rows in a tied head: a list of ids; or lists by module
    (`{embed_tokens: [5], lm_head: [5]}`), which have to be alike where the head is tied. Those of `model.new_tokens`
    are trained without being named here."""
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora", "loftq"] = True
    """How A and B begin. True: A Kaiming-uniform as in PEFT, B zero. `gaussian`: A normal with deviation 1/r. `pissa`
    and `olora`: the weight's largest singular directions or its first orthogonal ones, which the base then lacks.
    `loftq`: what quantizing the base lost."""

    @model_validator(mode="before")
    @classmethod
    def _short_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("method") == "dora":
            return {**values, "method": "lora", "use_dora": True}
        return values

    @model_validator(mode="after")
    def _begins_in_one_way(self) -> Self:
        biased = self.bias != "none" or self.lora_bias
        if biased and self.init_lora_weights in ("pissa", "olora", "loftq"):
            raise ValueError(
                f"bias and lora_bias go with init_lora_weights: true, not {self.init_lora_weights}; take one"
            )
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias goes with plain LoRA: DoRA's lengths are of weights alone; take one")
        if self.use_dora and self.init_lora_weights in ("pissa", "olora", "loftq"):
            raise ValueError(
                f"use_dora begins from the base's own weights, not from {self.init_lora_weights}; take one"
            )
        return self

    @property
    def trained_tokens(self) -> int:
        """How many tokens' rows are trained."""
        named = self.trainable_token_indices or []
        return max(map(len, named.values()), default=0) if isinstance(named, dict) else len(named)

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def runs_plain(self) -> bool:
        return self.use_dora and (self.lora_dropout > 0 or self.bias != "none")

    @property
    def has_b(self) -> bool:
        return True

    @property
    def keeps_beginnings(self) -> bool:
        return self.init_lora_weights in ("pissa", "olora")

    @property
    def needs_quantized(self) -> bool:
        return self.init_lora_weights == "loftq"


class Ia3Config(Saving, Targeted):
    own_targets = True

    method: Literal["ia3"] = "ia3"
    """Learned vectors times keys, values and what the MLP's last layers are given."""
    feedforward_modules: str | list[str] | None = None
    """Those of `target_modules` whose inputs are scaled, not their outputs. Left out: the MLP's last layers."""


class VeraConfig(Saving, Targeted):
    method: Literal["vera"] = "vera"
    """LoRA whose matrices are random and shared by all layers; only two vectors at each are learned."""
    r: int = Field(256, ge=1)
    """The rank of the shared matrices. Higher than LoRA's, as a rank costs one learned number a layer."""
    vera_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training."""
    d_initial: float = 0.1
    """What the ranks' vector begins as."""
    projection_prng_key: int = 0
    """The seed of the shared matrices."""
    save_projection: bool = True
    """Whether the shared matrices are in the file, too; without them they are drawn again by their seed."""

    @property
    def dropout(self) -> float:
        return self.vera_dropout


class LohaConfig(Saving, Targeted):
    method: Literal["loha"] = "loha"
    """The elementwise product of two low-rank updates, of rank r * r."""
    r: int = Field(8, ge=1)
    """The rank of each of the two."""
    alpha: float = Field(8, gt=0)
    """The update is scaled by alpha / r."""


class LokrConfig(Saving, Targeted):
    method: Literal["lokr"] = "lokr"
    """The Kronecker product of two small matrices."""
    r: int = Field(8, ge=1)
    """The rank of the larger matrix, where its sides are longer than twice that."""
    alpha: float = Field(8, gt=0)
    """The update is scaled by alpha / r."""
    decompose_both: bool = False
    """Whether the smaller matrix may be of rank r too."""
    decompose_factor: int = Field(-1, ge=-1)
    """The smaller matrix's sides, where these divide the layer's; -1: nearly as long as the larger one's."""


class OftConfig(Saving, Targeted):
    method: Literal["oft"] = "oft"
    """What a layer is given is turned, block by block, by learned rotations."""
    r: int = Field(0, ge=0)
    """How many blocks a layer's inputs are cut into; 0: by `oft_block_size`."""
    oft_block_size: int = Field(32, ge=0)
    """Inputs in a block; 0: by `r`. What does not divide the inputs gives way to the nearest that does."""
    block_share: bool = False
    """One rotation for all blocks of a layer."""
    coft: bool = False
    """Rotations stay near the identity, by `eps`."""
    eps: float = Field(6e-5, gt=0)
    """How far with `coft`."""
    use_cayley_neumann: bool = True
    """A rotation by the first terms of its series, faster and nearly orthogonal, in the place of an inverse."""
    num_cayley_neumann_terms: int = Field(5, ge=1)
    """How many terms."""

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        by_number = bool(values.get("r"))
        if by_number and values.get("oft_block_size"):
            raise ValueError("r and oft_block_size say the same in two ways; give one of them, and leave the other out")
        return {**values, "oft_block_size": 0} if by_number else values

    @property
    def runs_plain(self) -> bool:
        return True


class PrefixConfig(VirtualConfig):
    method: Literal["prefix"] = "prefix"
    """Learned keys and values of all layers before the text."""


class PromptConfig(VirtualConfig):
    method: Literal["prompt"] = "prompt"
    """Learned embeddings before the text."""
    prompt_tuning_init: Literal["random", "text", "vocabulary"] = "random"
    """A prompt begins as noise, as the embeddings of `prompt_tuning_init_text`, or as those of random tokens."""
    prompt_tuning_init_text: str | None = None
    """What a prompt begins as with `prompt_tuning_init: text`; it is cut or repeated to `num_virtual_tokens`."""

    @model_validator(mode="after")
    def _text_for_text(self) -> Self:
        if (self.prompt_tuning_init == "text") != (self.prompt_tuning_init_text is not None):
            raise ValueError("prompt_tuning_init: text and prompt_tuning_init_text need each other; give both")
        return self


class BitFitConfig(Targeted):
    own_targets = True

    method: Literal["bitfit"] = "bitfit"
    """Biases alone."""


class FullConfig(Excluding):
    method: Literal["full"] = "full"
    """Full fine-tuning: a copy of every module."""


class ReadOnlyConfig(Saving, Targeted):
    """For PEFT's methods that are read, run, merged and served, but not begun: no recipe names it."""

    method: Literal["readonly"] = "readonly"
    """Another of PEFT's methods."""
    peft_type: str
    """Which, as PEFT calls it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What its adapter_config.json says of it."""


Choice = (
    LoraConfig | Ia3Config | VeraConfig | LohaConfig | LokrConfig | OftConfig
    | PrefixConfig | PromptConfig | BitFitConfig | FullConfig
)  # fmt: skip
"""A new method's options stand here too."""
CONFIGS: dict[str, type[AdapterConfig]] = {
    method: kind for kind in get_args(Choice) for method in get_args(kind.model_fields["method"].annotation)
}
"""Method -> its options, short names too."""


def _kind(options: Mapping[str, Any]) -> type[AdapterConfig]:
    method = options.get("method", "lora")
    if not isinstance(method, str) or method not in CONFIGS:
        raise AdapterError(
            f"there is no method {method!r}; there are {', '.join(CONFIGS)}{did_you_mean(str(method), CONFIGS)}"
        )
    return CONFIGS[method]


def _named(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    _kind(values)  # AdapterError in words of our own
    return {"method": "lora", **values}


AnyAdapterConfig = Annotated[Choice, Field(discriminator="method"), BeforeValidator(_named)]
"""A recipe's section `adapter`: the options of one method, told apart by `method`."""
