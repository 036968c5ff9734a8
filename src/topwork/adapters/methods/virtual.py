"""Prompt and prefix tuning: P learned tokens that stand before every text of an adapter.

Prompt tuning learns their embeddings [P, d] (Lester et al., arXiv 2104.08691); prefix tuning learns the keys and values
that every layer's attention sees of them, after rotation (Li and Liang, arXiv 2101.00190). `models/virtual.py` puts the
rows into a batch. A fresh one is not the base: P more tokens are seen.

Tensors and layouts are PEFT's: one tensor `prompt_embeddings`, which PEFT names without a path (`Adapters.load` finds
its place). How a prompt began from a text is not written: PEFT would look for a tokenizer by name to begin with it once
more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from topwork.adapters.config import PrefixConfig, PromptConfig
from topwork.adapters.files import Files, Grafted, peft_keys
from topwork.adapters.method import Bare, Method, Plan, Planned, Preset
from topwork.adapters.methods.places import CacheShape, cache_shape, prefix_sizes, prompt_sizes
from topwork.adapters.module import AdapterModule, hold_in, path_seed
from topwork.adapters.peft_options import prefix_options, prompt_options
from topwork.common.errors import AdapterError
from topwork.ops.context import Virtual
from topwork.quantization.kinds import embedding_shape

PREFIX_DEVIATION = 0.02
SAMPLED_TOKENS = 1024
"""Embeddings whose standard deviation a random prompt takes."""


class VirtualTokens(AdapterModule):
    """Stands at the input embedding, which it leaves as it is: what it learns goes in front."""

    merges = ()

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(torch.zeros(count, width))

    def virtual(self) -> Virtual:
        """The learned tokens, as a pass takes them."""
        raise NotImplementedError

    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        super().freeze(base_layer, dtype)
        hold_in(self.prompt_embeddings, base_layer, dtype)

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        return y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
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
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:
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
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:  # noqa: ARG002
        generator = torch.Generator().manual_seed(path_seed(seed, path))
        self.prompt_embeddings.copy_(PREFIX_DEVIATION * torch.randn(self.prompt_embeddings.shape, generator=generator))

    def virtual(self) -> Virtual:
        count, shape = len(self.prompt_embeddings), self.shape
        table = self.prompt_embeddings.view(count, shape.layers, 2, shape.heads, shape.size)
        return Virtual(count, None, table.permute(1, 2, 0, 3, 4).unbind(0))


def prompt_plan(bare: Bare, config: PromptConfig) -> Plan:
    """Learned embeddings before the text; the embedding's layer holds them."""

    ((path, (size,)),) = prompt_sizes(bare.seen, config).items()
    count = config.num_virtual_tokens

    def make() -> Prompt:
        tokens = start_tokens(config, bare.tokenizer)
        return Prompt(count, size // count, config.prompt_tuning_init, tokens)

    return {path: Planned(make, size)}


def prefix_plan(bare: Bare, config: PrefixConfig) -> Plan:
    """Learned keys and values of all layers before the text; the embedding's layer holds them too."""
    ((path, (size,)),) = prefix_sizes(bare.seen, config).items()
    shape = cache_shape(bare.seen)
    return {path: Planned(lambda: Prefix(config.num_virtual_tokens, shape), size)}


def start_tokens(config: PromptConfig, tokenizer: Any) -> list[int]:
    """The tokens that a prompt begins as: the text's, cut or repeated to `num_virtual_tokens`, or none."""
    if config.prompt_tuning_init != "text":
        return []
    if tokenizer is None:
        raise AdapterError("prompt_tuning_init: text needs the base's tokenizer; give one: Adapters(model, tokenizer)")
    ids = list(tokenizer(config.prompt_tuning_init_text)["input_ids"])
    if not ids:
        raise AdapterError("prompt_tuning_init_text has no tokens; give a text, or prompt_tuning_init: random")
    return [ids[at % len(ids)] for at in range(config.num_virtual_tokens)]


STARTS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}


def _to_file(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.rpartition(".")[2]: tensor for key, tensor in stored.items()}


def _shared(adapter: Grafted[Any], peft_type: str) -> dict[str, Any]:
    config = adapter.base_config.get_text_config()
    return {
        **peft_keys(peft_type),
        "modules_to_save": None,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": adapter.config.num_virtual_tokens,
        "token_dim": next(iter(adapter.state.values())).shape[1],
    }


def _prefix_keys(adapter: Grafted[PrefixConfig]) -> dict[str, Any]:
    shape = next(part.shape for part in adapter.parts.values() if isinstance(part, Prefix))
    width = shape.heads * shape.size
    return {
        **_shared(adapter, "PREFIX_TUNING"),
        "num_attention_heads": shape.heads,  # of keys and values
        "token_dim": width,
        "encoder_hidden_size": width,
        "init_weights": None,
        "prefix_projection": False,
    }


def _prompt_keys(adapter: Grafted[PromptConfig]) -> dict[str, Any]:
    return {
        **_shared(adapter, "PROMPT_TUNING"),
        "prompt_tuning_init": STARTS.get(adapter.config.prompt_tuning_init, "RANDOM"),
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


PREFIX = Method(
    PrefixConfig,
    prefix_plan,
    Files("PREFIX_TUNING", _prefix_keys, prefix_options, _to_file, dict, also=("CARTRIDGE",)),
    {"prefix": Preset(rate=10)},
)
PROMPT = Method(
    PromptConfig,
    prompt_plan,
    Files("PROMPT_TUNING", _prompt_keys, prompt_options, _to_file, dict, also=("P_TUNING", "CPT")),
    {"prompt": Preset(rate=30)},
)
