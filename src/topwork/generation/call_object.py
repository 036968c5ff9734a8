"""A tool call's JSON object, read letter by letter: what it calls is known before it is whole."""

import json
from collections.abc import Callable, Collection


class CallObject:
    """A JSON object of a name and arguments, letter by letter.

    bare: nothing says that it is a call, so one with other keys is none, and one without arguments neither.
    """

    def __init__(self, names: Collection[str], bare: bool) -> None:
        self._names, self._bare = names, bare
        self.raw: list[str] = []  # until it is told
        self.new: list[str] = []  # of the arguments, not yet told
        self.name: str | None = None
        self.told = self.done = self.broken = self.failed = False
        self._given = False  # the arguments have begun
        self._read: Callable[[str], object] = self._open
        self._string: list[str] = []
        self._key = ""
        self._depth, self._quoted, self._escaped = 0, False, False

    @property
    def untouched(self) -> bool:
        """Whether it has not begun."""
        return self._read == self._open

    @property
    def called(self) -> bool:
        """Whether it is a call for certain."""
        return self.name is not None and self._given

    def read(self, letter: str) -> None:
        """Its next letter; one that it cannot have, in a call for certain, ends it (`broken`) and is not part of it."""
        if not self.told:
            self.raw.append(letter)
        self._read(letter)

    def _open(self, letter: str) -> None:
        if letter == "{":
            self._read = self._before_key
        elif not letter.isspace():
            self._wrong()

    def _before_key(self, letter: str) -> None:
        if letter == '"':
            self._begin_string(self._in_key)
        elif letter == "}":
            self._close()
        elif not letter.isspace():
            self._wrong()

    def _in_key(self, letter: str) -> None:
        if self._string_ends(letter):
            self._key = str(self._spelled())
            self._read = self._before_value
            if self._bare and self._key not in _KEYS:
                self._wrong()

    def _before_value(self, letter: str) -> None:
        if letter.isspace() or letter == ":":
            return
        self._depth, self._quoted, self._escaped = 0, False, False
        arguments = self._key in _ARGUMENTS and not self._given
        if self._key == "name" and self.name is None:
            self._begin_string(self._in_name)
            if letter != '"':
                self._wrong()
        elif arguments and letter == '"':  # JSON within a string
            self._begin_string(self._in_spelled)
        else:
            self._given = self._given or arguments
            self._string = []
            self._read = (self._in_arguments if letter == "{" else self._in_plain) if arguments else self._inside
            self._read(letter)

    def _in_name(self, letter: str) -> None:
        if self._string_ends(letter):
            self.name = self._spelled()
            self._read = self._behind_value
            if self.name not in self._names:
                self._wrong()

    def _in_spelled(self, letter: str) -> None:
        if self._string_ends(letter):
            self._given = True
            self.new.append(self._spelled() or "{}")
            self._read = self._behind_value

    def _in_arguments(self, letter: str) -> None:
        if self._inside(letter):
            self.new.append(letter)

    def _in_plain(self, letter: str) -> None:
        """Arguments that are no object: some models say null for none."""
        if self._inside(letter):
            self._string.append(letter)
        if self._read != self._in_plain:
            said = "".join(self._string)
            self.new.append("{}" if said in ("", "null") else said)

    def _inside(self, letter: str) -> bool:
        """Whether it is part of the value, which may end with it or before it."""
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = True
            elif letter == '"':
                self._quoted = False
                self._ends_at_depth()
            return True
        if self._depth == 0 and (letter in ",}" or letter.isspace()):  # behind a number, true, false or null
            self._read = self._behind_value
            self._behind_value(letter)
            return False
        if letter not in _OUTSIDE:
            self._wrong()
            return False
        self._quoted = letter == '"'
        self._depth += (letter in "{[") - (letter in "}]")
        if letter in "}]":
            self._ends_at_depth()
        return True

    def _ends_at_depth(self) -> None:
        if self._depth <= 0:
            self._read = self._behind_value

    def _behind_value(self, letter: str) -> None:
        if letter == ",":
            self._read = self._before_key
        elif letter == "}":
            self._close()
        elif not letter.isspace():
            self._wrong()

    def _close(self) -> None:
        if self.name is not None and not self._given and not self._bare:
            self._given = True
            self.new.append("{}")
        self.done, self.failed = self.called, not self.called

    def _wrong(self) -> None:
        self.done = self.broken = self.called and self.name in self._names
        self.failed = not self.done

    def _begin_string(self, read: Callable[[str], object]) -> None:
        self._string, self._escaped, self._read = [], False, read

    def _string_ends(self, letter: str) -> bool:
        """Whether the string ends with this letter; else it is its next."""
        if letter == '"' and not self._escaped:
            return True
        self._string.append(letter)
        self._escaped = letter == "\\" and not self._escaped
        return False

    def _spelled(self) -> str | None:
        """What the string says; None where it is no JSON."""
        try:
            return str(json.loads('"' + "".join(self._string) + '"', strict=False))
        except ValueError:
            return None


_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset({"name", "type", "id", *_ARGUMENTS})
_OUTSIDE = frozenset('{}[]:,"+-.0123456789eEtrufalsn \t\r\n')
"""What JSON has outside of strings."""
