"""What an exported adapter is compared on: a few prompts through the base and our reading of the adapter."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from topwork.adapters.graft import Adapters, bare_base
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import BaseId, load_adapter
from topwork.common.errors import ModelError
from topwork.export.read_back import Asked
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.source import find_source
from topwork.models.tokenizer import load_tokenizer
from topwork.ops.batch import batch_of
from topwork.run.folder import ADAPTER_NAME
from topwork.run.given import Given

PROMPTS = (
    "The capital of France is",
    "Order 4711 has not arrived. Please tell me where it is.",
    '{"name": "Ada", "born": 1815}',
    "def add(a, b):\n    return a + b\n",
    "Es war einmal ein König, der hatte drei Töchter.",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The opposite of hot is cold, and the opposite of up is",
)
MOST_OF_MEMORY = 0.6
"""The share that the base's fp32 weights may take."""
WITHOUT_WORDS = 24
"""Random tokens in a prompt, where there is no tokenizer."""


class Reading:
    """The base in fp32 on the CPU, loaded when somebody first asks for it, and let go by `close`."""

    def __init__(
        self, given: Given, tokenizer: PreTrainedTokenizerBase | None, parameters: int, count: int, force: bool,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        """parameters: how many the base has; count: on how many prompts the adapter is to be compared, 0 for none."""
        self.given, self.tokenizer, self.parameters = given, tokenizer, parameters
        self.count, self.force, self.log = count, force, log
        self._base: Base | None = None

    def base(self) -> Base:
        """Raises ModelError where its weights are not to be had."""
        if self._base is None:
            model = self.given.model.model_copy(update={"dtype": "float32", "device": "cpu"})
            self._base = load_base(model, self.log, None, self.tokenizer)
        return self._base

    def bare(self) -> Bare:
        """Its modules."""
        return bare_base(self.base().module)

    @torch.no_grad()
    def asked(self) -> Asked | None:
        """Some prompts through the base, with and without the adapter; None, and said why, without its weights."""
        if not self.count:
            return None
        if self._base is None and (why := _not_loaded(self.given.model, self.parameters, self.log)):
            self.log(f"no prompts are compared: {why}")
            return None
        base = self.base()
        adapters = Adapters(base.module, base.tokenizer)
        load_adapter(adapters, ADAPTER_NAME, self.given.saved, BaseId(base.name, base.fingerprint), self.force)
        room = base.context_length - base.virtual_tokens(ADAPTER_NAME)
        prompts = [prompt[:room] for prompt in _prompts(base, self.count)]
        with_it, without = (_logits(base, prompts, name) for name in (ADAPTER_NAME, None))
        adapters.remove(ADAPTER_NAME)
        return Asked(prompts, with_it, without)

    def close(self) -> None:
        """The memory is the reader's now."""
        self._base = None


def _not_loaded(model: ModelConfig, parameters: int, log: Callable[[str], None]) -> str:
    """Why a base's weights are not read for a comparison alone; empty where they are."""
    try:
        source = find_source(model, log)
    except ModelError as error:
        return str(error).splitlines()[0]
    there = Path(source.folder).is_dir() or any(
        isinstance(try_to_load_from_cache(source.folder, name, revision=source.revision), str)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if not there:
        return f"the weights of {source.name} are not on this machine; name a copy of it with --model"
    needed, memory = 4 * parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > MOST_OF_MEMORY * memory:
        return f"{source.name} in fp32 takes {needed / 2**30:,.0f} GiB, and there are {memory / 2**30:,.0f}"
    return ""


def tokenizer_of(
    model: ModelConfig, template: str | None, log: Callable[[str], None]
) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer with the adapter's own chat template; None, and said why, where it is not to be had."""
    try:
        tokenizer = load_tokenizer(find_source(model, log), model.trust_remote_code)
    except ModelError as error:
        log(f"without a tokenizer: {str(error).splitlines()[0]}")
        return None
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _prompts(base: Base, count: int) -> list[Tensor]:
    if base.tokenizer is not None:
        ids = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS[:count]]
        if all(ids):
            return [torch.tensor(each) for each in ids]
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.module.config.get_text_config().vocab_size
    return [torch.randint(vocabulary, (WITHOUT_WORDS,), generator=generator) for _ in PROMPTS[:count]]


def _logits(base: Base, prompts: Sequence[Tensor], adapter: str | None) -> list[Tensor]:
    return [base.logits(batch_of([prompt], adapter), torch.arange(len(prompt))).float() for prompt in prompts]
