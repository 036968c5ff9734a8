"""MinHash beside the definition: every pair of texts compared by their sets of shingles."""

import random
import re

import pytest

from topwork.plan.lint.near import SIMILAR, near_pairs, shingles_of

WORDS = [f"word{number}" for number in range(400)]


def by_definition(texts: list[str]) -> set[tuple[int, int]]:
    """Jaccard over runs of three words, for all pairs."""
    found = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        found.append({tuple(words[at : at + 3]) for at in range(len(words) - 2)} if len(words) >= 8 else set())
    return {
        (a, b)
        for b in range(len(texts))
        for a in range(b)
        if found[a] and found[b] and len(found[a] & found[b]) / len(found[a] | found[b]) >= SIMILAR
    }


def altered(words: list[str], changes: int, draw: random.Random) -> list[str]:
    return [
        draw.choice(WORDS) if at in set(draw.sample(range(len(words)), changes)) else word
        for at, word in enumerate(words)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_those_of_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    texts: list[str] = []
    for _ in range(60):
        words = draw.choices(WORDS, k=draw.randint(20, 80))
        texts += [" ".join(words), " ".join(altered(words, draw.randint(0, 3), draw))]
    draw.shuffle(texts)
    assert set(near_pairs(shingles_of(texts))) == by_definition(texts)


def test_texts_of_a_few_words_are_never_near() -> None:
    assert near_pairs(shingles_of(["the lamp is dark", "the lamp is dark", "the lamp is dark"])) == []


def test_what_all_texts_share_makes_none_near() -> None:
    shared = " ".join(WORDS[:200])
    texts = [f"{shared} {' '.join(random.Random(seed).choices(WORDS[200:], k=15))}" for seed in range(40)]
    assert near_pairs(shingles_of(texts)) == []
    assert near_pairs(shingles_of([*texts, texts[0] + " please"])) == [(0, 40)]


def test_signs_are_words_where_no_spaces_are_written() -> None:
    text = "我家厨房桌子上方的灯自从上周的暴风雨以来一直不亮请问应该怎么办才好呢"
    assert near_pairs(shingles_of([text, "您好" + text, "今天北京的天气非常好我们一起去公园散步吧怎么样呢"])) == [
        (0, 1)
    ]


def test_only_pairs_over_the_split() -> None:
    text = " ".join(WORDS[:40])
    other = " ".join(WORDS[60:100])
    texts = [text, text + " more", other, text + " and", other + " too"]
    assert near_pairs(shingles_of(texts), split=3) == [(0, 3), (1, 3), (2, 4)]


def test_nothing_of_nothing() -> None:
    assert near_pairs(shingles_of([])) == []
    assert near_pairs(shingles_of(["", "short"])) == []
