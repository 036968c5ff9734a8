"""Who runs in the next pass, with how many rows, and where their keys and values go.

A step is one flat pass of at most `rows` rows. Answers that are decoded come first, those that had no turn for the
longest before the others; then prompts are read, as far as rows are left, the oldest first. While a prompt is to be
read, a quarter of the rows is kept for it. What waits is admitted when a sequence may run more and its whole text has
blocks; nobody is let past who is next and does not fit.

An answer that needs a block when there is none takes it from the youngest that runs: that one goes back to the head of
its line, and its text is computed again when it comes back, of which what is still cached is found. The oldest never
has to give, so one always ends.
"""

from dataclasses import dataclass
from itertools import count
from time import monotonic

from topwork.generation.answer import Answer, blocks_of
from topwork.generation.blocks import Blocks
from topwork.generation.waiting import Lines
from topwork.ops.paged import BLOCK

KEPT_FOR_PROMPTS = 4
"""One row in so many."""


@dataclass
class Counts:
    """prefix_queries, prefix_hits  tokens that were looked for in the cache, and found there
    preemptions                  how often an answer gave its blocks to an older one
    """

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


Plan = dict[Answer, int]
"""Answers of a pass, with how many rows each, those of one adapter together."""


class Scheduler:
    """Answers that wait and that run, over one pool of blocks."""

    def __init__(self, blocks: Blocks, sequences: int, rows: int) -> None:
        self.blocks, self.sequences, self.rows = blocks, sequences, rows
        self.waiting, self.running = Lines(), dict[int, Answer]()
        self.counts = Counts()
        self._turns = count()

    def plan(self) -> Plan:
        """The next pass; nothing in it where nobody waits or runs."""
        plan: Plan = {}
        room = self.rows
        preempted = self.counts.preemptions
        for answer in self._decoded():
            if answer.id in self.running and self._with_room(answer):
                plan[answer], room = 1, room - 1
        coming: set[bytes] = set()  # keys of blocks that this pass fills
        for answer in self._reading():
            room -= self._read(answer, room, plan, coming)
        while room and self.counts.preemptions == preempted and (new := self._admitted()) is not None:
            room -= self._read(new, room, plan, coming)
        return dict(sorted(plan.items(), key=lambda item: item[0].request.adapter or ""))

    def ran(self, plan: Plan) -> None:
        """The pass has been made: full blocks are known from now on."""
        for answer, rows in plan.items():
            before = answer.computed // BLOCK
            answer.computed += rows
            for number in range(before, answer.computed // BLOCK):
                self.blocks.keep(answer.blocks[number], answer.key(number), answer.family)

    def leave(self, answer: Answer) -> None:
        """It has ended, or never will: its blocks are free at once."""
        if self.running.pop(answer.id, None) is None:
            self.waiting.remove(answer)
        else:
            self._let_go(answer)

    def _decoded(self) -> list[Answer]:
        """Who gets a row for its one token, the oldest first, so that who gives way has not yet been planned."""
        ready = [answer for answer in self.running.values() if answer.pending == 1]
        ready.sort(key=lambda answer: (answer.turn, answer.id))
        prompts = len(ready) < len(self.running) or (self.waiting and len(self.running) < self.sequences)
        kept = max(1, self.rows // KEPT_FOR_PROMPTS) if self.rows > 1 else 0
        most = self.rows - kept if prompts else self.rows
        for answer in ready[:most]:
            answer.turn = next(self._turns)
        return sorted(ready[:most], key=lambda answer: answer.id)

    def _reading(self) -> list[Answer]:
        """Whose text is still to be read, the oldest first."""
        return sorted((a for a in self.running.values() if a.pending > 1), key=lambda answer: answer.id)

    def _with_room(self, answer: Answer) -> bool:
        """Sees that it has a place for its next token; False where it had to give way itself."""
        while answer.computed == len(answer.blocks) * BLOCK:
            taken = self.blocks.take(1)
            if taken is not None:
                answer.blocks += taken
                continue
            youngest = self.running[max(self.running)]
            self._preempt(youngest)
            if youngest is answer:
                return False
        return True

    def _preempt(self, answer: Answer) -> None:
        del self.running[answer.id]
        self._let_go(answer)
        self.waiting.return_(answer)
        self.counts.preemptions += 1

    def _let_go(self, answer: Answer) -> None:
        self.blocks.release(answer.blocks)
        answer.blocks, answer.computed = [], 0

    def _admitted(self) -> Answer | None:
        """Who is next, with blocks for all of its text, and a block left for everyone who runs; None where it has to
        wait."""
        answer = self.waiting.next
        if answer is None or len(self.running) == self.sequences:
            return None
        found: list[int] = []
        for number in range((len(answer.tokens) - 1) // BLOCK):  # one token at least is computed, for its logits
            block = self.blocks.find(answer.key(number))
            if block is None:
                break
            found.append(block)
        needed = blocks_of(len(answer.tokens)) - len(found)
        if not self.blocks.has_room(needed + len(self.running), besides=found):
            return None
        self.waiting.admit()
        self.blocks.use(found)
        taken = self.blocks.take(needed)
        assert taken is not None
        answer.blocks, answer.computed = [*found, *taken], len(found) * BLOCK
        self.counts.prefix_queries += len(answer.tokens)
        self.counts.prefix_hits += answer.computed
        self.running[answer.id] = answer
        answer.began = answer.began or monotonic()
        return answer

    def _read(self, answer: Answer, room: int, plan: Plan, coming: set[bytes]) -> int:
        """Plans as much of its text as there is room for; how many rows that are. None where another's rows of this
        pass fill the very block that it needs: it will find that one."""
        while answer.computed % BLOCK == 0 and answer.pending > BLOCK:
            key, number = answer.key(answer.computed // BLOCK), answer.computed // BLOCK
            if key in coming:
                return 0
            block = self.blocks.find(key)
            if block is None:
                break
            self.blocks.use([block])
            self.blocks.release([answer.blocks[number]])
            answer.blocks[number] = block
            answer.computed += BLOCK
            self.counts.prefix_hits += BLOCK
        rows = min(answer.pending, room)
        if rows:
            plan[answer] = rows
            stop = answer.computed + rows
            coming.update(answer.key(number) for number in range(answer.computed // BLOCK, stop // BLOCK))
        return rows
