"""A vote as it comes, and the file that votes are kept in.

STATE/feedback.jsonl has a line for each, on the disk before it is acknowledged. What was asked and answered is not in
it, only the answers' ids and who gave them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from topwork.common.files import append_line
from topwork.common.options import Options

FILE = "feedback.jsonl"
_ID = 200


class Vote(Options):
    """What `POST /v1/feedback` takes: on one answer, or on two to one question."""

    id: str | None = Field(default=None, max_length=_ID)
    """The answer's: chatcmpl-…, cmpl-…"""
    vote: int | None = None
    """1 is up, -1 down …"""
    score: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """… or how good it is, from 0 to 1."""
    preferred: str | None = Field(default=None, max_length=_ID)
    """Side by side: the id of the better answer …"""
    rejected: str | None = Field(default=None, max_length=_ID)
    """… and of the other."""
    tied: list[str] | None = Field(default=None, min_length=2, max_length=2)
    """Or both ids, where neither is better …"""
    good: bool = True
    """… and whether both are good, or both bad."""
    comment: str | None = None
    """In the file, nowhere else."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        pair = self.preferred is not None or self.rejected is not None
        if (self.id is not None) + pair + (self.tied is not None) != 1:
            raise ValueError("give an id with vote or score, or preferred and rejected, or two that are tied")
        marks = (self.vote is not None) + (self.score is not None)
        if marks != (self.id is not None) or self.vote not in (None, 1, -1):
            raise ValueError("give a vote (1 or -1) or a score (0 to 1) with an id, and neither without one")
        if pair and (self.preferred is None or self.rejected is None):
            raise ValueError("give both preferred and rejected")
        if len(set(self.ids)) < len(self.ids):
            raise ValueError("these are one answer; give the ids of two")
        return self

    @property
    def ids(self) -> list[str]:
        """The answers that it is on."""
        if self.tied is not None:
            return list(self.tied)
        return [id for id in (self.id, self.preferred, self.rejected) if id is not None]


class VoteFile:
    """Appends lines; an end that a crash tore is closed off, so that the next line stands for itself."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if _torn(path):
            self._file.write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """On the disk when it returns. Raises RunError where the disk is full."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        append_line(self._file, json.dumps({"at": at, **record}, allow_nan=False))
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def read_votes(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole, in order; none where there is no file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            if isinstance(record, dict):
                yield record


def _torn(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
