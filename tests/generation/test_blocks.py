"""Blocks beside a naive model of them, and keys that tell apart what may not be mixed."""

from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from topwork.generation.blocks import Blocks, next_key, root_key

TOTAL = 7
KEYS = [bytes([number]) for number in range(9)]
ROOTS = [b"one", b"two"]


class BlocksMachine(RuleBasedStateMachine):
    """Lists of blocks that sequences hold; which key each block has; when each was last let go."""

    @initialize()
    def begin(self) -> None:
        self.blocks, self.held = Blocks(TOTAL), list[list[int]]()
        self.key_of, self.let_go, self.clock = dict[int, tuple[bytes, bytes]](), dict[int, int](), 0

    def used(self) -> set[int]:
        return {block for blocks in self.held for block in blocks}

    def cached(self) -> list[int]:
        """The longest unused first."""
        return sorted(self.key_of.keys() - self.used(), key=lambda block: self.let_go[block])

    @rule(count=st.integers(0, 4))
    def take(self, count: int) -> None:
        cached, free = self.cached(), TOTAL - len(self.used()) - len(self.cached())
        taken = self.blocks.take(count)
        if count > free + len(cached):
            assert taken is None
            return
        assert taken is not None
        assert len(set(taken)) == count
        assert not set(taken) & self.used()
        given_away = cached[: max(0, count - free)]
        assert set(given_away) == set(taken) & set(cached)
        for block in given_away:
            del self.key_of[block]
        self.held.append(taken)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), key=st.sampled_from(KEYS), root=st.sampled_from(ROOTS))
    def keep(self, data: st.DataObject, key: bytes, root: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.used())))
        self.blocks.keep(block, key, root)
        if block not in self.key_of and key not in {known for known, _ in self.key_of.values()}:
            self.key_of[block] = key, root

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=3))
    def share(self, keys: list[bytes]) -> None:
        found = [block for key in keys if (block := self.blocks.find(key)) is not None]
        assert [self.key_of[block][0] for block in found] == [
            key for key in keys if key in {known for known, _ in self.key_of.values()}
        ]
        others = [block for block in self.cached() if block not in found]
        room = TOTAL - len(self.used() | self.key_of.keys()) + len(others)
        assert self.blocks.has_room(room, besides=found)
        assert not self.blocks.has_room(room + 1, besides=found)
        self.blocks.use(found)
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.blocks.release(blocks)
        for block in reversed(blocks):
            self.clock += 1
            if block not in self.used():
                self.let_go[block] = self.clock

    @rule(root=st.sampled_from(ROOTS))
    def forget(self, root: bytes) -> None:
        self.blocks.forget(root)
        self.key_of = {block: known for block, known in self.key_of.items() if known[1] != root}

    @invariant()
    def balance(self) -> None:
        self.blocks.check()
        assert (self.blocks.used, self.blocks.cached) == (len(self.used()), len(self.cached()))
        assert self.blocks.used + self.blocks.cached + self.blocks.free == TOTAL
        assert {key: self.blocks.find(key) for key in KEYS if self.blocks.find(key) is not None} == {
            key: block for block, (key, _) in self.key_of.items()
        }


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_lost_block_is_noticed() -> None:
    blocks = Blocks(3)
    taken = blocks.take(2)
    assert taken is not None
    blocks.check()
    del blocks._users[taken[0]]
    with pytest.raises(AssertionError, match="lost"):
        blocks.check()


def test_the_beginning_of_a_text_is_kept_longer_than_its_end() -> None:
    blocks = Blocks(4)
    text = blocks.take(3)
    assert text is not None
    for block, key in zip(text, KEYS):
        blocks.keep(block, key, ROOTS[0])
    blocks.release(text)
    assert blocks.take(2) is not None  # one was free
    assert [blocks.find(key) is not None for key in KEYS[:3]] == [True, True, False]


def test_keys_tell_apart_whatever_keys_and_values_depend_on() -> None:
    """Bases, adapters by content or by name, salts, whatever their strings hold; tokens and their order before."""
    strings = ["", "a", 'a", "b', "a\x00b", "None"]
    adapters = [None, *(pair for pair in product(("content", "name"), strings))]
    roots = {root_key(base, adapter, salt) for base, adapter, salt in product(strings, adapters, strings)}
    assert len(roots) == len(strings) ** 2 * len(adapters)
    chains = {
        next_key(next_key(root_key("base", None, ""), [-1, one]), [two]) for one, two in product(range(5), range(5))
    }
    assert len(chains) == 25
    assert next_key(b"root", [1, 2]) == next_key(b"root", (1, 2)) != next_key(b"root", [12])
