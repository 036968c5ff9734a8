"""Votes on answers: which may be voted on, and what votes come to.

A second vote on an answer replaces the first, and its line in the file says what it replaces: so all is counted again
at the next start in one pass over the file that remembers nothing but sums.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topwork.serving.errors import ApiError
from topwork.serving.figures import ArmFigures, Preferences
from topwork.serving.routes import Routes
from topwork.serving.seams import Call
from topwork.serving.votes import FILE, Vote, VoteFile, read_votes

_MOST_VOTES = 32
"""On one answer, replacements among them: each is a line of the file."""
_MOST_PAIRS = 10_000


@dataclass(slots=True)
class Answer:
    """An answer that this server gave: to whom, by whom, and what was said of it; `beside` by the other's id."""

    tenant: str
    model: str
    version: str
    route: str | None
    arm: str | None
    period: int
    said: dict[str, float] | None = None
    beside: dict[str, str] | None = None
    votes: int = 0

    def by(self) -> dict[str, Any]:
        """Who gave it, for the file."""
        told = {"model": self.model, "version": self.version}
        return told if self.route is None else {**told, "route": self.route, "arm": self.arm, "period": self.period}


@dataclass
class Feedback:
    """All votes. Everything runs on the event loop's thread; only the disk is waited for elsewhere.

    routes       whose arms are counted
    base_name    what the base is called in figures
    folder       where the file stands; None keeps votes in memory alone
    remembered   how many answers may be voted on, the latest
    longest      characters of a comment
    voted        told of each vote on an arm's answer: route, arm, and up, down or score
    arms, pairs  what votes (and calls, `figures`) came to: by route and arm, and by two models' names, sorted
    """

    routes: Routes
    base_name: str = "base"
    folder: Path | None = None
    remembered: int = 50_000
    longest: int = 2000
    voted: Callable[[str, str, str], None] = lambda *_: None
    arms: dict[tuple[str, str], ArmFigures] = field(default_factory=dict, init=False)
    pairs: dict[tuple[str, str], Preferences] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._one_by_one = asyncio.Lock()
        self._file: VoteFile | None = None
        if self.folder is not None:
            for record in read_votes(self.folder / FILE):
                self._count_again(record)
            self._file = VoteFile(self.folder / FILE)

    def close(self) -> None:
        """No more votes."""
        if self._file is not None:
            self._file.close()

    def remember(self, call: Call) -> None:
        """A call that begins: its answer may be voted on from now on."""
        target = call.target
        period = 0 if target.route is None else self.routes.get(target.route).period
        model = self.base_name if target.adapter is None else target.adapter
        self._answers[call.id] = Answer(call.caller.name, model, call.version, target.route, target.arm, period)
        while len(self._answers) > self.remembered:
            self._answers.popitem(last=False)

    def ended(self, call: Call) -> None:
        """Which version answered is known by now."""
        if call.id in self._answers:
            self._answers[call.id].version = call.version

    def figures(self, route: str, arm: str) -> ArmFigures:
        """An arm's, which its calls are counted in too."""
        return self.arms.setdefault((route, arm), ArmFigures())

    def restart(self, route: str) -> None:
        """A route's figures begin anew."""
        for name in [name for name in self.arms if name[0] == route]:
            del self.arms[name]

    def preferences(self, first: str, second: str) -> Preferences | None:
        """Side-by-side votes on two models, whichever way round they were shown; None where there are none."""
        if first <= second:
            return self.pairs.get((first, second))
        found = self.pairs.get((second, first))
        return None if found is None else found.turned()

    async def give(self, vote: Vote, tenant: str) -> dict[str, Any]:
        """Write a vote down and count it, also where who sent it does not wait; what is told of it. Raises ApiError:
        404 for an answer that this server did not give to this tenant, or gave too long ago."""
        if vote.comment is not None and len(vote.comment) > self.longest:
            raise ApiError(400, f"the comment has {len(vote.comment)} characters; {self.longest} are read", "comment")
        return await asyncio.shield(asyncio.ensure_future(self._give(vote, tenant)))

    async def _give(self, vote: Vote, tenant: str) -> dict[str, Any]:
        async with self._one_by_one:
            answers = {id: self._answer(id, tenant) for id in sorted(vote.ids)}
            if any(answer.votes >= _MOST_VOTES for answer in answers.values()):
                raise ApiError(400, f"an answer was voted on {_MOST_VOTES} times; that is enough", "id")
            record = _on_one(vote, answers) if vote.id is not None else _on_two(vote, answers)
            if self._file is not None:
                comment = {} if vote.comment is None else {"comment": vote.comment}
                await asyncio.to_thread(self._file.append, {"tenant": tenant, **record, **comment})
            self._count(record)
            _note(record, answers)
            if record.get("route") is not None:
                kind = "score" if vote.vote is None else "up" if vote.vote > 0 else "down"
                self.voted(record["route"], record["arm"], kind)
        return {"object": "feedback", "kept": self._file is not None, "replaced": record.get("replaces") is not None}

    def _answer(self, id: str, tenant: str) -> Answer:
        answer = self._answers.get(id)
        if answer is None or answer.tenant != tenant:
            raise ApiError(
                404, "no answer of this id was given to you, or too long ago, or before this server started",
                "id", "answer_not_found",
            )  # fmt: skip
        return answer

    def _count(self, record: Mapping[str, Any]) -> None:
        if "outcome" in record:
            self._count_pair(record)
        elif record.get("route") in self.routes.names():
            route = self.routes.get(record["route"])
            if record["arm"] in route.weights and record["period"] == route.period:
                figures = self.figures(route.name, record["arm"])
                _add(figures, record, 1)
                _add(figures, record.get("replaces") or {}, -1)

    def _count_pair(self, record: Mapping[str, Any]) -> None:
        first, second = record["first"]["model"], record["second"]["model"]
        key = (min(first, second), max(first, second))
        if first == second or (key not in self.pairs and len(self.pairs) >= _MOST_PAIRS):
            return
        tally = self.pairs.setdefault(key, Preferences())
        tally.add(record["outcome"], 1, turned=first > second)
        if record.get("replaces") is not None:
            tally.add(record["replaces"], -1, turned=first > second)

    def _count_again(self, record: Mapping[str, Any]) -> None:
        """A line of the file; one that was written by hand may lack anything."""
        try:
            self._count(record)
        except (KeyError, TypeError, ValueError):
            return


def _on_one(vote: Vote, answers: Mapping[str, Answer]) -> dict[str, Any]:
    ((id, answer),) = answers.items()
    said = {"vote": vote.vote} if vote.vote is not None else {"score": vote.score}
    return {"id": id, **answer.by(), **said, "replaces": answer.said}


def _on_two(vote: Vote, answers: Mapping[str, Answer]) -> dict[str, Any]:
    """`first` is the answer whose id is less, so that a pair is one pair whichever way round it is told."""
    (one, first), (other, second) = answers.items()
    if vote.tied is not None:
        outcome = "both_good" if vote.good else "both_bad"
    else:
        outcome = "first" if vote.preferred == one else "second"
    beside = first.beside or {}
    by = {"first": {"id": one, **first.by()}, "second": {"id": other, **second.by()}}
    return {**by, "outcome": outcome, "replaces": beside.get(other)}


def _note(record: Mapping[str, Any], answers: Mapping[str, Answer]) -> None:
    """What a next vote would replace."""
    for answer in answers.values():
        answer.votes += 1
    answer = next(iter(answers.values()))
    if "outcome" in record:
        answer.beside = {**(answer.beside or {}), record["second"]["id"]: record["outcome"]}
    else:
        answer.said = {kind: record[kind] for kind in ("vote", "score") if kind in record}


def _add(figures: ArmFigures, said: Mapping[str, Any], times: int) -> None:
    if "vote" in said:
        figures.votes.add(float(said["vote"] > 0), times)
    elif "score" in said:
        figures.scores.add(float(said["score"]), times)
