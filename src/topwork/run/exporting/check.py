"""What an exported adapter is compared on: a few prompts through the base and our reading of the adapter."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from topwork.adapters.graft import Adapters
from topwork.adapters.on_base import Stored
from topwork.adapters.peft_format import BaseId, load_adapter
from topwork.common.errors import ModelError
from topwork.common.memory import free_memory_bytes
from topwork.export.read_back import Asked
from topwork.merging.stream import Stored as StoredTensors
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.lazy import LazyModel, open_lazily
from topwork.models.load import load_base
from topwork.models.source import find_source
from topwork.models.tokenizer import load_tokenizer
from topwork.ops.batch import batch_of
from topwork.plan.built import base_skeleton
from topwork.run.folder import ADAPTER_NAME
from topwork.run.given import Given
from topwork.run.merging.inputs import TEXTS, own_tokenizer

Log = Callable[[str], None]
MOST = 8
"""Prompts that are compared at most."""


def stored_by(model: ModelConfig, bare: PreTrainedModel, log: Log) -> Stored:
    """A base's own tensors by module and name, read when they are asked for. Raises ModelError."""
    dense: LazyModel = open_lazily(find_source(model, log), trust_remote_code=model.trust_remote_code)
    return StoredTensors(dense, bare).tensor


@torch.no_grad()
def asked(given: Given, tokenizer: PreTrainedTokenizerBase | None, count: int, force: bool, log: Log) -> Asked | None:
    """`count` prompts, eight at most, through the base in fp32 on the CPU, with and without the adapter; None, and said
    why, where the base's weights are not read for this alone."""
    if not count:
        return None
    why = "there is no tokenizer to cut them" if tokenizer is None else not_loaded(given.model, log)
    if why:
        log(f"no prompts are compared: {why}")
        return None
    base = load_base(given.model.model_copy(update={"dtype": "float32", "device": "cpu"}), log, None, tokenizer)
    adapters = Adapters(base.module, base.tokenizer)
    load_adapter(adapters, ADAPTER_NAME, given.saved, BaseId(base.name, base.fingerprint), force)
    room = base.context_length - base.virtual_tokens(ADAPTER_NAME)
    prompts = [torch.tensor(base.tokenizer(text).input_ids[:room]) for text in TEXTS[: min(count, MOST)]]
    with_it, without = (_logits(base, prompts, name) for name in (ADAPTER_NAME, None))
    return Asked(prompts, with_it, without)


def not_loaded(model: ModelConfig, log: Log) -> str:
    """Why a base's weights are not read for a comparison alone; empty where they are."""
    try:
        source = find_source(model, log)
    except ModelError as error:
        return _first_line(error)
    there = Path(source.folder).is_dir() or any(
        isinstance(try_to_load_from_cache(source.folder, name, revision=source.revision), str)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if not there:
        return f"the weights of {source.name} are not on this machine; name a copy of it with --model"
    needed, free = 4 * base_skeleton(model).num_parameters(), free_memory_bytes(torch.device("cpu"))
    if needed > free:
        return f"{source.name} in fp32 takes {needed / 2**30:,.0f} GiB, and {free / 2**30:,.0f} are free"
    return ""


def tokenizer_of(
    model: ModelConfig, template: str | None, beside: Path | None, log: Log
) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer, or the one that lies `beside` an adapter, with the `template` of a run; None, and said why,
    where there is none."""
    try:
        tokenizer = load_tokenizer(find_source(model, log), model.trust_remote_code)
        tokenizer = tokenizer if beside is None else own_tokenizer(beside, tokenizer, log)
    except ModelError as error:
        log(f"without a tokenizer: {_first_line(error)}")
        return None
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _logits(base: Base, prompts: Sequence[Tensor], adapter: str | None) -> list[Tensor]:
    return [base.logits(batch_of([prompt], adapter), torch.arange(len(prompt))).float() for prompt in prompts]
