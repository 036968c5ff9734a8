"""How many rows a base's embedding and head need: what a recipe asks for beside what they have. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from topwork.common.errors import ModelError
from topwork.models.config import ModelConfig
from topwork.models.light_tokenizer import LightTokenizer, tokenizer_folder
from topwork.models.structure import Module, Structure


@dataclass(frozen=True)
class Growth:
    """What becomes of a base's `before` rows.

    rows   how many there are then
    fresh  ids of the tokens that no row was ever trained for; some bases have spare rows, where they may lie
    """

    before: int
    rows: int
    fresh: tuple[int, ...]

    @property
    def known(self) -> int:
        """The first rows, which tokens were trained for: new ones begin as their mean."""
        return min([self.before, *self.fresh])


def growth_of(model: ModelConfig, before: int, vocabulary: Mapping[str, int] | None) -> Growth | None:
    """What a recipe asks of a base with `before` rows; None where these are enough and no token is new.

    vocabulary  its tokenizer's tokens and their ids, new ones among them; None where it is not at hand, which counts
                every new token as one row more

    Raises ModelError for a new token that the tokenizer lacks.
    """
    if not model.grows:
        return None
    fresh = _fresh(model, before, vocabulary)
    rows = max([before, model.vocabulary_size or 0, *(token + 1 for token in fresh)])
    if model.pad_to_multiple_of is not None:
        rows = -(-rows // model.pad_to_multiple_of) * model.pad_to_multiple_of
    return Growth(before, rows, fresh) if fresh or rows > before else None


def _fresh(model: ModelConfig, before: int, vocabulary: Mapping[str, int] | None) -> tuple[int, ...]:
    if vocabulary is None:
        return tuple(range(before, before + len(model.new_tokens)))
    lacking = [token for token in model.new_tokens if token not in vocabulary]
    if lacking:
        raise ModelError(
            f"model.new_tokens has {lacking[0]!r}, which the tokenizer that was given lacks; give the one that "
            "open_tokenizer opens, or add the token to it"
        )
    named = {vocabulary[token] for token in model.new_tokens}
    beyond = {at for at in vocabulary.values() if at >= before} if model.tokenizer_name_or_path is not None else set()
    return tuple(sorted(named | beyond))


def planned_growth(model: ModelConfig, before: int) -> Growth | None:
    """`growth_of` by the tokenizer's files alone, where these are on this machine."""
    return growth_of(model, before, _planned_vocabulary(model) if model.grows else None)


def _planned_vocabulary(model: ModelConfig) -> Mapping[str, int] | None:
    folder = tokenizer_folder(model)
    try:
        tokenizer = None if folder is None else LightTokenizer(folder, model.new_tokens)
    except Exception:  # `tokenizers` raises Exception itself; training will tell what is wrong with the files
        return None
    return None if tokenizer is None else tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)


def rows_of(structure: Structure) -> int:
    """The rows of a base's embedding."""
    return structure.vocabulary if structure.embedding is None else structure.by_path[structure.embedding].rows


def grown(structure: Structure, rows: int) -> Structure:
    """A base with so many rows in embedding and head."""
    ends = {path for path in (structure.embedding, structure.head) if path is not None}
    return replace(
        structure,
        modules=tuple(_with_rows(module, rows) if module.path in ends else module for module in structure.modules),
        vocabulary=rows,
        config={**structure.config, "vocab_size": rows},
    )


def _with_rows(module: Module, rows: int) -> Module:
    sizes = (rows * module.columns, rows) if module.bias else (rows * module.columns,)
    shares = module.parameters < module.weights  # a head whose weight is the embedding's
    return replace(module, rows=rows, tensors=sizes, parameters=sum(sizes[1:] if shares else sizes))
