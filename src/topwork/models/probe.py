"""Does a batch keep this model's sequences apart? Asked of every family that no test has proven.

Two short sequences run as one batch and each alone through the model as transformers ships it. ALiBi, linear
attention or recurrent state show as a difference, and the model is refused by name instead of being trained wrongly.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from topwork.common.errors import ModelError
from topwork.common.memory import out_of_memory
from topwork.ops.batch import batch_of

if TYPE_CHECKING:
    from topwork.models.base import Base

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""The largest difference, relative to the logits' norm, that rounding alone explains."""


def probe(base: "Base", use_flat: Callable[[PreTrainedModel], None]) -> None:
    """Switch `base` to flat batches and compare; raises ModelError naming the family on a difference."""
    lengths = (11, 7)
    vocabulary = base.module.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    sequences = [part.to(base.device) for part in tokens.split(lengths)]
    family = base.module.config.get_text_config().model_type
    with torch.no_grad():
        alone = torch.cat([base.module(input_ids=part[None], use_cache=False).logits[0] for part in sequences]).float()
        use_flat(base.module)
        try:
            flat = base.logits(batch_of(sequences), torch.arange(len(tokens), device=base.device))
        except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
            if out_of_memory(error):
                raise
            raise ModelError(f"{family}: could not be run as a flat batch ({error}); choose another base.") from error
    difference = float((flat - alone).norm() / alone.norm().clamp_min(1e-9))
    if not difference <= TOLERANCE.get(base.module.dtype, 1e-4):
        raise ModelError(
            f"{family}: two sequences in one batch give other logits than each alone (relative difference "
            f"{difference:.2g}). Something in this family (ALiBi, linear attention, recurrent state) carries over from "
            "one sequence to the next, so it would be trained wrongly; choose another base."
        )
