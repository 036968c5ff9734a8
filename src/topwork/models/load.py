"""Loading a base: found, read (packed on the way where asked for), frozen, made flat and fast."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topwork.common.devices import let_gpu_memory_grow, limit_kernel_caches
from topwork.common.errors import ModelError
from topwork.common.heap import trim_heap
from topwork.common.memory import memory_for, out_of_memory
from topwork.common.os_errors import why
from topwork.common.telling import doing
from topwork.models.attention import use_flat_attention
from topwork.models.auto import auto_class
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.fingerprint import Sampled, fingerprint
from topwork.models.growing import grow, told_growth
from topwork.models.head_norms import tell_head_norms
from topwork.models.probe import probe
from topwork.models.proven import PROVEN, TEXT_PARTS
from topwork.models.quantized import is_packed, left_dense, misfit, quantize_head, read_packed, written_here
from topwork.models.quiet import without_bars
from topwork.models.recognise import make_fast
from topwork.models.source import Source, find_source
from topwork.models.tokenizer import context_length, load_config, load_tokenizer, usable_length
from topwork.models.vocabulary import growth_of
from topwork.ops.logprobs import LogitRule
from topwork.ops.threads import take_first_cosines
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.kinds import embedding_shape

DTYPES: dict[str, Any] = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "auto": "auto",
}  # fmt: skip


@memory_for(
    "reading the base", "quantization.load_in_4bit holds it in a quarter; else give more memory or a smaller base"
)
def load_base(
    config: ModelConfig | str, log: Callable[[str], None] = print, quantization: QuantizationConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Base:  # fmt: skip
    """Find, read and freeze a base, set to flat batches; an unproven family is probed. `config` may be its name alone,
    and `tokenizer` its own where that was opened already, to read the data before the weights.

    With `quantization` its linear layers are packed as they are read, never whole in 16 bits; a checkpoint that is
    quantized already is taken as it is.
    """
    config = ModelConfig(model_name_or_path=config) if isinstance(config, str) else config
    limit_kernel_caches()
    let_gpu_memory_grow()
    source = find_source(config, log)
    doing(log, f"reading the base: {source.name}")
    device = pick_device(config.device)
    wanted = quantization or QuantizationConfig()
    module, identity = _read(source, config, wanted)
    tokenizer = tokenizer or load_tokenizer(source, config.trust_remote_code, config)
    rows = _grow(module, config, tokenizer, source.name, log)
    if wanted.head != "16bit":
        quantize_head(module, wanted.head)
    if wanted.active and (told := left_dense(module)):
        log(f"{source.name}: {told}")
    base = as_base(module.to(device), tokenizer, source.name, log, identity)  # type: ignore[arg-type]
    trim_heap()
    return replace(base, new_tokens=tuple(config.new_tokens), vocabulary_size=rows, source=source)


def as_base(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    log: Callable[[str], None] = print,
    identity: str | None = None,
    fast: bool = True,
) -> Base:
    """Freeze a loaded Hugging Face causal model, set it to flat batches and make its layers fast where they can be.
    `identity` is its fingerprint, where it was taken already."""
    module.requires_grad_(False).eval()
    take_first_cosines()
    config = module.config.get_text_config()
    whole, length = context_length(module.config), usable_length(module.config)
    if length < whole:
        log(
            f"{config.model_type}: its rotary positions (longrope) change for a whole pass with its longest sequence; "
            f"sequences are kept to {length} tokens, below which they do not, instead of {whole}"
        )
    base = Base(module, tokenizer, name, identity or fingerprint(module), length, _logit_rule(config))
    proven = config.model_type in PROVEN | TEXT_PARTS
    if proven:
        use_flat_attention(module)
    else:
        probe(base, use_flat_attention)
        log(f"{config.model_type}: not in the table of proven families; probed, and its sequences stay apart")
    tell_head_norms(module, linear=not proven)
    if fast:
        make_fast(module, log)
    return base


def _read(source: Source, config: ModelConfig, wanted: QuantizationConfig) -> tuple[PreTrainedModel, str]:
    """The model, in host memory, and its fingerprint."""
    remote: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    samples: dict[str, Sampled] = {}
    info: Any
    loaded: Any
    try:
        known: Any = load_config(source, config.trust_remote_code)
        dtype = DTYPES[config.dtype]
        if is_packed(known, source.name) or wanted.active:
            dtype = (known.dtype or torch.float32) if dtype == "auto" else dtype
            module, info, samples = read_packed(source, known, wanted, dtype, config.trust_remote_code)
        else:
            with without_bars():
                loaded = auto_class(known).from_pretrained(
                    source.folder, revision=source.revision, dtype=dtype, use_safetensors=True,
                    output_loading_info=True, ignore_mismatched_sizes=True, **remote,
                )  # fmt: skip
            module, info = loaded
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise ModelError(
            f"{source.name} could not be read as a causal language model with safetensors weights: {why(error)}"
        ) from error
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise misfit(key, found, expected)
    lacking = sorted(info["missing_keys"])
    if lacking:  # transformers would go on with random values
        raise ModelError(
            f"{source.name} lacks {len(lacking)} weights that its config asks for (first {lacking[0]}); was the "
            "download finished, and is it a causal language model?"
        )
    return module, written_here(source.folder) or fingerprint(module, samples)


def _grow(
    module: PreTrainedModel, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, name: str,
    log: Callable[[str], None],
) -> int | None:  # fmt: skip
    """Rows for new tokens, once the base is known by the weights that it has; how many there are then, if more."""
    if not config.grows:
        return None
    growth = growth_of(config, embedding_shape(module.get_input_embeddings())[0], tokenizer.get_vocab())
    if growth is None:
        return None
    grow(module, growth)
    log(told_growth(name, growth))
    return growth.rows if growth.rows > growth.before else None


def _logit_rule(config: object) -> LogitRule:
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitRule(scale, getattr(config, "final_logit_softcapping", None))


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"model.device: {name!r} is not to be had here ({error}); try auto or cpu") from error
    return device
