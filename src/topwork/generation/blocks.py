"""Which blocks of the pool hold what: handed out, counted, and kept for texts that begin alike.

A full block is known by a key: a hash of its tokens, of all that stand before them, and of what else its keys and
values depend on (the base, the adapter's content, a tenant's salt). A sequence whose text begins with blocks that are
known uses these too; nobody writes to a block that is full.
"""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Adapter = tuple[str, str] | None
"""("content", its hash), or ("name", …) of one whose content nobody told; None is the bare base."""


def root_key(fingerprint: str, adapter: Adapter, salt: str) -> bytes:
    """What a chain of keys begins from: nothing is found across bases, adapters or salts."""
    return hashlib.sha256(json.dumps([fingerprint, adapter, salt]).encode()).digest()


def next_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block with these tokens (virtual ones are numbers too) behind the one of the key `before`."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class Blocks:
    """`total` blocks. Each is free, used by one sequence or more, or cached: full, known by a key, used by nobody.

    Cached ones are given away when no other is free, those first that were used the longest ago.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # the last freed is the next given: fewer are ever touched
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, tuple[bytes, bytes]] = {}  # and its family's

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that are kept though nobody uses them."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Blocks of sequences that run, each once."""
        return len(self._users)

    def find(self, key: bytes) -> int | None:
        """The block that is known by this key."""
        return self._block_of.get(key)

    def use(self, blocks: Sequence[int]) -> None:
        """One user more for each of these, which are used or cached."""
        for block in blocks:
            self._idle.pop(block, None)
            self._users[block] = self._users.get(block, 0) + 1

    def has_room(self, count: int, besides: Sequence[int] = ()) -> bool:
        """Whether `take` would give so many, and leave alone those `besides`."""
        return len(self._free) + len(self._idle) - sum(block in self._idle for block in besides) >= count

    def take(self, count: int) -> list[int] | None:
        """So many blocks for one user; None, and nothing happens, where there are not as many."""
        if not self.has_room(count):
            return None
        while len(self._free) < count:
            block, _ = self._idle.popitem(last=False)
            self._unknown(block)
            self._free.append(block)
        taken = [self._free.pop() for _ in range(count)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def keep(self, block: int, key: bytes, family: bytes) -> None:
        """A used block is full and known from now on, unless another is known by this key already. Its family is what
        it is forgotten with."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key, family

    def release(self, blocks: Sequence[int]) -> None:
        """A user less for each block of a sequence. Its last blocks are the first to be given away: without those
        before, nobody finds them."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def forget(self, family: bytes) -> None:
        """Nothing that was kept for this family is found any more; what nobody uses of it is free."""
        for block in [block for block, (_, own) in self._key_of.items() if own == family]:
            self._unknown(block)
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def check(self) -> None:
        """Raises AssertionError where the balance is broken: used + cached + free == total, each block in one state."""
        states = [*self._free, *self._idle, *self._users]
        assert sorted(states) == list(range(self.total)), "a block is lost, or in two states"
        assert all(count > 0 for count in self._users.values()), "a block is used by nobody, and held"
        known = {block: key for block, (key, _) in self._key_of.items()}
        assert {key: block for block, key in known.items()} == self._block_of, "a key and its block disagree"
        assert self._idle.keys() <= known.keys(), "a block is cached that nobody could find"
        assert not known.keys() & set(self._free), "a free block is found"

    def _unknown(self, block: int) -> None:
        key, _ = self._key_of.pop(block)
        del self._block_of[key]
