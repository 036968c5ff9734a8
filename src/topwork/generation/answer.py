"""An answer on its way: a request, the text so far, and where its keys and values lie."""

from dataclasses import dataclass, field

from topwork.generation.blocks import next_key
from topwork.generation.passes import Rows
from topwork.generation.requests import Request
from topwork.generation.sampling import Row
from topwork.ops.paged import BLOCK


@dataclass(eq=False)
class Answer:
    """A request that waits or runs.

    id        rises with every request
    tokens    the adapter's virtual ones, the prompt's, and those of the answer so far
    left      how many it may still get
    root      what its chain of block keys begins from
    family    what its blocks are forgotten with (`chains.py`)
    row       what its next token is chosen by
    said      the answer's tokens so far, which `row` looks at
    computed  how many positions have their keys and values in `blocks`
    turn      when it was last decoded, beside others
    began     when it first ran, as time.monotonic has it
    complete  whether its constraint lets nothing follow
    """

    id: int
    request: Request
    tokens: list[int]
    left: int
    root: bytes
    family: bytes
    row: Row
    said: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    turn: int = -1
    began: float | None = None
    complete: bool = False
    _keys: list[bytes] = field(default_factory=list)

    @property
    def share(self) -> str:
        """Whose it is, where several wait."""
        return self.request.share

    @property
    def pending(self) -> int:
        """Tokens that are yet to be computed: one while it is decoded."""
        return len(self.tokens) - self.computed

    @property
    def begun(self) -> bool:
        """Whether it has told something."""
        return bool(self.said)

    def key(self, block: int) -> bytes:
        """What its block of this number is known by, once it is full."""
        while len(self._keys) <= block:
            at = len(self._keys) * BLOCK
            before = self._keys[-1] if self._keys else self.root
            self._keys.append(next_key(before, self.tokens[at : at + BLOCK]))
        return self._keys[block]

    def ask(self) -> str | None:
        """Sets what its next token is chosen by; why it cannot be chosen, where its constraint fails."""
        request, row = self.request, self.row
        row.position = len(self.said)
        row.banned = request.stop_ids if row.position < request.sampling.min_new_tokens else ()
        if request.constraint is not None:
            try:
                row.allowed = request.constraint.allowed()
            except Exception as error:
                return _failed(error)
        return None

    def say(self, token: int) -> str | None:
        """Its next token; what is wrong with it, where its constraint fails."""
        self.tokens.append(token)
        self.said.append(token)
        self.left -= 1
        if self.request.constraint is not None:
            try:
                self.request.constraint.accept(token)
                self.complete = self.request.constraint.complete
            except Exception as error:
                return _failed(error)
        return None

    def rows(self, count: int) -> Rows:
        """Its next `count` tokens, as a pass takes them."""
        stop = self.computed + count
        tokens = self.tokens[self.computed : stop]
        return Rows(tokens, self.computed, self.blocks, self.request.adapter, stop == len(self.tokens))


def blocks_of(tokens: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // BLOCK)


def _failed(error: Exception) -> str:
    return f"its constraint failed: {type(error).__name__}: {error}"[:300]
