"""Votes: on which answers, what is kept of them, what they come to."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.stage import Stage, stage
from topwork.serving.comparison import newcombe
from topwork.serving.keys import new_key

ARMS = [{"name": "plain", "model": "base"}, {"name": "tuned", "model": "support"}]
ROUTE = {"name": "ab", "arms": ARMS, "sticky": "user"}


class Asked:
    """A server's client, and what it asks most."""

    def __init__(self, state: Path | None, key: str | None = None, **values: Any) -> None:
        folder = {} if state is None else {"state_folder": str(state)}
        self.stage: Stage = stage(["support", "sql"], routes=[ROUTE], **{**folder, **values})
        self.stage.ids = iter(range(next(STARTS), 10**9))
        self.client = TestClient(self.stage.app())

    def answer(self, model: str = "ab", key: str | None = None, user: str | None = None) -> tuple[str, str | None]:
        """An answer's id and its arm."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello you"}], "user": user}
        came = self.client.post("/v1/chat/completions", json=body, headers=_bearer(key))
        assert came.status_code == 200, came.text
        return came.json()["id"], came.headers.get("x-topwork-arm")

    def by(self, arm: str) -> str:
        """An answer of this arm."""
        return next(id for id, came in iter(self.answer, None) if came == arm)

    def vote(self, key: str | None = None, **body: Any) -> Any:
        """As it is answered."""
        return self.client.post("/v1/feedback", json=body, headers=_bearer(key))

    def told(self, key: str | None = None) -> dict[str, Any]:
        """The route's figures."""
        return self.client.get("/v1/routes/ab", headers=_bearer(key)).json()

    def votes(self, key: str | None = None) -> dict[str, tuple[int, float | None]]:
        """By arm: how many, and the share of those that are up."""
        return {arm["name"]: (arm["votes"]["count"], arm["votes"]["share_up"]) for arm in self.told(key)["arms"]}


STARTS = iter(range(0, 10**9, 10**5))
"""Ids of one server are not another's, as with real ones."""


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def lines(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (state / "feedback.jsonl").read_text().splitlines()]


def test_a_vote_is_counted_for_its_arm_and_kept(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    id = asked.by("tuned")
    assert asked.vote(id=id, vote=1, comment="it knew!").json() == {
        "object": "feedback", "kept": True, "replaced": False,
    }  # fmt: skip
    asked.vote(id=asked.by("tuned"), vote=-1)
    asked.vote(id=asked.by("plain"), score=0.75)
    assert asked.votes() == {"plain": (0, None), "tuned": (2, 0.5)}
    assert asked.told()["arms"][0]["scores"] | {"interval": 0, "always_valid": 0} == {
        "count": 1, "mean": 0.75, "interval": 0, "always_valid": 0,
    }  # fmt: skip
    (first, *_), third = lines(tmp_path), lines(tmp_path)[2]
    assert (first["id"], first["arm"], first["model"], first["vote"]) == (id, "tuned", "support", 1)
    assert first["comment"] == "it knew!"
    assert (third["model"], third["score"]) == ("tiny", 0.75)
    assert "hello" not in json.dumps(lines(tmp_path)), "what was asked is not in it"


def test_a_second_vote_replaces_the_first(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    id = asked.by("tuned")
    asked.vote(id=id, vote=1)
    assert asked.vote(id=id, vote=-1).json()["replaced"]
    assert asked.votes()["tuned"] == (1, 0.0)
    asked.vote(id=id, score=1)
    assert asked.votes()["tuned"] == (0, None)
    assert asked.told()["arms"][1]["scores"]["count"] == 1
    assert len(lines(tmp_path)) == 3


def test_all_is_counted_again_after_a_crash(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    ids = [asked.by("tuned") for _ in range(4)]
    for id, vote in zip([*ids, ids[0]], [1, 1, 1, -1, -1]):
        asked.vote(id=id, vote=vote)
    asked.vote(preferred=ids[0], rejected=asked.by("plain"))
    before = asked.votes(), asked.told()["differences"][0]["side_by_side"]
    with open(tmp_path / "feedback.jsonl", "ab") as file:
        file.write(b'{"id": "chatcmpl-9", "route": "ab", "arm": "tun')  # where the machine went down
    again = Asked(tmp_path)
    assert (again.votes(), again.told()["differences"][0]["side_by_side"]) == before
    assert again.vote(id=ids[0], vote=1).status_code == 404, "which answers there were is not kept"
    again.vote(id=again.by("tuned"), vote=1)
    assert Asked(tmp_path).votes() == again.votes() == {"plain": (0, None), "tuned": (5, 0.6)}


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\n", b"[1]\n", b"17\n", b'{"route": "ab"}\n', b'{"outcome": "first", "first": 3}\n', b"\n"]
)
def test_lines_that_are_not_ours_are_passed_over(tmp_path: Path, line: bytes) -> None:
    asked = Asked(tmp_path)
    asked.vote(id=asked.by("tuned"), vote=1)
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(line + path.read_bytes())
    assert Asked(tmp_path).votes()["tuned"] == (1, 1.0)


def test_only_who_was_answered_may_vote(tmp_path: Path) -> None:
    (ann, ann_hash), (bob, bob_hash) = new_key(), new_key()
    tenants = [{"name": "ann", "key_sha256": ann_hash}, {"name": "bob", "key_sha256": bob_hash, "admin": True}]
    asked = Asked(tmp_path, tenants=tenants)
    id, _ = asked.answer(key=ann)
    other, _ = asked.answer(key=bob)
    refused = asked.vote(bob, id=id, vote=1)
    assert refused.status_code == 404
    assert refused.json() == asked.vote(bob, id="chatcmpl-never", vote=1).json()
    assert asked.vote(bob, preferred=other, rejected=id).status_code == 404
    assert asked.vote(id=id, vote=1).status_code == 401
    assert sum(count for count, _ in asked.votes(bob).values()) == 0
    assert asked.vote(ann, id=id, vote=1).status_code == 200
    assert sum(count for count, _ in asked.votes(bob).values()) == 1
    assert [line["tenant"] for line in lines(tmp_path)] == ["ann"]


def test_answers_are_forgotten_in_their_order(tmp_path: Path) -> None:
    asked = Asked(tmp_path, feedback={"answers_remembered": 2})
    first, second, third = (asked.answer()[0] for _ in range(3))
    assert [asked.vote(id=id, vote=1).status_code for id in (first, second, third)] == [404, 200, 200]


def test_an_answer_is_voted_on_so_often_and_no_more(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    id = asked.by("tuned")
    codes = [asked.vote(id=id, vote=(-1) ** number).status_code for number in range(40)]
    assert codes == [200] * 32 + [400] * 8
    assert len(lines(tmp_path)) == 32, "nobody fills the disk with one answer"
    assert asked.vote(preferred=asked.by("plain"), rejected=id).status_code == 400


def test_two_side_by_side(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    for outcome in ("sql", "sql", "support", "good", "bad"):
        support, sql = asked.answer("support")[0], asked.answer("sql")[0]
        if outcome in ("good", "bad"):
            came = asked.vote(tied=[sql, support], good=outcome == "good")
        elif outcome == "sql":
            came = asked.vote(preferred=sql, rejected=support)
        else:
            came = asked.vote(preferred=support, rejected=sql)
        assert came.status_code == 200
    (pair,) = asked.client.get("/v1/comparisons").json()["data"]
    counted = {name: pair[name] for name in ("first", "second", "first_preferred", "second_preferred")}
    assert counted == {"first": "sql", "second": "support", "first_preferred": 2, "second_preferred": 1}
    assert (pair["both_good"], pair["both_bad"], pair["told"]) == (1, 1, "no difference can be told yet")
    again = Asked(tmp_path).client.get("/v1/comparisons").json()["data"]
    assert again == [pair]


def test_a_pair_is_one_pair_whichever_way_round(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    one, other = asked.answer("support")[0], asked.answer("sql")[0]
    asked.vote(preferred=one, rejected=other)
    assert asked.vote(preferred=other, rejected=one).json()["replaced"]
    (pair,) = asked.client.get("/v1/comparisons").json()["data"]
    assert (pair["first"], pair["first_preferred"], pair["second_preferred"]) == ("sql", 1, 0)


def test_a_difference_is_told_when_it_can_be_and_no_winner_before(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    plain, tuned = asked.by("plain"), asked.by("tuned")
    figures = {arm: asked.stage.parts.meter.feedback.figures("ab", arm) for arm in ("plain", "tuned")}
    asked.vote(id=plain, vote=-1)
    asked.vote(id=tuned, vote=1)
    (entry,) = asked.told()["differences"]
    assert (entry["arm"], entry["against"], entry["votes"]["difference"]) == ("tuned", "plain", 1.0)
    assert entry["votes"]["told"] == "no difference can be told yet"
    for arm, ups in (("plain", 40), ("tuned", 62)):  # as many as a day may bring
        for number in range(100):
            figures[arm].votes.add(float(number < ups))
    (entry,) = asked.told()["differences"]
    assert entry["votes"]["interval"] == pytest.approx(newcombe(40, 101, 63, 101))
    assert entry["votes"]["interval"][0] > 0 > entry["votes"]["always_valid"][0]
    assert entry["votes"]["told"].startswith("no difference can be told yet (a single look")
    for number in range(300):
        figures["plain"].votes.add(float(number < 120))
        figures["tuned"].votes.add(float(number < 186))
    (entry,) = asked.told()["differences"]
    low, high = entry["votes"]["always_valid"]
    assert 0 < low < entry["votes"]["difference"] < high
    assert (
        entry["votes"]["told"] == f"tuned: more of its answers are voted up than of plain, by {low:.3f} to {high:.3f}"
    )
    assert "win" not in json.dumps(asked.told())


@pytest.mark.parametrize(
    "body",
    [
        {}, {"id": "x"}, {"id": "x", "vote": 2}, {"id": "x", "vote": 0}, {"id": "x", "vote": 1, "score": 1},
        {"id": "x", "score": 1.5}, {"id": "x", "score": -0.1}, {"vote": 1}, {"preferred": "x"},
        {"preferred": "x", "rejected": "x"}, {"preferred": "x", "rejected": "y", "vote": 1}, {"tied": ["x"]},
        {"tied": ["x", "x"]}, {"tied": ["x", "y"], "id": "z", "vote": 1}, {"id": "x" * 201, "vote": 1},
        {"id": "x", "vote": 1, "comment": "!" * 2001}, {"id": "x", "vote": 1, "colour": "red"}, {"id": 3, "vote": 1},
    ],
)  # fmt: skip
def test_votes_that_make_no_sense_are_refused(body: dict[str, Any], tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    came = asked.vote(**body)
    assert came.status_code == 400, came.text
    assert set(came.json()["error"]) == {"message", "type", "param", "code"}
    assert (tmp_path / "feedback.jsonl").read_bytes() == b""


def test_without_a_folder_votes_count_and_are_not_kept() -> None:
    asked = Asked(None)
    assert asked.vote(id=asked.by("tuned"), vote=1).json()["kept"] is False
    assert asked.votes()["tuned"] == (1, 1.0)


def test_a_vote_that_cannot_be_written_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(tmp_path)
    id = asked.by("tuned")

    def full(record: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(asked.stage.parts.meter.feedback._file, "append", full)
    with pytest.raises(OSError, match="No space"):
        asked.vote(id=id, vote=1)
    assert asked.votes()["tuned"] == (0, None)
