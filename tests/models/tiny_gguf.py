"""Writes small llama models as GGUF files for tests: float32 weights, and the metadata that llama.cpp sets."""

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

TITLE = "A Title That Must Not Leak"
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}\n\t é {{ m['content'] }}<|im_end|>\n{% endfor %} \n"
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(vocabulary: int = 320, **changes: Any) -> LlamaForCausalLM:
    """A random llama of 2 layers, tied, with grouped queries, for the vocabularies below."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM, vocabulary: dict[str, Any], **changes: Any) -> Path:
    """Write `model` with a vocabulary (`byte_level_vocabulary`, `sentencepiece_vocabulary`); `changes` are extra keys.

    A tensor's name with the value None leaves it out, with a tensor adds it.
    """
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name(TITLE)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in {**vocabulary, **changes}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name, weight in {**gguf_tensors(model), **changes}.items():
        if isinstance(weight, torch.Tensor):
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights under llama.cpp's names, rotary halves interleaved as it wants them."""
    config = model.config
    tensors = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape).contiguous()
        tensors[_gguf_name(name.removeprefix("model.").removesuffix(".weight"))] = weight
    return tensors


def _gguf_name(name: str) -> str:
    if not name.startswith("layers."):
        return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[name] + ".weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def byte_level_vocabulary(size: int = 320, pre: str = "smollm") -> dict[str, Any]:
    """Byte-level BPE with merges that join digits, so that splitting them is seen in the ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["1 2", "12 3", "h e", "l l", "he ll", "Ġ 1", "hell o"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values()]
    tokens += [merge.replace(" ", "") for merge in merges]
    unused = [f"[PAD{index}]" for index in range(len(tokens), size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3) + [UNUSED] * len(unused),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A sentencepiece-like vocabulary with scores in the order of its ids and no merges, as llama.cpp writes it."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE if token.startswith("<0x") else NORMAL for token in tokens[3:]]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0 if kind != NORMAL else float(259 - i) for i, kind in enumerate(kinds)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
