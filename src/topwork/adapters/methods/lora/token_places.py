"""Where rows of single tokens are trained: at the embedding and the head, as PEFT's `trainable_token_indices` names
them. Free of torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from topwork.adapters.places import Places
from topwork.common.errors import AdapterError

Indices = Sequence[int] | Mapping[str, Sequence[int]]
"""Ids for the embedding, and a head that is tied to it; or by module."""


@dataclass(frozen=True)
class Tokens:
    """Where rows are trained, and which.

    path      the embedding, or a head of its own
    is_head   which of the two
    width     of a row
    shared    the head that is tied to this embedding, and so has the same rows
    """

    path: str
    is_head: bool
    width: int
    ids: tuple[int, ...]
    shared: str | None = None


def token_places(base: Places, named: Indices | None) -> list[Tokens]:
    """Raises AdapterError for modules that are neither the embedding nor the head, for tokens that the base does not
    have or that are named twice, and for a tied head that is to have other tokens than the embedding."""
    if named is None:
        return []
    if base.embedding is None or base.by_path[base.embedding].kind != "embedding":
        raise AdapterError("trainable_token_indices needs a base with an input embedding; this one has none")
    by_path = _by_path(base, named) if isinstance(named, Mapping) else {base.embedding: tuple(named)}
    for path, ids in by_path.items():
        _check_ids(ids, base.by_path[path].rows)
    head = base.head
    if head is not None and base.tied:
        _refuse_unlike(base.embedding, head, by_path)
        return [Tokens(base.embedding, False, base.by_path[base.embedding].columns, by_path[base.embedding], head)]
    return [Tokens(path, path == head, base.by_path[path].columns, ids) for path, ids in by_path.items()]


def with_tokens(base: Places, named: Indices | None, ids: Sequence[int], whole: Sequence[str]) -> Indices | None:
    """`trainable_token_indices` with the rows of further tokens in embedding and head, but for modules of which `whole`
    names the last part of the path: these are trained altogether."""
    ends = [base.embedding] if base.tied or base.head is None else [base.embedding, base.head]
    rows = [path for path in ends if path is not None and not path.endswith(tuple(whole) or ("\0",))]
    before = dict(named) if isinstance(named, Mapping) else {base.embedding or "": named} if named else {}
    found = {}
    for path in rows:
        known = _of(before, path)
        found[_last(path)] = [*known, *sorted(set(ids) - set(known))]
    if base.tied and found:
        return next(iter(found.values()))
    others = {name: list(tokens) for name, tokens in before.items() if not _is_one_of(name, rows)}
    return {**others, **found} or named


def _of(named: Mapping[str, Sequence[int]], path: str) -> Sequence[int]:
    return next((ids for name, ids in named.items() if _is_one_of(name, [path])), ())


def _is_one_of(name: str, paths: Sequence[str]) -> bool:
    return any(path == name or path.endswith("." + name) for path in paths)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _by_path(base: Places, named: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    ends = [path for path in (base.embedding, base.head) if path is not None]
    found = {}
    for name, ids in named.items():
        path = next((path for path in ends if _is_one_of(name, [path])), None)
        if path is None:
            raise AdapterError(
                f"trainable_token_indices names {name!r}; rows of tokens are those of {' and '.join(ends)}, give one "
                "of these"
            )
        found[path] = tuple(ids)
    return found


def _check_ids(ids: Sequence[int], rows: int) -> None:
    outside = sorted(token for token in set(ids) if not 0 <= token < rows)
    if outside or not ids:
        told = str(outside[:8] if len(outside) > 8 else outside or "no ids")
        raise AdapterError(
            f"trainable_token_indices has {told}; the base has 0 to {rows - 1}: give ids that are in it (the tokenizer "
            f"tells a token's id), or give it more rows: model.new_tokens, or model.vocabulary_size: "
            f"{max(outside, default=0) + 1}"
        )
    twice = sorted(token for token, count in Counter(ids).items() if count > 1)
    if twice:
        raise AdapterError(f"trainable_token_indices names {twice} more than once; give each id once")


def _refuse_unlike(embedding: str, head: str, by_path: Mapping[str, Sequence[int]]) -> None:
    if embedding not in by_path or list(by_path.get(head, by_path[embedding])) != list(by_path[embedding]):
        raise AdapterError(
            f"trainable_token_indices names other tokens for {head} than for {embedding}, which hold one weight in "
            f"this base; give the same for both, or leave {head} out"
        )
