"""What transformers and bitsandbytes make of a folder, and their packed weights as ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from topwork.ops.packed import Packed, Packed4bit, PackedInt8


def bitsandbytes() -> Any:
    """The package, or a skipped test."""
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference of this test")


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A folder through transformers' BitsAndBytesConfig of `options`; one that is packed already where there are none.

    In training mode: on CPUs with AVX-512 the evaluation mode of bitsandbytes packs the weights once more, for a
    product in bfloat16.
    """
    bitsandbytes()
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype) if options else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, attn_implementation="eager"
    )
    return model.train()


def their_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Their packed layers by path."""
    kinds = bitsandbytes().nn
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds.Linear4bit | kinds.Linear8bitLt)}


def as_packed(layer: Any, dtype: torch.dtype) -> Packed:
    """A packed weight of theirs in our class. `dtype` is the one it was packed from, which their int8 does not keep."""
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    if isinstance(layer, bitsandbytes().nn.Linear8bitLt):
        absmax = weight.SCB if weight.SCB is not None else layer.state.SCB
        return PackedInt8(weight.data, absmax, shape, dtype)
    state = weight.quant_state
    codes = weight.data.flatten().view(torch.uint8)
    nested = (state.state2.absmax, state.state2.code, float(state.offset)) if state.nested else (None, None, 0.0)
    return Packed4bit(codes, state.absmax, tuple(state.shape), state.dtype, state.quant_type, state.blocksize, *nested)


def differing(one: Packed, other: Packed) -> list[str]:
    """Names of the fields in which two packed weights are not equal, bit for bit."""
    if type(one) is not type(other):
        return ["type"]
    found = []
    for name, value in vars(one).items():
        given = getattr(other, name)
        if isinstance(value, Tensor) and isinstance(given, Tensor):
            same = value.dtype == given.dtype and torch.equal(value, given)
        else:
            same = value == given
        found += [] if same else [name]
    return found
