"""Who is next, of those that wait: lines of first come, first served, one for each share, which take turns."""

from collections import deque
from collections.abc import Iterator

from topwork.generation.answer import Answer

PASSED_OVER = 64
"""So many others may go while the one that came first of all waits; then it is next."""


class Lines:
    """Answers that wait, in the lines of their shares."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Answer]] = {}
        self._ring: deque[str] = deque()  # shares in whose lines somebody stands, by whose turn it is
        self._passed = 0

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Answer]:
        return (answer for line in self._lines.values() for answer in line)

    @property
    def oldest(self) -> Answer | None:
        """Who came first of all; None where nobody waits."""
        return min((line[0] for line in self._lines.values()), key=lambda answer: answer.id, default=None)

    @property
    def next(self) -> Answer | None:
        """Who is next, until somebody comes or goes; None where nobody waits."""
        if self._passed >= PASSED_OVER:
            return self.oldest
        return self._lines[self._ring[0]][0] if self._ring else None

    def add(self, answer: Answer) -> None:
        """To the end of its line."""
        if answer.share not in self._lines:
            self._lines[answer.share] = deque()
            self._ring.append(answer.share)
        self._lines[answer.share].append(answer)

    def return_(self, answer: Answer) -> None:
        """To the head of its line, whose turn it is: it has been admitted before."""
        line = self._lines.setdefault(answer.share, deque())
        if answer.share in self._ring:
            self._ring.remove(answer.share)
        self._ring.appendleft(answer.share)
        line.appendleft(answer)

    def admit(self) -> Answer:
        """Take out who is next. The line that it stood in has had its turn."""
        answer = self.next
        assert answer is not None
        if answer is self.oldest:
            self._passed = 0
        else:
            self._passed += 1
        self._ring.remove(answer.share)
        self._ring.append(answer.share)
        self._out(answer)
        return answer

    def remove(self, answer: Answer) -> None:
        """It waits no longer."""
        if answer is self.oldest:
            self._passed = 0
        self._out(answer)

    def _out(self, answer: Answer) -> None:
        line = self._lines[answer.share]
        line.remove(answer)
        if not line:
            del self._lines[answer.share]
            self._ring.remove(answer.share)
