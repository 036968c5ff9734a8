"""What a part found, written after every figure, so that what ends the part leaves what was done."""

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpu import NOT_HELD, SECONDS
from gpu.card import Card
from topwork.common.files import write_json

RESERVE = 5.0
"""Seconds that a part keeps for its end."""


class Result:
    """A part's JSON file.

    checks  {name, found, limit, held}: what decides whether the part passed
    failed  {section: the error}: sections that did not come to their end; the others went on
    told    lines for people
    """

    def __init__(self, path: Path, card: Card, tiny: bool) -> None:
        self.path, self.card, self.tiny = path, card, tiny
        self._depth = 0
        self._end = time.monotonic() + float(os.environ.get(SECONDS, "inf")) - RESERVE
        self.values: dict[str, Any] = {"measured": card.measured, "checks": [], "failed": {}, "told": []}
        self.write()

    def write(self) -> None:
        """All of it, anew."""
        write_json(self.path, plain(self.values))

    def put(self, name: str, value: Any) -> None:
        """A figure or a table of them."""
        self.values[name] = value
        self.write()

    def add(self, name: str, row: dict[str, Any]) -> None:
        """A line of a table."""
        self.values.setdefault(name, []).append(row)
        self.write()

    def tell(self, line: str) -> None:
        """Something for people."""
        print(line, flush=True)
        self.values["told"].append(line)
        self.write()

    def left(self) -> float:
        """Seconds until the part has to end."""
        return self._end - time.monotonic()

    def in_time(self, name: str, seconds: float) -> bool:
        """Whether there is time for what takes about so long; else it is told that it was not reached."""
        if self.left() < seconds:
            self.tell(f"not reached: {name}")
            return False
        return True

    def check(self, name: str, found: float, limit: float) -> None:
        """`found` may not be above `limit`; NaN is."""
        held = found <= limit
        self.values["checks"].append({"name": name, "found": found, "limit": limit, "held": held})
        if not held:
            print(f"NOT HELD: {name}: {found:.3g}, at most {limit:.3g} expected", flush=True)
        self.write()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What fails in it is told, and the part goes on with the next. After one that stands in no other the card is
        cleared."""
        print(f"-- {name}", flush=True)
        self._depth += 1
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            self.values["failed"][name] = f"{type(error).__name__}: {error}"[:500]
            self.write()
        finally:
            self._depth -= 1
            if not self._depth:
                self.card.free()

    @property
    def held(self) -> bool:
        """Whether all that had to hold held, and something was looked at."""
        checks = self.values["checks"]
        return bool(checks) and all(check["held"] for check in checks) and not self.values["failed"]


def plain(value: Any) -> Any:
    """As JSON has it: what is no finite number becomes its name."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def main(part: Callable[[Result], None]) -> None:
    """Run a part as a program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        sys.exit("no CUDA device; --tiny tries the script on a CPU")
    result = Result(given.result, Card(torch.device("cpu" if given.tiny else "cuda")), given.tiny)
    part(result)
    sys.exit(0 if result.held else NOT_HELD)
