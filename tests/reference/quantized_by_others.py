"""Folders of small models, what transformers and bitsandbytes make of them, and their packed weights as ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from data.family_tokenizers import build_tokenizer
from reference.families import tiny_model
from topwork.ops.packed import Packed, Packed4bit, PackedInt8


def bitsandbytes() -> Any:
    """The package, or a skipped test."""
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference of this test")


def write_base(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **values: Any
) -> Path:
    """A random model with a tokenizer and a chat template, as a Hugging Face folder."""
    tokenizer = build_tokenizer("smollm2")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(family, vocab_size=len(tokenizer), **{**ends, **values}).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A folder through transformers' BitsAndBytesConfig of `options`; one that is packed already where there are none.

    Its packed layers are in training mode: to evaluate on CPUs with AVX-512 they would pack their weights once more,
    for a product in bfloat16, and int8 would quantize the activations as well.
    """
    bitsandbytes()
    from transformers import BitsAndBytesConfig

    config = {"quantization_config": BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)} if options else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **config).eval()
    for layer in their_layers(model).values():
        layer.train()
    return model


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


def with_our_layers(theirs: PreTrainedModel, ours: nn.Module) -> PreTrainedModel:
    """Their model with our packed layers in place of theirs: everything around them is the same."""
    for path in their_layers(theirs):
        theirs.set_submodule(path, ours.get_submodule(path))
    return theirs
