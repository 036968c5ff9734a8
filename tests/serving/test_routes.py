"""Who meets which arm."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.stage import config
from topwork.serving.errors import ApiError
from topwork.serving.routes import Route, Routes
from topwork.serving.seams import Caller, Target

ANYONE = Caller()
KEYS = [f"user {number}" for number in range(4000)]


def routes(*weights: float, sticky: str = "user", **more: Any) -> Routes:
    arms = [{"name": f"arm{i}", "model": f"adapter{i}", "weight": weight} for i, weight in enumerate(weights)]
    return Routes(config(routes=[{"name": "ab", "arms": arms, "sticky": sticky}]).routes, ["tiny"], **more)


def arms(route: Route) -> dict[str, str]:
    return {key: route.arm_of(key).name for key in KEYS}


@pytest.mark.parametrize("weights", [(1, 1), (9, 1), (0.5, 0.3, 0.2), (1, 0, 3)])
def test_arms_meet_their_shares(weights: tuple[float, ...]) -> None:
    counted = Counter(arms(routes(*weights).get("ab")).values())
    for name, weight in enumerate(weights):
        share = weight / sum(weights)
        off = 4 * (share * (1 - share) / len(KEYS)) ** 0.5  # four standard deviations
        assert counted[f"arm{name}"] / len(KEYS) == pytest.approx(share, abs=off)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.floats(0.1, 10))
def test_another_weight_moves_keys_to_its_arm_or_away_from_it_alone(weights: list[float], new: float) -> None:
    made = routes(*weights)
    before = arms(made.get("ab"))
    after = arms(made.change("ab", {"arm0": new}))
    moved = [(before[key], after[key]) for key in KEYS if before[key] != after[key]]
    assert all((now if new > weights[0] else then) == "arm0" for then, now in moved)


def test_a_key_meets_its_arm_again_and_other_salts_deal_anew() -> None:
    assert arms(routes(1, 1).get("ab")) == arms(routes(1, 1).get("ab"))
    salted = routes(1, 1).configs[0].model_copy(update={"salt": "again"})
    same = sum(a == b for a, b in zip(arms(routes(1, 1).get("ab")).values(), arms(Routes([salted]).get("ab")).values()))
    assert same / len(KEYS) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("sticky", "asked"),
    [
        ("user", lambda made, i: made.resolve("ab", ANYONE, f"u{i}", {})),
        ("key", lambda made, i: made.resolve("ab", Caller(f"tenant{i}"), None, {})),
        ("header:X-Session", lambda made, i: made.resolve("ab", ANYONE, None, {"x-session": f"s{i}"})),
    ],
)
def test_what_sticks(sticky: str, asked: Any) -> None:
    made = routes(1, 1, sticky=sticky)
    once = [asked(made, i) for i in range(50)]
    assert once == [asked(made, i) for i in range(50)]
    assert {target.arm for target in once} == {"arm0", "arm1"}


@pytest.mark.parametrize("sticky", ["user", "key", "header:x-session", "none"])
def test_what_does_not_stick_is_dealt_anew(sticky: str) -> None:
    made = routes(1, 1, sticky=sticky)
    user = "always the same" if sticky == "none" else None
    assert {made.resolve("ab", ANYONE, user, {}).arm for _ in range(60)} == {"arm0", "arm1"}


def test_users_of_two_tenants_are_two() -> None:
    made = routes(1, 1)
    met = [tuple(made.resolve("ab", Caller(name), f"u{i}", {}).arm for name in ("a", "b")) for i in range(60)]
    assert len(set(met)) == 4


def test_an_arm_may_be_the_base() -> None:
    arms = [
        {"name": "a"},
        {"name": "b", "model": "base"},
        {"name": "c", "model": "tiny"},
        {"name": "d", "adapter": "x"},
    ]
    made = Routes(config(routes=[{"name": "ab", "arms": arms}]).routes, ["tiny"])
    found = {made.resolve("ab", ANYONE, str(i), {}) for i in range(200)}
    assert found == {Target(None, "ab", "a"), Target(None, "ab", "b"), Target(None, "ab", "c"), Target("x", "ab", "d")}
    assert made.resolve("tiny", ANYONE, None, {}) is None
    assert made.missing(["y"]) == ["arm 'd' of route 'ab': no adapter is called 'x'"]
    assert made.missing(["x"]) == []


def test_weights_are_changed_live_and_found_again() -> None:
    kept: list[dict[str, Any]] = []
    made = routes(1, 1, keep=kept.append)
    made.change("ab", {"arm0": 0})
    assert {made.resolve("ab", ANYONE, None, {}).arm for _ in range(40)} == {"arm1"}
    assert made.change("ab", {"arm0": 3}).changed == 2
    saved = json.loads(json.dumps(kept[-1]))
    again = routes(1, 1, saved=saved).get("ab")
    assert (again.weights, again.period, again.changed) == ({"arm0": 3, "arm1": 1}, 0, 2)
    edited = routes(1, 2, saved=saved).get("ab")
    assert (edited.weights, edited.period) == ({"arm0": 1, "arm1": 2}, 1), "who edits the file means the file"


def test_each_edit_of_the_file_begins_a_period() -> None:
    kept: list[dict[str, Any]] = [{}]
    for weights, period in (((1, 1), 0), ((1, 1), 0), ((1, 2), 1), ((1, 2), 1), ((1, 3), 2), ((1, 1), 3)):
        assert routes(*weights, saved=kept[-1], keep=kept.append).get("ab").period == period


def test_a_restart_begins_a_period() -> None:
    made = routes(1, 1)
    made.change("ab", {"arm0": 2})
    route = made.change("ab", {}, restart=True)
    assert (route.period, route.changed, route.weights["arm0"]) == (1, 0, 2)


@pytest.mark.parametrize(("weights", "status"), [({"arm2": 1}, 400), ({"arm0": 0, "arm1": 0}, 400)])
def test_what_cannot_be_is_refused_and_changes_nothing(weights: dict[str, float], status: int) -> None:
    made = routes(1, 1)
    with pytest.raises(ApiError) as caught:
        made.change("ab", weights)
    assert caught.value.status == status
    assert made.get("ab").weights == {"arm0": 1, "arm1": 1}
    with pytest.raises(ApiError, match="no route"):
        made.change("nothing", {})


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        ([{"name": "a"}, {"name": "a"}], "one name"),
        ([{"name": "a", "weight": 0}], "weight 0"),
        ([{"name": "a", "weight": -1}], "greater than or equal to 0"),
        ([{"name": "a", "weight": float("inf")}], "finite"),
        ([{"name": "a b"}], "pattern"),
        ([], "at least 1"),
    ],
)
def test_routes_that_make_no_sense_are_refused(arms: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        config(routes=[{"name": "ab", "arms": arms}])
