"""Which model families are written as GGUF, and how llama.cpp wants each: names, keys, rows and norms.

A family is a record of the table; what a config asks for beyond it is refused by name, because llama.cpp would read
the file all the same and answer with another model. Facts are llama.cpp's (`src/models`, `src/llama-model.cpp`); the
tests hold every family's logits to ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor

from topwork.common.errors import ModelError, did_you_mean
from topwork.export.gguf.package import gguf_package

Activation = Literal["silu", "gelu_pytorch_tanh"]


@dataclass(frozen=True)
class Family:
    """One of transformers' model types, as llama.cpp has it.

    architecture   llama.cpp's name for it
    pairs_rotary   it turns neighbouring rows of q and k together, where transformers turns row i with row i + D/2
    norm_offset    what is added to a norm's weight: transformers' gemma norms multiply by 1 + w, llama.cpp's by w
    activation     the only one that llama.cpp computes for it
    head           `any`, or `tied`: the embedding is the head, another is not read
    square         query heads × head size is taken to be the hidden size
    window_period  every how many layers one attends to everything, where the others slide; None: no layer slides
    fixed_scale    layers whose number makes the attention's scale hidden ÷ heads instead of the head size
    rope_types     rotary scalings that it reads
    biases         modules of which it reads a bias
    """

    architecture: str
    pairs_rotary: bool = False
    norm_offset: float = 0.0
    activation: Activation = "silu"
    head: Literal["any", "tied"] = "any"
    square: bool = False
    window_period: int | None = None
    fixed_scale: int | None = None
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    biases: tuple[str, ...] = ()


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Family(
    "llama", pairs_rotary=True, rope_types=("default", "linear", "yarn", "llama3"),
    biases=(*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"),
)  # fmt: skip
_PLAIN = ("default", "linear")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", square=True, biases=_QKV),
    "qwen3": Family("qwen3"),
    "gemma": Family(
        "gemma", norm_offset=1.0, activation="gelu_pytorch_tanh", head="tied", rope_types=_PLAIN
    ),
    "gemma2": Family(
        "gemma2", norm_offset=1.0, activation="gelu_pytorch_tanh", head="tied", window_period=2, fixed_scale=46,
        rope_types=("default",),
    ),
    "gemma3_text": Family(
        "gemma3", norm_offset=1.0, activation="gelu_pytorch_tanh", window_period=6, fixed_scale=62, rope_types=_PLAIN
    ),
    "phi3": Family("phi3", square=True, rope_types=("default", "longrope")),
}  # fmt: skip
"""By `model_type`. SmolLM2 is a llama."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json's values. Raises ModelError, with the list, where there is none."""
    model_type = str(config.get("model_type", ""))
    if model_type not in FAMILIES:
        raise ModelError(
            f"models of type {model_type!r} are not written as GGUF; those that are: {', '.join(FAMILIES)}"
            f"{did_you_mean(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]


def gguf_name(architecture: str, blocks: int, key: str) -> str:
    """llama.cpp's name for a checkpoint's key: `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`.

    `blocks` is the number of layers. Raises ModelError for a key that this architecture does not have.
    """
    name = _name_map(architecture, blocks).get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ModelError(
            f"the weight {key} has no place in a GGUF file of the architecture {architecture!r}; llama.cpp would not "
            "read it, so the model would be another one"
        )
    return str(name)


@lru_cache(maxsize=8)
def _name_map(architecture: str, blocks: int) -> Any:
    gguf = gguf_package()
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[architecture], blocks)


def rotary_heads(config: Mapping[str, Any], key: str) -> int | None:
    """How many heads the rows of this weight are `permuted` by; None where they stay as they are."""
    if not family_of(config).pairs_rotary:
        return None
    queries = int(config["num_attention_heads"])
    module = key.rpartition(".")[0].rpartition(".")[2]
    return {"q_proj": queries, "k_proj": int(config.get("num_key_value_heads") or queries)}.get(module)


def permuted(rows: Tensor, heads: int) -> Tensor:
    """[heads · D, …] with the two halves of each head's D rows interleaved: row i of a head goes to 2i, row i + D/2 to
    2i + 1. For q and k of families that pair neighbouring rows: weights, biases, and the B of a LoRA (never its A)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)
