"""Prompt and prefix tuning: P learned tokens that stand before every text of an adapter.

Prompt tuning learns their embeddings [P, d] (Lester et al., arXiv 2104.08691); prefix tuning learns the keys and values
that every layer's attention sees of them, after rotation (Li and Liang, arXiv 2101.00190). `models/virtual.py` puts the
rows into a batch. A fresh one is not the base: P more tokens are seen. Tensors and layouts are PEFT's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork.adapters.config import AdapterConfig
from topwork.adapters.embedding import embedding_shape
from topwork.adapters.part import Part, path_seed
from topwork.common.errors import AdapterError
from topwork.ops.context import Virtual

PREFIX_DEVIATION = 0.02
SAMPLED_TOKENS = 1024
"""Embeddings whose standard deviation a random prompt takes."""


@dataclass(frozen=True)
class CacheShape:
    """What attention keeps of a token: in each layer so many heads of keys, and as many of values, each `size` wide."""

    layers: int
    heads: int
    size: int

    @property
    def values(self) -> int:
        """Of one token in all layers."""
        return 2 * self.layers * self.heads * self.size


class VirtualTokens(Part):
    """Stands at the input embedding, which it leaves as it is: what it learns goes in front."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(torch.zeros(count, width))

    def virtual(self) -> Virtual:
        """The learned tokens, as a pass takes them."""
        raise NotImplementedError

    def adapted(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        return y

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        raise AdapterError(
            "prefix and prompt tuning cannot be merged: their learned tokens stand in front of the text, and no weight "
            "of the base can hold them; use the adapter's folder with its base"
        )


class Prompt(VirtualTokens):
    """Learned embeddings. They begin as those of `tokens`, of random tokens (`vocabulary`), or as noise."""

    def __init__(self, count: int, width: int, start: str, tokens: Sequence[int] = ()) -> None:
        super().__init__(count, width)
        self.start, self.tokens = start, tuple(tokens)

    @torch.no_grad()
    def begin(self, base_layer: nn.Module, seed: int, path: str) -> None:
        generator = torch.Generator().manual_seed(path_seed(seed, path))
        shape, vocabulary = self.prompt_embeddings.shape, embedding_shape(base_layer)[0]
        if self.start == "text":
            drawn = torch.tensor(self.tokens)
        else:
            drawn = torch.randint(
                vocabulary, (shape[0] if self.start == "vocabulary" else SAMPLED_TOKENS,), generator=generator
            )
        embedded = base_layer(drawn.to(base_layer.weight.device)).float()  # type: ignore[arg-type]
        if self.start == "random":
            embedded = torch.randn(shape, generator=generator) * embedded.std().cpu()
        self.prompt_embeddings.copy_(embedded)

    def virtual(self) -> Virtual:
        return Virtual(len(self.prompt_embeddings), self.prompt_embeddings)


class Prefix(VirtualTokens):
    """Learned keys and values: row p is [layer, keys or values, head, size], flat, as in PEFT."""

    def __init__(self, count: int, shape: CacheShape) -> None:
        super().__init__(count, shape.values)
        self.shape = shape

    @torch.no_grad()
    def begin(self, base_layer: nn.Module, seed: int, path: str) -> None:  # noqa: ARG002
        generator = torch.Generator().manual_seed(path_seed(seed, path))
        self.prompt_embeddings.copy_(PREFIX_DEVIATION * torch.randn(self.prompt_embeddings.shape, generator=generator))

    def virtual(self) -> Virtual:
        count, shape = len(self.prompt_embeddings), self.shape
        table = self.prompt_embeddings.view(count, shape.layers, 2, shape.heads, shape.size)
        return Virtual(count, None, table.permute(1, 2, 0, 3, 4).unbind(0))


def cache_shape(config: Any) -> CacheShape:
    """From a base's config. Raises AdapterError where its layers' keys and values are not all alike."""
    text = config.get_text_config()
    shared = getattr(text, "num_kv_shared_layers", 0) or getattr(text, "global_head_dim", None)
    if shared or getattr(text, "kv_lora_rank", None):
        raise AdapterError(
            f"{text.model_type}'s layers do not all keep keys and values of one shape, and a learned prefix is one "
            "table for all; take prompt tuning or another method"
        )
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return CacheShape(text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, size)


def virtual_place(embedding: str | None) -> str:
    """The path whose layer holds learned tokens."""
    if embedding is None:
        raise AdapterError("prefix and prompt tuning need a base with an input embedding; this one has none")
    return embedding


def start_tokens(config: AdapterConfig, tokenizer: Any) -> list[int]:
    """The tokens that a prompt begins as: the text's, cut or repeated to `num_virtual_tokens`, or none."""
    if config.prompt_tuning_init != "text":
        return []
    if tokenizer is None:
        raise AdapterError("prompt_tuning_init: text needs the base's tokenizer; give one: Adapters(model, tokenizer)")
    ids = list(tokenizer(config.prompt_tuning_init_text)["input_ids"])
    if not ids:
        raise AdapterError("prompt_tuning_init_text has no tokens; give a text, or prompt_tuning_init: random")
    return [ids[at % len(ids)] for at in range(config.num_virtual_tokens)]
