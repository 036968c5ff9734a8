"""After a training on a quantized base: the weights that it multiplied, one at a time, are the loaded model's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from adapters.sheet import lora
from merging.streams import assert_same, grafted, loaded, source, trained
from reference.quantized_by_others import write_base
from topwork.merging.merge import dequantize, merge
from topwork.merging.stream import merged_lazily
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.lazy import in_type, open_lazily
from topwork.models.lazy_packed import as_trained
from topwork.models.lazy_writing import write_lazily
from topwork.models.load import load_base
from topwork.models.skeleton import skeleton
from topwork.quantization.config import QuantizationConfig

WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "fp4, plain constants": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "block_size": 32, "bnb_4bit_use_double_quant": False
    },
    "int8": {"load_in_8bit": True},
    "nf4, some skipped": {"load_in_4bit": True},
    "nf4, int8 head": {"load_in_4bit": True, "head": "int8"},
    "int8, nf4 head": {"load_in_8bit": True, "head": "nf4"},
}  # fmt: skip


MLP = ["gate_proj", "up_proj", "down_proj"]


def read(folder: Path, wanted: QuantizationConfig, dtype: str) -> Base:
    config = ModelConfig.model_validate({"model_name_or_path": str(folder), "dtype": dtype, "device": "cpu"})
    return load_base(config, lambda _: None, wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("family", "tied", "dtype"), [("llama", True, "bfloat16"), ("llama", False, "float32"), ("gpt2", True, "bfloat16")]
)
def test_merged_onto_the_very_weights_of_training(
    way: str, family: str, tied: bool, dtype: str, tmp_path: Path
) -> None:
    if family == "gpt2" and "head" in way:
        pytest.skip("its head is not quantized here")
    folder = write_base(tmp_path / "base", family, torch.bfloat16, "60kB", tie_word_embeddings=tied)
    skipped = {"llm_int8_skip_modules": ["c_proj" if family == "gpt2" else "down_proj"]} if "skipped" in way else {}
    wanted, kind = QuantizationConfig.model_validate(WAYS[way] | skipped), getattr(torch, dtype)
    base = read(folder, wanted, dtype)
    saved = trained(base, tmp_path / "adapter", lora())
    bare = skeleton(AutoConfig.from_pretrained(folder), dtype=kind)
    held = as_trained(in_type(open_lazily(source(folder)), bare, kind), bare, wanted)
    merge(base, grafted(base, saved), "a")
    (tmp_path / "out").mkdir()
    write_lazily(merged_lazily(held, bare, saved), tmp_path / "out")
    assert_same(loaded(tmp_path / "out", kind).state_dict(), base.module.state_dict())


def test_what_is_not_packed_stays_what_it_is(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    bare = skeleton(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model = open_lazily(source(folder))
    held = as_trained(model, bare, QuantizationConfig(load_in_4bit=True, llm_int8_skip_modules=MLP))
    changed = {
        key for key, tensor in model.tensors.items() if not torch.equal(tensor.fetch(), held.tensors[key].fetch())
    }
    base = read(folder, QuantizationConfig(load_in_4bit=True, llm_int8_skip_modules=MLP), "float32")
    dequantize(base.module)
    assert changed
    assert all(".self_attn." in key for key in changed)
    assert all(torch.equal(tensor.fetch(), base.module.state_dict()[key]) for key, tensor in held.tensors.items())
