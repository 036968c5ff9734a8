"""Who may ask, and what they see."""

import hmac
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from serving.stage import config, stage
from topwork.serving.errors import ApiError
from topwork.serving.keys import new_key
from topwork.serving.tenants import Tenants

KEYS = {name: new_key() for name in ("ann", "bob", "ops", "prometheus")}
TENANTS = [
    {"name": "ann", "key_sha256": KEYS["ann"][1], "models": ["ann-*", "ab"]},
    {"name": "bob", "key_sha256": KEYS["bob"][1], "models": ["bob", "tiny"], "concurrent": 1},
    {"name": "ops", "key_sha256": KEYS["ops"][1], "admin": True},
    {"name": "prometheus", "key_sha256": KEYS["prometheus"][1], "models": [], "metrics": True},
]
ROUTE = {"name": "ab", "arms": [{"name": "a", "model": "ann-1"}, {"name": "b", "model": "bob"}]}


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name][0]}"}


@pytest.fixture
def client() -> TestClient:
    return TestClient(stage(["ann-1", "ann-2", "bob"], tenants=TENANTS, routes=[ROUTE]).app())


def ask(client: TestClient, name: str, model: str, **more: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "who are you"}], **more}
    return client.post("/v1/chat/completions", json=body, headers=bearer(name))


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic KEY",
        "KEY",
        "Bearer KEYx",
        "Bearer HASH",
        "Bearer \xe4\xff",
    ],
)
def test_no_key_and_a_wrong_one_are_answered_alike(authorization: str | None) -> None:
    headers = {}
    if authorization is not None:  # keys are not the same in two processes, and names of tests have to be
        headers = {"authorization": authorization.replace("KEY", KEYS["ann"][0]).replace("HASH", KEYS["ann"][1])}
    with pytest.raises(ApiError) as caught:
        Tenants(config(tenants=TENANTS).tenants).identify(headers)
    with pytest.raises(ApiError) as none:
        Tenants(config(tenants=TENANTS).tenants).identify({})
    assert caught.value.status == 401
    assert caught.value.body() == none.value.body()
    assert KEYS["ann"][0] not in str(caught.value)


def test_all_keys_are_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """In constant time each, and as many for the first, the last and none."""
    gate, compared = Tenants(config(tenants=TENANTS).tenants), []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append(1) or real(one, other))
    for headers in (bearer("ann"), bearer("prometheus"), {}):
        compared.clear()
        if headers:
            gate.identify(headers)
        else:
            with pytest.raises(ApiError):
                gate.identify(headers)
        assert len(compared) == len(TENANTS)


def test_a_key_is_told_once_and_its_hash_is_what_the_file_has() -> None:
    key, digest = new_key()
    gate = Tenants(config(tenants=[{"name": "ann", "key_sha256": [KEYS["bob"][1], digest.upper()]}]).tenants)
    assert gate.identify({"authorization": f"bearer {key}"}).name == "ann"
    assert gate.identify(bearer("bob")).name == "ann", "two keys while one takes over from the other"
    assert len({new_key()[0] for _ in range(50)}) == 50
    assert len(key) > 40


def test_what_one_may_not_use_is_not_there(client: TestClient) -> None:
    def seen(name: str) -> list[str]:
        return [card["id"] for card in client.get("/v1/models", headers=bearer(name)).json()["data"]]

    assert seen("ann") == ["ann-1", "ann-2", "ab"]
    assert seen("bob") == ["tiny", "bob"]
    assert seen("ops") == ["tiny", "ann-1", "ann-2", "bob", "ab"]
    assert seen("prometheus") == []
    assert ask(client, "ann", "ann-2").status_code == 200
    assert ask(client, "ann", "ab").status_code == 200, "a route that one may use, whoever answers"
    hidden, absent = ask(client, "ann", "bob"), ask(client, "ann", "bub")
    assert hidden.status_code == absent.status_code == 404
    assert hidden.text.replace("bob", "…") == absent.text.replace("bub", "…")
    assert ask(client, "bob", "ab").status_code == 404


def test_tenants_share_no_prompts_unless_they_are_to() -> None:
    def salts(**more: str) -> list[str]:
        tenants = [{**tenant, **more} for tenant in TENANTS[:2]]
        gate = Tenants(config(tenants=tenants).tenants)
        return [gate.identify(bearer(name)).salt for name in ("ann", "bob")]

    assert len(set(salts())) == 2
    assert len(set(salts(shared_prompts="us"))) == 1
    assert "" not in salts()
    gate = Tenants(config(tenants=[{**TENANTS[0], "shared_prompts": "bob"}, TENANTS[1]]).tenants)
    assert gate.identify(bearer("ann")).salt != gate.identify(bearer("bob")).salt, "a group is no tenant of its name"
    assert gate.identify(bearer("ann")).share == "ann"


def test_what_is_for_admins(client: TestClient) -> None:
    for method, path in (("GET", "/v1/routes/ab"), ("PUT", "/v1/routes/ab"), ("GET", "/v1/comparisons")):
        assert client.request(method, path, headers=bearer("ann")).status_code == 403
        assert client.request(method, path).status_code == 401
    assert client.get("/v1/routes/ab", headers=bearer("ops")).status_code == 200
    assert client.get("/v1/routes/ab", headers=bearer("bob")).status_code == 404, "it does not know that there is one"
    assert client.get("/v1/routes", headers=bearer("bob")).json()["data"] == []
    assert client.get("/v1/routes", headers=bearer("ann")).json()["data"] == [{"name": "ab"}]


def test_who_may_read_metrics(client: TestClient) -> None:
    codes = {name: client.get("/metrics", headers=bearer(name)).status_code for name in KEYS}
    assert codes == {"ann": 403, "bob": 403, "ops": 200, "prometheus": 200}
    assert client.get("/metrics").status_code == 401


def test_limits_are_told_over_http() -> None:
    tenants = [{**TENANTS[0], "requests_per_minute": 2, "tokens_per_minute": 1000}, TENANTS[1]]
    client = TestClient(stage(["ann-1", "bob"], tenants=tenants).app())
    first = ask(client, "ann", "ann-1")
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert ask(client, "ann", "ann-1").status_code == 200
    third = ask(client, "ann", "ann-1")
    assert third.status_code == 429
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert 29 <= int(third.headers["retry-after"]) <= 30
    assert int(third.headers["retry-after-ms"]) <= 30_000
    assert 988 <= int(third.headers["x-ratelimit-remaining-tokens"]) < 1000
    for _ in range(3):  # one at once, but one after the other
        answer = ask(client, "bob", "bob")
        assert answer.status_code == 200
        assert not any(name.startswith("x-ratelimit") for name in answer.headers)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_strangers_need_keys(host: str) -> None:
    with pytest.raises(ValidationError, match="reached from other machines"):
        config(host=host)
    assert config(host=host, no_auth=True).host == host
    assert config(host=host, tenants=TENANTS).host == host


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "::1", "[::1]"])
def test_this_machine_needs_none(host: str) -> None:
    assert config(host=host).host == host


@pytest.mark.parametrize(
    ("tenants", "told"),
    [
        ([{"name": "ann", "key_sha256": KEYS["ann"][0]}], "serve-key"),
        ([{"name": "ann", "key_sha256": "z" * 64}], "hexadecimal"),
        ([{"name": "ann", "key": "secret", "key_sha256": "a" * 64}], "Extra inputs"),
        ([TENANTS[0], {**TENANTS[1], "name": "ann"}], "one name or one key"),
        ([TENANTS[0], {**TENANTS[0], "name": "bob"}], "one name or one key"),
        ([{**TENANTS[0], "concurrent": 0}], "greater than or equal to 1"),
        ([{**TENANTS[0], "name": "a\nb"}], "pattern"),
    ],
)
def test_tenants_that_make_no_sense_are_refused(tenants: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        config(tenants=tenants)
