"""How modules of a base that work head by head (norms, and some families' linear layers) are given their input: found
once, in a short pass.

Most families norm heads as [1, T, H, D]; some turn them first, to [1, H, T, D], which no shape tells where there are as
many heads as tokens. Adapters on such a module (`adapters/module.py`) have to know which rows are tokens.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from topwork.ops.batch import batch_of
from topwork.ops.context import running
from topwork.quantization.linear import PackedModule


def tell_head_norms(model: PreTrainedModel, linear: bool) -> None:
    """Set `heads_first` on every module of the base that is given [1, T, H, D] (False) or [1, H, T, D] (True). To be
    called while its layers are plain, and set to flat batches. `linear` layers are asked too where nobody knows how the
    family is made (DeepSeek 3 gives some of its heads)."""
    norms = [module for path, module in model.named_modules() if _could_be_one(path, module, linear)]
    if not norms:
        return
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    count = 1 + (heads if isinstance(heads, int) else max(heads))  # more than there are heads of any kind

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given and given[0].dim() == 4:
            module.heads_first = given[0].shape[1] != count  # type: ignore[assignment]

    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    batch = batch_of([torch.zeros(count, dtype=torch.int64, device=model.device)])
    try:
        with torch.no_grad(), running(batch):
            model.base_model(input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _could_be_one(path: str, module: nn.Module, linear: bool) -> bool:
    """A module with a weight inside an attention; a linear layer where these are asked for."""
    weight, parent = getattr(module, "weight", None), path.rpartition(".")[0]
    known = isinstance(module, nn.Linear | Conv1D | PackedModule)
    inside = "attn" in parent or "attention" in parent
    return inside and isinstance(weight, nn.Parameter) and (linear or not known)
