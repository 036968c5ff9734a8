"""What chains of block keys begin from, for one engine, and when what is cached under them is let go."""

from collections.abc import Iterable, Mapping

from topwork.generation.blocks import Adapter, Blocks, root_key


class Chains:
    """An adapter's blocks are a family, whatever the salts of the requests, which are a client's to choose and without
    end. Those of an adapter whose content is told last; the others' pass when nothing runs any more."""

    def __init__(self, fingerprint: str, contents: Mapping[str, str], blocks: Blocks) -> None:
        self.fingerprint, self.contents, self.blocks = fingerprint, contents, blocks
        self._families: dict[str, bytes] = {}
        self._passing: set[bytes] = set()

    def family(self, name: str | None) -> bytes:
        """What the blocks of this adapter's texts (None: the base's) are forgotten with."""
        family = root_key(self.fingerprint, self._told(name), "")
        if name is not None:
            self._families[name] = family
            if name not in self.contents:
                self._passing.add(family)
        return family

    def root(self, name: str | None, salt: str) -> bytes:
        """What the keys of its texts begin from."""
        return root_key(self.fingerprint, self._told(name), salt)

    def forget(self, adapter: str) -> None:
        """Nothing of the adapter's is found any more, whatever the salt."""
        family = self._families.pop(adapter, None)
        if family is not None:
            self.blocks.forget(family)

    def rest(self, waiting: Iterable[bytes]) -> None:
        """Nothing runs, and weights may change; requests of these families wait."""
        for family in self._passing:
            self.blocks.forget(family)
        self._passing.intersection_update(waiting)

    def _told(self, name: str | None) -> Adapter:
        if name is None:
            return None
        content = self.contents.get(name)
        return ("name", name) if content is None else ("content", content)
