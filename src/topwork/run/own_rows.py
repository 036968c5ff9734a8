"""A run's own rows, read again after its training: those that are still there."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.examples import Data, load_data
from topwork.data.files.sources import with_held_out


def load_own(config: DataConfig, tokenizer: PreTrainedTokenizerBase, room: int, seed: int) -> Data:
    """Held-out and training rows; where the latter are gone and the former are in a file of their own, these alone.
    Raises DataError, or OSError, where neither can be read."""
    try:
        return load_data(config, tokenizer, room, seed, lambda _: None)
    except (DataError, OSError):
        held = with_held_out(config).eval if config.eval is not None else None
        if held is None:
            raise
    read = load_data(config.reading(held), tokenizer, room, seed, lambda _: None)
    conversations = read.train_conversations
    return replace(
        read, train=(), eval=tuple(read.train), train_conversations=(), eval_conversations=conversations, bound=None
    )  # fmt: skip
