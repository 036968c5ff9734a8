"""What came of arms, over HTTP."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from serving.stage import stage
from topwork.serving.figures import ArmFigures, Times
from topwork.serving.seams import Call, Caller, Target

ROUTE = {"name": "ab", "arms": [{"name": "a", "model": "base", "weight": 3}, {"name": "b", "model": "x"}]}


def call(status: int = 200, seconds: float = 2.0, arm: str = "a", **values: Any) -> Call:
    return Call(
        "1", "chat", Caller(), "ab", Target(None, "ab", arm), arrived_at=10.0, first_token_at=10.5,
        ended_at=10.0 + seconds, prompt_tokens=7, generated_tokens=5, status=status, **values,
    )  # fmt: skip


@pytest.mark.parametrize("shape", ["exponential", "gamma"])
def test_quantiles_to_one_per_cent(shape: str) -> None:
    random = np.random.default_rng(1)
    seconds = random.exponential(0.3, 5000) if shape == "exponential" else random.gamma(3, 20, 5000)
    times = Times()
    for one in seconds:
        times.add(float(one))
    told = times.told()
    assert told["mean"] == pytest.approx(seconds.mean())
    assert told["p50"] == pytest.approx(np.quantile(seconds, 0.5, method="inverted_cdf"), rel=0.0101)
    assert told["p95"] == pytest.approx(np.quantile(seconds, 0.95, method="inverted_cdf"), rel=0.0101)
    assert Times().told() == {"mean": None, "p50": None, "p95": None}


def test_what_counts_as_what() -> None:
    figures = ArmFigures()
    for status in (200, 200, 500, 503, 499, 400, 404, 429):
        figures.count(call(status))
    told = figures.told()
    assert [told[name] for name in ("requests", "errors", "cancelled")] == [5, 2, 1]
    assert (told["prompt_tokens"], told["generated_tokens"]) == (35, 25)
    assert told["time_to_first_token_seconds"]["mean"] == 0.5
    assert figures.total.moments.count == 2, "how long a failure took says nothing of answers"


def client(**values: Any) -> tuple[TestClient, Any]:
    made = stage(["x"], routes=[ROUTE], **values)
    return TestClient(made.app()), made.parts.meter.feedback


def test_requests_are_counted_by_arm() -> None:
    http, _ = client()
    arms = []
    for number in range(40):
        body = {"model": "ab", "messages": [{"role": "user", "content": "three words here"}], "user": f"u{number}"}
        arms.append(http.post("/v1/chat/completions", json=body).headers["x-topwork-arm"])
    assert http.post("/v1/chat/completions", json={**body, "model": "x"}).headers.get("x-topwork-arm") is None
    told = http.get("/v1/routes/ab").json()
    assert [arm["requests"] for arm in told["arms"]] == [arms.count("a"), arms.count("b")]
    assert [arm["share"] for arm in told["arms"]] == [0.75, 0.25]
    assert told["arms"][1]["prompt_tokens"] == 3 * arms.count("b")
    assert told["arms"][1]["generated_tokens"] == 3 * arms.count("b")
    assert told["differences"][0]["errors"]["told"] == "no difference can be told yet"
    assert 0 < told["arms"][0]["time_to_first_token_seconds"]["p50"] <= told["arms"][0]["total_seconds"]["p95"] * 1.03


def test_weights_are_changed_over_http(tmp_path: Path) -> None:
    http, feedback = client()
    came = http.put("/v1/routes/ab", json={"weights": {"a": 0}})
    assert came.status_code == 200
    assert [arm["share"] for arm in came.json()["arms"]] == [0, 1]
    body = {"model": "ab", "messages": [{"role": "user", "content": "you"}]}
    met = {http.post("/v1/chat/completions", json=body).headers["x-topwork-arm"] for _ in range(10)}
    assert met == {"b"}
    assert any("weights were changed 1 times" in note for note in http.get("/v1/routes/ab").json()["notes"])
    feedback.figures("ab", "b").votes.add(1)
    told = http.put("/v1/routes/ab", json={"weights": {"a": 1}, "restart": True}).json()
    assert told["period"] == 1
    assert told["arms"][1]["requests"] == told["arms"][1]["votes"]["count"] == 0


@pytest.mark.parametrize(
    "body",
    ['{"weights": {"a": -1}}', '{"weights": {"a": NaN}}', '{"weights": {"c": 1}}', '{"weights": {"a": 0, "b": 0}}',
     "{}", '{"weights": {"a": "much"}}', '{"weights": []}', "[]", '{"weights": {}, "x": 1}'],
)  # fmt: skip
def test_weights_that_make_no_sense_are_refused(body: str) -> None:
    http, _ = client()
    came = http.put("/v1/routes/ab", content=body, headers={"content-type": "application/json"})
    assert came.status_code == 400, came.text
    assert [arm["weight"] for arm in http.get("/v1/routes/ab").json()["arms"]] == [3, 1]


def test_a_vote_from_before_a_restart_of_figures_is_not_of_after(tmp_path: Path) -> None:
    http, _ = client(state_folder=str(tmp_path))
    body = {"model": "ab", "messages": [{"role": "user", "content": "you"}]}
    id = http.post("/v1/chat/completions", json=body).json()["id"]
    http.put("/v1/routes/ab", json={"weights": {}, "restart": True})
    assert http.post("/v1/feedback", json={"id": id, "vote": 1}).status_code == 200
    assert [arm["votes"]["count"] for arm in http.get("/v1/routes/ab").json()["arms"]] == [0, 0]
    assert json.loads((tmp_path / "feedback.jsonl").read_text())["period"] == 0


def test_several_arms_are_each_compared_with_the_first_at_a_level_that_pays_for_it() -> None:
    arms = [{"name": name, "model": "base"} for name in "abc"]
    http = TestClient(stage([], routes=[{"name": "abc", "arms": arms}]).app())
    told = http.get("/v1/routes/abc").json()
    assert [(entry["arm"], entry["against"]) for entry in told["differences"]] == [("b", "a"), ("c", "a")]
    assert {entry["votes"]["level"] for entry in told["differences"]} == {0.975}
    assert http.get("/v1/routes/nothing").status_code == 404


def test_versions_that_answered_together_are_told() -> None:
    http, feedback = client()
    for version in ("one", "two"):
        feedback.figures("ab", "b").count(call(arm="b", version=version))
    told = http.get("/v1/routes/ab").json()
    assert told["arms"][1]["versions"] == ["one", "two"]
    assert "arm b was answered by 2 versions of its adapter, counted together" in told["notes"]
