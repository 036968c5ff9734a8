"""SentencePiece's scores, from the merges that a fast tokenizer has in their place.

llama.cpp joins the two neighbours whose joint token scores best, the leftmost of equals, whatever two tokens make it.
A fast tokenizer joins the pair that comes first in its list. The two are one rule where all pairs that make a token
stand together in the list and every pair that could make it is there; then minus its place is the token's score. That
is checked, because the file would else cut texts into other tokens.
"""

from collections.abc import Mapping, Sequence

from topwork.common.errors import ModelError


def scores_of(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], rows: int) -> list[float]:
    """[rows] scores by token id; 0 for what is not made by merging. Raises ModelError where the two rules differ."""
    scores, place, before = [0.0] * rows, 0, ""
    made: set[str] = set()
    for left, right in merges:
        token = left + right
        if token != before:
            if token in made:
                raise _no_order(f"the pairs that make {token!r} stand apart in its list")
            made.add(token)
            place, before = place - 1, token
        scores[vocabulary[token]] = float(place)
    _check_complete(vocabulary, made, set(merges))
    return scores


def _check_complete(vocabulary: Mapping[str, int], made: set[str], pairs: set[tuple[str, str]]) -> None:
    """Whether every two tokens that can meet and whose joint is a token are merged."""
    can_stand = made | {token for token in vocabulary if len(token) == 1}
    for token in vocabulary:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in can_stand and right in can_stand and (left, right) not in pairs:
                raise _no_order(f"{left!r} and {right!r} are not joined, and {token!r} is a token")


def _no_order(how: str) -> ModelError:
    return ModelError(
        f"this tokenizer's merges are no SentencePiece model's ({how}), so llama.cpp would cut texts into other tokens "
        "than the model has learned; no GGUF is written. Export it as hf or vllm instead"
    )
