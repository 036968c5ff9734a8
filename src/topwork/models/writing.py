"""A base as an ordinary Hugging Face folder: config, generation config, safetensors, tokenizer, chat template.

Packed layers are written in bitsandbytes' format, so that transformers and vLLM read them.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from topwork.common.errors import ModelError
from topwork.common.files import write_text
from topwork.models.base import Base
from topwork.models.processor import keep_processor
from topwork.models.quiet import without_bars
from topwork.ops.packed import Packed4bit, PackedInt8
from topwork.quantization.bnb_format import to_tensors
from topwork.quantization.linear import PackedModule, packed_modules

DENSE = (nn.Linear, Conv1D)
"""What bitsandbytes would quantize where it is not told to skip it."""
SHARD_SIZE = "5GB"


def write_model(base: Base, folder: Path, template: str | None = None, end_ids: Sequence[int] = ()) -> None:
    """Write `base` into an existing, empty folder. Generation stops at `end_ids` too, the tokens that end a turn."""
    if end_ids and base.module.generation_config is not None:
        base.module.generation_config.eos_token_id = all_ends(base.module.generation_config.eos_token_id, end_ids)
    with without_bars():
        base.module.save_pretrained(folder, state_dict=_state(base.module), max_shard_size=SHARD_SIZE)
    write_tokenizer(base.tokenizer, folder, template)
    _clean_file(folder / "config.json", stored_config(base.module))
    if base.source is not None:
        keep_processor(base.source, base.module.config.to_dict(), folder)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, template: str | None = None) -> None:
    """Write a tokenizer with a chat template, or with its own."""
    copied = copy.deepcopy(tokenizer)
    if template is not None:
        copied.chat_template = template
    copied.save_pretrained(folder)
    _clean_file(folder / "tokenizer_config.json", {})


def stored_config(model: PreTrainedModel) -> dict[str, Any]:
    """config.json's quantization_config for the packed layers of a model, as bitsandbytes writes it; empty for none.

    Raises ModelError for a quantized head, which this format has no place for.
    """
    layers = [module.packed for module in packed_modules(model).values()]
    if not layers:
        return {}
    first = layers[0]
    four, eight = isinstance(first, Packed4bit), isinstance(first, PackedInt8)
    head = model.get_output_embeddings()
    if isinstance(head, PackedModule):
        raise ModelError("a quantized head cannot be written, since others do not read it; load with head: 16bit")
    skipped = [path for path, module in model.named_modules() if module is head or type(module) in DENSE]
    stored = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four, "_load_in_4bit": four, "load_in_8bit": eight, "_load_in_8bit": eight,
        "bnb_4bit_quant_type": first.quant_type if isinstance(first, Packed4bit) else "nf4",
        "bnb_4bit_use_double_quant": isinstance(first, Packed4bit) and first.nested_absmax is not None,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skipped,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }  # fmt: skip
    return {"quantization_config": stored}


def _state(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The tensors to write, where they are not simply the model's own."""
    packed = packed_modules(model)
    if not packed:
        return None
    state = {key: value for key, value in model.state_dict().items() if key.removesuffix(".weight") not in packed}
    for path, module in packed.items():
        state |= {f"{path}.{part}": tensor.contiguous() for part, tensor in to_tensors(module.packed).items()}
    return state


def all_ends(own: int | list[int] | None, end_ids: Sequence[int]) -> int | list[int]:
    """The base's own end tokens and those of the template; one stays a number."""
    known = [own] if isinstance(own, int) else list(own or [])
    both = [*known, *(token for token in end_ids if token not in known)]
    return both[0] if len(both) == 1 else both


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what speaks of how and from where a base was loaded here (GGUF titles stand in `_model_name_or_path`)."""
    return {key: value for key, value in config.items() if not _is_ours(key)}


def _clean_file(path: Path, added: dict[str, Any]) -> None:
    config = clean_config(json.loads(path.read_text(encoding="utf-8"))) | added
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _is_ours(key: str) -> bool:
    return key.endswith("_name_or_path") or "attn_implementation" in key or key in ("is_local", "local_files_only")
