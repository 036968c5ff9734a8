"""New tokens, where a recipe or an adapter meets its base: which rows are trained, how many an adapter needs, and ids
that no row is there for."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from topwork.adapters.config import LoraConfig
from topwork.adapters.peft_format import BaseId, SavedAdapter
from topwork.common.errors import DataError, ModelError, RequestError, quoted
from topwork.data.examples import Data, Example
from topwork.data.streaming.examples import StreamedExamples
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.structure import Structure
from topwork.models.tokenizer import open_tokenizer
from topwork.models.vocabulary import growth_of, rows_of
from topwork.models.writing import write_tokenizer
from topwork.plan.base import stored_rows, structure_named
from topwork.plan.new_tokens import with_token_rows
from topwork.recipe.recipe import Recipe

NAMED = 8
"""Tokens that a message names."""


def base_id(base: Base) -> BaseId:
    """What an adapter's folder says of the base that it was trained on."""
    return BaseId(base.name, base.fingerprint, base.new_tokens, base.vocabulary_size)


def with_new_tokens(recipes: Sequence[Recipe], log: Callable[[str], None]) -> list[Recipe]:
    """Recipes that share a base, each with an adapter that trains the rows of `model.new_tokens`. One that was written
    down so stays as it is. Raises ModelError, and RequestError for methods that cannot."""
    model = recipes[0].model
    if not model.grows:
        return list(recipes)
    tokenizer, _ = open_tokenizer(model, log)
    growth = growth_of(model, stored_rows(model), tokenizer.get_vocab())
    if growth is None:
        return list(recipes)
    structure = structure_named(model)
    return [with_token_rows(recipe, structure, growth.fresh) for recipe in recipes]


def keep_tokenizer(base: Base, template: str | None) -> Callable[[Path], None]:
    """Writes the tokenizer beside an adapter that needs another than its base's: so PEFT's AutoPeftModel grows the base
    by it, and vLLM and we take it."""

    def write(folder: Path) -> None:
        if base.new_tokens or base.vocabulary_size is not None:
            write_tokenizer(base.tokenizer, folder, template)

    return write


def with_vocabulary(model: ModelConfig, saved: SavedAdapter, folder: Path | None = None) -> ModelConfig:
    """A base with the tokens and the rows that an adapter read from `folder` needs: as it says itself where it was
    trained here, else as its tensors show, with the tokenizer that lies beside them."""
    if saved.base.new_tokens and not model.new_tokens:
        model = model.model_copy(update={"new_tokens": list(saved.base.new_tokens)})
    try:
        structure = structure_named(model)
    except ModelError:  # its loading will tell
        return model
    needed = max(saved.base.vocabulary_size or 0, needed_rows(saved, structure))
    if needed <= rows_of(structure):
        return model
    changes: dict[str, Any] = {"vocabulary_size": needed}
    if not model.new_tokens and folder is not None and (folder / "tokenizer_config.json").is_file():
        changes["tokenizer_name_or_path"] = model.tokenizer_name_or_path or str(folder)
    return model.model_copy(update=changes)


def needed_rows(saved: SavedAdapter, base: Structure) -> int:
    """How many rows of embedding and head an adapter speaks of."""
    ends = {path.rpartition(".")[2] for path in (base.embedding, base.head) if path is not None}
    sizes = [0]
    for key, tensor in saved.tensors.items():
        names = key.split(".")
        at = next((number for number, name in enumerate(names) if name in ends), None)
        if at is None or tensor.dim() != 2:
            continue
        part = ".".join(names[at + 1 :])
        if part.endswith("lora_embedding_A"):
            sizes.append(tensor.shape[1])
        elif part.endswith(("weight", "lora_B.weight")) and "lora_A" not in part:
            sizes.append(tensor.shape[0])
    config = saved.config
    named = config.trainable_token_indices if isinstance(config, LoraConfig) else None
    ids = [token for some in named.values() for token in some] if isinstance(named, dict) else named or []
    return max([*sizes, *(token + 1 for token in ids)])


def shared_base(models: Sequence[ModelConfig]) -> ModelConfig:
    """The first of some that name one base, with the new tokens and the rows that any of them needs. Raises
    RequestError where two need other tokens."""
    first = models[0]
    for other in models[1:]:
        ours, theirs = first.new_tokens, other.new_tokens
        most = max(ours, theirs, key=len)
        if most[: len(ours)] != ours or most[: len(theirs)] != theirs:
            raise RequestError(
                f"one of the adapters has the new tokens {_listed(ours)}, another {_listed(theirs)}; open them apart, "
                "each over a base of its own"
            )
        size = max(first.vocabulary_size or 0, other.vocabulary_size or 0) or None
        tokenizer = first.tokenizer_name_or_path or other.tokenizer_name_or_path
        first = first.model_copy(
            update={"new_tokens": most, "vocabulary_size": size, "tokenizer_name_or_path": tokenizer}
        )
    return first


def check_ids(loaded: Sequence[Data], rows: int, tokenizer: PreTrainedTokenizerBase, called: str) -> None:
    """DataError for rows with tokens that a base, which is `called` so, has no row for: the model would be asked for
    what lies behind its embedding. Rows that are streamed are looked at when they are read."""
    highest = max([tokenizer.vocab_size - 1, *tokenizer.added_tokens_decoder])
    if highest < rows:
        return

    def check(examples: Sequence[Example]) -> None:
        for example in examples:
            if int(example.tokens.max()) >= rows:
                raise DataError(_beyond(example, rows, highest, tokenizer, called))

    for data in loaded:
        check(data.eval)
        if isinstance(data.train, StreamedExamples):
            data.train.check = check
        else:
            check(data.train)


def _beyond(example: Example, rows: int, highest: int, tokenizer: PreTrainedTokenizerBase, called: str) -> str:
    ids = sorted({int(token) for token in np.unique(example.tokens) if token >= rows})
    named = tokenizer.convert_ids_to_tokens(ids)
    return (
        f"{example.source} has token {ids[0]} ({quoted(named[0])}), and {called} has rows for {rows:,} tokens, 0 to "
        f"{rows - 1}: its tokenizer has more, up to {highest}. Give the base rows for them, which are then trained: "
        f"model.new_tokens: [{_listed(named)}]; or take the base's own tokenizer"
    )


def _listed(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - NAMED} more" if len(tokens) > NAMED else ""
    return (", ".join(map(quoted, tokens[:NAMED])) or "none") + more
