"""What a LoRA adds at each module as two factors, whatever its options called it: s B A with the scale in B."""

from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.adapters.fitting import Parts
from topwork.adapters.methods.factored import Factored
from topwork.adapters.methods.lora.embedding import EmbeddingLora
from topwork.adapters.methods.lora.inits import FromWeight, LoftQ
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.module import AdapterModule
from topwork.adapters.module_copy import ModuleCopy
from topwork.common.errors import AdapterError


@dataclass(frozen=True)
class LowRankUpdate:
    """One module's update, in fp32.

    a          A [r, in]; an embedding's [r, V]
    b          s B [out, r]; an embedding's [d, r]
    scaling    s, which b has in it
    embedding  whether it adds (b a)' to an embedding's rows [V, d] instead of b a to a weight [out, in]
    """

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])

    def padded(self, rank: int) -> "LowRankUpdate":
        """The same product, with zeros in the rows of A and the columns of B behind its own."""
        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(len(self.b), more)], 1)
        return LowRankUpdate(a, b, self.scaling, self.embedding)


def low_rank_updates(parts: Parts) -> dict[str, LowRankUpdate]:
    """The update at each path: rsLoRA and patterns are a scale and a rank of each module's own, PiSSA and OLoRA the
    difference from what they began as, of rank 2 r.

    Raises AdapterError for a part that is no LoRA: DoRA, a whole module, trained tokens, another method.
    """
    return {path: _update(path, part) for path, part in parts.items()}


@torch.no_grad()
def _update(path: str, part: AdapterModule) -> LowRankUpdate:
    if isinstance(part, EmbeddingLora):
        return _folded(part.lora_embedding_A, part.lora_embedding_B, part.scaling, embedding=True)
    if isinstance(part, FromWeight):
        return _folded(*part.difference(), part.scaling)
    if isinstance(part, Factored):
        return _folded(*part.factors(), part.scaling)
    if isinstance(part, Lora) and type(part) in (Lora, LoftQ):
        return _folded(part.lora_A, part.lora_B, part.scaling)
    told = "a whole module" if isinstance(part, ModuleCopy) else f"a {type(part).__name__}"
    raise AdapterError(f"{path} holds {told}, which is no product of two low-rank factors; merge it into the base")


def _folded(a: Tensor, b: Tensor, scaling: float, embedding: bool = False) -> LowRankUpdate:
    return LowRankUpdate(a.detach().float().cpu(), scaling * b.detach().float().cpu(), scaling, embedding)
