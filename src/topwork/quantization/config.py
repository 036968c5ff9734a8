"""What a recipe may say about holding the frozen base in fewer bits. Names are transformers', defaults are QLoRA's."""

from typing import Literal

from pydantic import Field, model_validator

from topwork.common.options import Options

FOUR_BIT_ONLY = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "block_size")
QUANTIZED_ONLY = ("head", "llm_int8_skip_modules")


class QuantizationConfig(Options):
    load_in_4bit: bool = False
    """Hold every linear layer but the head in 4 bits, packed while the base is read (QLoRA)."""
    load_in_8bit: bool = False
    """The same in int8, one constant per row; activations stay as they are."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """NF4's codes are the quantiles of a normal distribution, as weights have it; FP4's are a small float's."""
    bnb_4bit_use_double_quant: bool = True
    """Hold the block constants in 8 bits too: 4.127 bits a parameter and not 4.5."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Values that share a constant, of 4-bit types."""
    head: Literal["16bit", "int8", "nf4"] = "16bit"
    """The output head's type. An embedding that is tied to it is the same weight, and is read from it."""
    llm_int8_skip_modules: list[str] = Field(default_factory=list)
    """Names or name endings of linear layers that stay in model.dtype."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "QuantizationConfig":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; give one of them")
        for names, fits, needed in (
            (FOUR_BIT_ONLY, self.load_in_4bit, "load_in_4bit"),
            (QUANTIZED_ONLY, self.active, "load_in_4bit or load_in_8bit"),
        ):
            idle = [name for name in names if not fits and self._says_more(name)]
            if idle:
                raise ValueError(
                    f"{idle[0]}: {getattr(self, idle[0])} goes with {needed}; give that too, or leave it out"
                )
        return self

    def _says_more(self, name: str) -> bool:
        """Whether an option differs from its default."""
        return getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)

    @property
    def active(self) -> bool:
        """Whether anything is quantized."""
        return self.load_in_4bit or self.load_in_8bit
