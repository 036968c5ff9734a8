"""Which modules PEFT 0.21.2 adapts where a config names none: by the base's `model_type`, for decoders.

(`peft.utils.constants`; of IA3 the feedforward modules are those of `methods/places.py`'s MLP_LAST.)
"""

from collections.abc import Mapping

from topwork.common.errors import AdapterError

Names = str | list[str]
_QUERY_VALUE = ["q_proj", "v_proj"]
LORA: Mapping[str, Names] = {
    **dict.fromkeys(
        (
            "llama", "llama4", "mistral", "mixtral", "stablelm", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3",
            "opt", "gptj", "gpt_neo",
        ),
        _QUERY_VALUE,
    ),
    **{key: ["query_key_value"] for key in ("bloom", "gpt_neox", "falcon", "RefinedWebModel", "RefinedWeb", "chatglm")},
    **{key: ["c_attn"] for key in ("gpt2", "gpt_bigcode")},
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "mpt": ["Wqkv"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}  # fmt: skip
IA3: Mapping[str, Names] = {
    **{key: ["k_proj", "v_proj", "down_proj"] for key in ("llama", "mistral")},
    **{
        key: ["q_proj", "v_proj", "down_proj"] for key in ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")
    },
    "mixtral": ["k_proj", "v_proj", "w2"],
    "phi": ["q_proj", "v_proj", "fc2"],
    "opt": ["q_proj", "k_proj", "fc2"],
    "gptj": ["q_proj", "v_proj", "fc_out"],
    "gpt_neo": ["q_proj", "v_proj", "c_proj"],
    **{key: ["c_attn", "mlp.c_proj"] for key in ("gpt2", "gpt_bigcode")},
    "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    **{key: ["query_key_value", "dense_4h_to_h"] for key in ("gpt_neox", "falcon", "RefinedWebModel", "RefinedWeb")},
}
BY_METHOD: Mapping[str, Mapping[str, Names]] = {"lora": LORA, "ia3": IA3}


def peft_names(method: str, family: str) -> Names:
    """`target_modules` as PEFT has it where it is left out. Raises AdapterError where PEFT knows none."""
    names = BY_METHOD.get(method, {}).get(family)
    if names is None:
        raise AdapterError(
            f"target_modules is left out, and PEFT has no modules of its own for method {method} in a {family}; name "
            "them in target_modules"
        )
    return names
