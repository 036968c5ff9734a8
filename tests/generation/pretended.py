"""A runner without a model: it keeps tokens where keys and values would lie, and what comes next is a hash of what it
reads there. What somebody else wrote, or what was never written, makes another answer."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from topwork.generation.passes import Rows
from topwork.generation.pool import KeyValuePool
from topwork.models.base import Base
from topwork.ops.paged import BLOCK

VOCABULARY = 99


class PretendedRunner:
    """`passes` is a record of the rows that were run."""

    most_rows = 512

    def __init__(self, base: Base | None, pool: KeyValuePool) -> None:
        self.blocks = pool.blocks
        self.memory: dict[tuple[int, int], tuple[str | None, int]] = {}
        self.passes: list[list[Rows]] = []
        self.held = False

    @property
    def read(self) -> list[Rows]:
        """All that was more than one token."""
        return [rows for rows_of in self.passes for rows in rows_of if len(rows.tokens) > 1]

    def forget(self, adapter: str) -> None:
        """Nothing was made of its weights."""

    def begin(self) -> None:
        assert not self.held
        self.held = True

    def end(self) -> None:
        assert self.held
        self.held = False

    def run(self, rows: Sequence[Rows]) -> Tensor:
        assert self.held
        self.passes.append(list(rows))
        adapters = [each.adapter for each in rows]
        assert len(set(adapters)) == len([a for at, a in enumerate(adapters) if not at or adapters[at - 1] != a])
        assert 0 < sum(len(each.tokens) for each in rows) <= self.most_rows
        written = set()
        for each in rows:
            for position, token in enumerate(each.tokens, each.first):
                place = each.blocks[position // BLOCK], position % BLOCK
                assert place not in written, "two rows of a pass are written to one place"
                assert 0 <= place[0] < self.blocks
                written.add(place)
                self.memory[place] = each.adapter, token
        return torch.stack([*(self._logits(each) for each in rows if each.wanted), torch.zeros(VOCABULARY)])[:-1]

    def _logits(self, rows: Rows) -> Tensor:
        places = [(rows.blocks[at // BLOCK], at % BLOCK) for at in range(rows.first + len(rows.tokens))]
        return logits_after([self.memory[place] for place in places])


def logits_after(text: Sequence[tuple[str | None, int]]) -> Tensor:
    """[V] from what is read of a text: (adapter, token) by position."""
    digest = hashlib.sha256(repr(list(text)).encode()).digest()
    return torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


def answer_to(prompt: Sequence[int], adapter: str | None, count: int) -> list[int]:
    """The greedy answer, whoever else asks."""
    text = [(adapter, token) for token in prompt]
    for _ in range(count):
        text.append((adapter, int(logits_after(text).argmax())))
    return [token for _, token in text[len(prompt) :]]
