"""Parts at embeddings: LoRA on one, and rows of one (and of a head tied to it) that are trained.

PEFT's names, shapes and rules: a LoRA's A is [r, V] and begins at zero, its B is [d, r]; where the family scales its
embeddings, what an adapter adds is scaled with them.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.adapters.module import AdapterModule, hold_in, path_seed
from topwork.quantization.linear import PackedModule


class EmbeddingLora(AdapterModule):
    """y + s (A[:, ids]' B') at one embedding."""

    merges = ("weight",)

    def __init__(self, vocabulary: int, width: int, r: int, scaling: float) -> None:
        super().__init__()
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, vocabulary))
        self.lora_embedding_B = nn.Parameter(torch.empty(width, r))
        self.scaling = scaling

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:  # noqa: ARG002
        """Zero A, draw B."""
        generator = torch.Generator().manual_seed(path_seed(seed, path))
        self.lora_embedding_A.zero_()
        self.lora_embedding_B.copy_(torch.randn(self.lora_embedding_B.shape, generator=generator))

    @property
    def setting(self) -> float:
        return self.scaling

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
        """x [n] token ids, y [n, d]. As in the base, the padding token's column learns nothing."""
        a, b = self.lora_embedding_A.to(y.dtype), self.lora_embedding_B.to(y.dtype)
        chosen = F.embedding(x, a.t(), getattr(base_layer, "padding_idx", None))
        return y + _scaled(self.scaling * (chosen @ b.t()), base_layer)

    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        super().freeze(base_layer, dtype)
        for parameter in (self.lora_embedding_A, self.lora_embedding_B):
            hold_in(parameter, base_layer, dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self.scaling * (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).t()
        return weight + delta.to(weight.device), bias


class TrainedTokens(AdapterModule):
    """Rows of the embedding that take the place of the base's for some tokens: they begin as the base's are."""

    merges = ("weight",)
    tokens: Tensor

    def __init__(self, tokens: Sequence[int], width: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.tensor(tokens, dtype=torch.int64), persistent=False)
        self.delta = nn.Parameter(torch.zeros(len(tokens), width))

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:  # noqa: ARG002
        self.delta.copy_(self.base_rows(base_layer))

    @property
    def setting(self) -> tuple[int, ...]:
        return tuple(self.tokens.tolist())

    def base_rows(self, base_layer: nn.Module) -> Tensor:
        """The base's own rows [n, d] for these tokens, in fp32."""
        tokens = self.tokens.to(base_layer.weight.device)  # type: ignore[arg-type]
        rows = base_layer.packed.rows(tokens) if isinstance(base_layer, PackedModule) else base_layer.weight[tokens]  # type: ignore[index]
        return rows.float()

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
        ordered, order = self.tokens.sort()
        at = torch.searchsorted(ordered, x).clamp_max(len(ordered) - 1)
        rows = F.embedding(order[at], self.delta.to(y.dtype))
        return torch.where((ordered[at] == x)[:, None], _scaled(rows, base_layer), y)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"token_adapter.trainable_tokens_delta": self.delta}

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tokens = self.tokens.to(weight.device)
        return weight.index_copy(0, tokens, self.delta.detach().to(weight)), bias


class TiedTokens(AdapterModule):
    """The same rows in the head that is tied to the embedding; it has no tensors of its own.

    It adds x (rows - the base's rows)' to those tokens' logits, which is nothing at all while they are the same.
    """

    def __init__(self, embedding: TrainedTokens) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, or the parameter would be this module's as well
        self._distance: Tensor | None = None

    @property
    def setting(self) -> tuple[int, ...]:
        return self.embedding.setting

    @property
    def embedding(self) -> TrainedTokens:
        """The part at the embedding."""
        return self._embedding[0]

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
        """x [n, d], y [n, V]."""
        distance = self._distance if self._distance is not None else self._computed(base_layer)
        return y.index_add(1, self.embedding.tokens, (x @ distance.to(x.dtype).t()).to(y.dtype))

    @torch.no_grad()
    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        super().freeze(base_layer, dtype)
        self._distance = self._computed(base_layer).to(dtype)

    def held(self) -> Iterator[Tensor]:
        yield from super().held()
        if self._distance is not None:
            yield self._distance

    def _computed(self, base_layer: nn.Module) -> Tensor:
        """The rows' distance from the base's [n, d] in fp32."""
        return self.embedding.delta - self.embedding.base_rows(base_layer)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.embedding.merged(weight, bias)


def _scaled(values: Tensor, base_layer: nn.Module) -> Tensor:
    """Times what the family multiplies its embeddings by."""
    scale = getattr(base_layer, "embed_scale", None)
    if scale is None:
        return values
    return values * (scale.to(values) if isinstance(scale, Tensor) else scale)
