"""SentencePiece's scores, from the merges that a fast tokenizer has in their place.

llama.cpp joins the two neighbours whose joint token scores best, the leftmost of equals, whatever two tokens make it.
A fast tokenizer joins the pair that comes first in its list. The two are one rule where all pairs that make a token
stand together in the list and every pair that could make it is there; then minus its place is the token's score.

Runs of one letter may stand apart from each other (Gemma's of spaces, tabs and line ends), where longer ones come first
and nothing else between them: under either rule the leftmost run then grows letter by letter before another begins.
All of this is checked, because the file would else cut texts into other tokens.
"""

from collections.abc import Mapping, Sequence

from topwork.common.errors import ModelError


def scores_of(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], rows: int) -> list[float]:
    """[rows] scores by token id; 0 for what is not made by merging. Raises ModelError where the two rules differ."""
    scores, before = [0.0] * rows, ""
    made: set[str] = set()
    runs: list[str] = []  # tokens of one letter, since the last of several
    for left, right in merges:
        token = left + right
        run = token == token[0] * len(token)
        if not run:
            runs = []
        if token not in made:
            made.add(token)
            runs += [token] if run else []
            scores[vocabulary[token]] = -float(len(made))
        elif token != before and not (run and _longer_first(token, runs)):
            raise _no_order(f"the pairs that make {token!r} stand apart in its list")
        before = token
    _check_complete(vocabulary, made, set(merges))
    return scores


def _longer_first(token: str, runs: Sequence[str]) -> bool:
    """Whether a run stands among runs alone, and none of its letter that is shorter stands before it."""
    return token in runs and all(len(other) > len(token) for other in runs[: runs.index(token)] if other[0] == token[0])


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
