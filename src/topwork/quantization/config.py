"""What a recipe may say about holding the frozen base in fewer bits. Names are transformers', defaults are QLoRA's."""

from typing import Literal

from pydantic import Field, model_validator

from topwork.common.options import Options


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
        if self.head != "16bit" and not (self.load_in_4bit or self.load_in_8bit):
            raise ValueError(f"head: {self.head} goes with load_in_4bit or load_in_8bit; give one of them too")
        return self

    @property
    def active(self) -> bool:
        """Whether anything is quantized."""
        return self.load_in_4bit or self.load_in_8bit
