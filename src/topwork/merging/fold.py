"""A weight with an adapter's part in it, in fp32, and rounded once to the type in which it is kept.

LoRA    W' = W + s B A
DoRA    W' = m / |W + s B A| (W + s B A)
IA3     W' = l W, b' = l b, or W' = W l for a module whose inputs are scaled
BitFit  b' the learned bias
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from topwork.adapters.methods.lora.embedding import EmbeddingLora
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.module import AdapterModule
from topwork.adapters.module_copy import ModuleCopy
from topwork.common.errors import RunError

MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def folded(part: AdapterModule, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A module's weight [out, in] (an embedding's [V, d]) in fp32, or more, and its bias with a part in them. Raises
    AdapterError for a part that cannot be merged."""
    return part.merged(weight.to(torch.promote_types(weight.dtype, torch.float32)), bias)


def keeps_tie(
    parts: Mapping[str, AdapterModule], stored: Callable[[str, str], Tensor], embedding: str, head: str
) -> bool:  # fmt: skip
    """Whether the parts at a tied embedding and head, paths of both, leave them one weight: copies that are equal, or
    one LoRA, turned. `stored` gives a part's tensors by its path and their names."""
    first, last = parts.get(embedding), parts.get(head)

    def same(one: str, other: str, turned: bool = False) -> bool:
        own, theirs = stored(embedding, one), stored(head, other)
        return torch.equal(own.t() if turned else own, theirs)

    if isinstance(first, ModuleCopy) and isinstance(last, ModuleCopy):
        return last.tensors().keys() == {"weight"} and same("weight", "weight")
    if not isinstance(first, EmbeddingLora) or type(last) is not Lora or first.scaling != last.scaling:
        return False
    return same("lora_embedding_B", "lora_A.weight", True) and same("lora_embedding_A", "lora_B.weight", True)


def as_stored(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum in the type in which it is kept. Raises RunError, calling it by `name`, where it is not finite."""
    merged = exact.to(dtype)
    if not torch.isfinite(merged).all():
        wider = "" if dtype is torch.float32 else "merge in float32, and "
        raise RunError(
            f"{name}: weight and adapter add up to a value that is not finite in {str(dtype).removeprefix('torch.')}; "
            f"{wider}look whether the adapter holds NaN or values that are far too large"
        )
    return merged
