"""What chains of block keys begin from, for one engine, and when what is cached under them is let go."""

from collections.abc import Iterable, Mapping

from topwork.generation.blocks import Blocks, root_key
from topwork.generation.requests import Request


class Chains:
    """The roots that requests were given: of an adapter whose content is told they last, of the others they pass when
    nothing runs any more."""

    def __init__(self, fingerprint: str, contents: Mapping[str, str], blocks: Blocks) -> None:
        self.fingerprint, self.contents, self.blocks = fingerprint, contents, blocks
        self._roots: dict[str, set[bytes]] = {}  # by adapter, one for each salt
        self._passing: set[bytes] = set()

    def root(self, request: Request) -> bytes:
        """What its keys begin from."""
        name = request.adapter
        if name is None:
            return root_key(self.fingerprint, None, request.salt)
        content = self.contents.get(name)
        told = ("name", name) if content is None else ("content", content)
        root = root_key(self.fingerprint, told, request.salt)
        self._roots.setdefault(name, set()).add(root)
        if content is None:
            self._passing.add(root)
        return root

    def forget(self, adapter: str) -> None:
        """Nothing of the adapter's is found any more, whatever the salt."""
        for root in self._roots.pop(adapter, ()):
            self.blocks.forget(root)

    def rest(self, waiting: Iterable[bytes]) -> None:
        """Nothing runs, and weights may change; requests with these roots wait."""
        for root in self._passing:
            self.blocks.forget(root)
        self._passing.intersection_update(waiting)
