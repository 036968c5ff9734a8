"""The same weights as llama.cpp reads them: a Llama as GGUF, and LoRA adapters beside it."""

import json
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

FILE_TYPES = {Kind.F32: 0, Kind.BF16: 32, Kind.F16: 1, Kind.Q4_0: 2}
"""llama.cpp's numbers for a file by the type of most of its weights."""
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_model(path: Path, model: PreTrainedModel, like: Path, kind: Kind, head: Kind) -> Path:
    """The model's weights as `kind`, its embeddings (which are its head) as `head`, norms in fp32; all keys, the
    tokenizer among them, as the file `like` has them."""
    found = gguf.GGUFReader(like)
    writer = gguf.GGUFWriter(path, "llama")
    for field in found.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(FILE_TYPES[kind])
    known = {tensor.name for tensor in found.tensors}
    for name, weight in model.state_dict().items():
        called = _name(name)
        if called not in known:
            if name == "lm_head.weight":  # tied
                continue
            raise ValueError(f"{name} has no place in {like.name}")
        values = _laid(name, weight.float(), model.config).numpy()
        own = Kind.F32 if values.ndim == 1 else head if called == "token_embd.weight" else kind
        writer.add_tensor(called, gguf.quantize(values, own), raw_dtype=own)
    _write(writer)
    return path


def write_adapter(path: Path, folder: Path, config: PretrainedConfig) -> Path:
    """A PEFT folder's LoRA of linear layers, in fp32; its scale stands in B, so alpha is r."""
    told = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    scale = told["lora_alpha"] / told["r"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(told["r"]))
    for name, weight in load_file(folder / "adapter_model.safetensors").items():
        stem, side = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        if side == "lora_B":
            weight = _laid(f"{stem}.weight", weight * scale, config)
        writer.add_tensor(f"{_name(stem + '.weight')}.{side.lower()}", weight.contiguous().numpy())
    _write(writer)
    return path


def _name(name: str) -> str:
    """transformers' name as llama.cpp's."""
    stem = name.removeprefix("model.").removesuffix(".weight")
    if not stem.startswith("layers."):
        return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem] + ".weight"
    _, number, module = stem.split(".", 2)
    return f"blk.{number}.{MODULES[module]}.weight"


def _laid(name: str, weight: Tensor, config: PretrainedConfig) -> Tensor:
    """Rows of q and k in llama.cpp's order: it turns neighbours, where transformers turns halves."""
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    if ".q_proj." not in name and ".k_proj." not in name:
        return weight
    rows, inputs = weight.shape
    return weight.view(heads, 2, rows // heads // 2, inputs).transpose(1, 2).reshape(rows, inputs)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
