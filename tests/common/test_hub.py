"""Asking the Hub whether it has a name: once, briefly, and with the cache before."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from run.hub_stand_in import HubStandIn
from topwork.common import hub
from topwork.common.errors import DataError, ModelError
from topwork.common.hub import ask_hub, is_hub_id
from topwork.data.files.places import find_place
from topwork.models.config import ModelConfig
from topwork.models.config_files import find_config
from topwork.models.source import Source, find_source
from topwork.plan.built import config_of

COMMIT = "a" * 40


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nobody said offline; the Hub's caches are empty, and the current folder is."""
    hub._asked.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    return tmp_path


def endpoint(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What HF_ENDPOINT sets where it stands before the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def stand_in(online: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    server = HubStandIn()
    endpoint(monkeypatch, server.address)
    yield server
    server.shutdown()
    server.server_close()


def cache_model(root: Path, name: str = "owner/base") -> Path:
    """As huggingface_hub's cache has it."""
    repository = root / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    return snapshot


def asked(server: HubStandIn) -> list[str]:
    """Requests for a file; the client has others of its own, once a day."""
    return [request for request in server.seen if "/resolve/" in request]


def find(name: str) -> object:
    return find_source(ModelConfig(model_name_or_path=name), lambda _: None)


def test_what_is_no_hub_id() -> None:
    names = ["owner/name", "owner/na.me-1_x", "name", "a/b/c", "a/b--c", "a/b..c", "a/b.git", "a/b-", "a/" + "b" * 95]
    assert [name for name in names if is_hub_id(name)] == ["owner/name", "owner/na.me-1_x"]


def test_a_name_that_the_hub_does_not_have_is_asked_for_once(stand_in: HubStandIn) -> None:
    (Path("model")).mkdir()
    with pytest.raises(ModelError, match=r"tried as a Hub id: the Hub has none.*did you mean 'model'"):
        find("models/x")
    assert asked(stand_in) == ["HEAD /models/x/resolve/main/config.json"]
    with pytest.raises(DataError, match=r"no data set .rows/x..*tried as a Hub id: the Hub has none"):
        ask_hub("rows/x", None, "dataset")
    assert len(asked(stand_in)) == 2


def test_a_folder_of_the_owners_name_does_not_hide_what_the_hub_has(stand_in: HubStandIn) -> None:
    (Path("owner") / "base-7b").mkdir(parents=True)
    stand_in.put("owner/base-1b", {"config.json": b"{}"})
    stand_in.repos["owner/base-1b"].branches["main"] = [("main", {"config.json": b"{}"})]
    assert find("owner/base-1b") == Source("owner/base-1b", "owner/base-1b", None)
    with pytest.raises(ModelError, match=r"the Hub has none.*did you mean 'owner/base-7b'"):
        find("owner/base-7")
    with pytest.raises(ModelError, match=r"the Hub has none.*did you mean 'owner/base-7b'"):
        config_of("owner/base-7")
    assert find_place("owner/rows") is None


def test_a_name_that_it_has_is_asked_for_once(stand_in: HubStandIn) -> None:
    stand_in.put("owner/base", {"config.json": b"{}"})
    stand_in.repos["owner/base"].branches["main"] = [("main", {"config.json": b"{}"})]  # asked for by its branch
    for _ in range(3):
        assert ask_hub("owner/base", None, "model") is None
    assert asked(stand_in) == ["HEAD /owner/base/resolve/main/config.json"]


def test_a_hub_that_is_out_of_order_is_asked_once(stand_in: HubStandIn, online: Path) -> None:
    """Its client would go on for half a minute; a copy that is here is taken."""
    stand_in.refuse["HEAD /owner/base"] = (503, "busy")
    with pytest.raises(ModelError, match="it answers 503"):
        ask_hub("owner/base", None, "model")
    assert len(asked(stand_in)) == 1
    copy = cache_model(online)
    assert ask_hub("owner/base", None, "model") == copy


def test_a_server_that_knows_no_such_page(stand_in: HubStandIn) -> None:
    stand_in.refuse["HEAD /owner/base"] = (404, "no such page")
    with pytest.raises(ModelError, match=r"tried as a Hub id: http.* has no such page"):
        find("owner/base")


def test_a_network_that_is_not_there_is_tried_once(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(ModelError, match=r"tried as a Hub id: http.*cannot be reached \("):
            find("models/x")
        snapshot, said = cache_model(online), list[str]()
        found = find_source(ModelConfig(model_name_or_path="owner/base"), said.append)
    assert (found.name, found.folder, found.revision) == ("owner/base", str(snapshot), None)
    assert "the Hub cannot be reached or does not give it; the copy in its cache is taken" in said[0]


def test_a_network_that_swallows_everything(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ModelError, match=r"did not answer within 0\.2 s"):
            find("models/x")


def test_offline_nobody_is_asked(stand_in: HubStandIn, online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set and the Hub's cache here has no copy"):
        find("models/x")
    cache_model(online)
    assert ask_hub("owner/base", None, "model") is None, "its client takes the copy by itself"
    assert asked(stand_in) == []


@pytest.mark.parametrize("name", ["./models/x", "a/b/c", "~/x", "x.gguf", "owner\\name", "$HOME/x"])
def test_what_can_only_be_a_path_is_asked_of_nobody(name: str, stand_in: HubStandIn) -> None:
    with pytest.raises(ModelError):
        find(name)
    with pytest.raises(DataError):
        find_place(name)
    assert asked(stand_in) == []


def test_a_config_is_read_from_the_cache_else_asked_for_once(stand_in: HubStandIn, online: Path) -> None:
    cache_model(online)
    found = find_config("owner/base")
    assert (found.values(), found.hub_id) == ({}, "owner/base")
    assert asked(stand_in) == []
    stand_in.put("owner/other", {"config.json": b'{"model_type": "llama"}'})
    stand_in.repos["owner/other"].branches["main"] = [("main", {"config.json": b'{"model_type": "llama"}'})]
    for _ in range(2):
        assert find_config("owner/other").values() == {"model_type": "llama"}
    assert len([request for request in asked(stand_in) if request.startswith("GET")]) == 1
