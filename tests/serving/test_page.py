"""The page, in a headless Chromium."""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serving import browser
from serving.scripted import served as whole_served
from serving.scripted import words
from serving.stage import BASE, Stage, config, served, stage
from topwork.models.base import Base
from topwork.serving.endpoints import PAGE
from topwork.serving.errors import ApiError
from topwork.serving.keys import new_key
from topwork.serving.parts import parts_of

needs_chromium = pytest.mark.skipif(browser.found() is None, reason="no Chromium is installed to open the page with")
SAID = {"support": ["<b>Unplug</b> ", "the kettle ", "& wait."], "json": ['{"urgent": ', "true}"]}
LISTED = "document.querySelectorAll('#model-0 option').length === 3"
VOTES = "[...document.querySelectorAll('.votes')].at(-1)?.hidden === false"
TOLD = "[...document.querySelectorAll('.told')].at(-1)?.textContent"


def say(model: str, question: str) -> list[str]:
    if question == "fail":
        raise ApiError(429, "the limit of 2 requests a minute is reached", code="rate_limit_exceeded")
    return SAID.get(model, [f"You said: {question}"])


def made(**values: object) -> Stage:
    return stage(["support", "json"], say, **values)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[browser.Page]:
    with browser.page(tmp_path / "profile") as opened:
        yield opened


def ask(page: browser.Page, question: str) -> None:
    page.click("#question")
    page.type(question)
    page.press("Enter", "\r")


def texts(page: browser.Page) -> list[str]:
    return page.value("[...document.querySelectorAll('.round:last-of-type .text')].map((one) => one.textContent)")


def votes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "feedback.jsonl").read_text().splitlines()]


@needs_chromium
def test_two_answers_and_a_vote(page: browser.Page, tmp_path: Path) -> None:
    with served(made(state_folder=str(tmp_path / "state")).app()) as url:
        page.open(f"{url}/")
        page.until(LISTED)
        for which, name in enumerate(("support", "json")):
            page.value(f"document.getElementById('model-{which}').value = '{name}'")
        ask(page, "My <i>kettle</i> leaks.")
        page.until(VOTES)
        assert texts(page) == ["".join(SAID["support"]), "".join(SAID["json"])]
        assert page.value("document.querySelector('.question').textContent") == "My <i>kettle</i> leaks."
        assert page.value("document.querySelectorAll('main b, main i').length") == 0, "what models say is no HTML"
        assert page.value("document.querySelector('[data-figure=tokens]').textContent") == "3"
        page.click("[data-vote=right]")
        page.until(f"{TOLD}.includes('So far')")
        (line,) = votes(tmp_path / "state")
        assert line[line["outcome"]]["model"] == "json"
        assert {line["first"]["model"], line["second"]["model"]} == {"support", "json"}
        assert page.value(TOLD).endswith("So far json 1, support 0, ties 0: no difference can be told yet.")
        assert page.value("document.querySelector('[data-vote=right]').getAttribute('aria-pressed')") == "true"
        page.click("[data-vote=bad]")  # on second thoughts
        page.until(f"{TOLD}.includes('ties 1')")
        assert [line["outcome"] for line in votes(tmp_path / "state")][1] == "both_bad"
    assert page.complaints == []


@needs_chromium
def test_by_keys_alone_blind_and_on_and_on(page: browser.Page, tmp_path: Path) -> None:
    with served(made(state_folder=str(tmp_path / "state")).app()) as url:
        page.open(f"{url}/")
        page.until(LISTED)
        page.value("document.getElementById('blind').click()")
        for which, name in enumerate(("support", "json")):
            page.value(f"document.getElementById('model-{which}').value = '{name}'")
        page.value("Math.random = () => 0")  # the draw that turns sides
        page.value("document.getElementById('question').focus()")
        page.type("first")
        page.press("Enter", "\r")
        page.until(VOTES)
        names = "[...document.querySelectorAll('.round:last-of-type h3')].map((one) => one.textContent)"
        assert page.value(names) == ["First answer", "Second answer"]
        page.press("1", "1")
        page.until(f"{TOLD}.includes('kept')")
        assert page.value(names) == ["json", "support"], "and after the vote it is told who was who"
        page.press("n", "n")  # a letter goes to the next question
        page.type("ext one")
        page.press("Enter", "\r")
        page.until("document.querySelectorAll('.round').length === 2 && " + VOTES)
        assert page.value("[...document.querySelectorAll('.question')].at(-1).textContent") == "next one"
        page.press("2", "2")
        page.until(f"{TOLD}.includes('kept')")
        first, second = votes(tmp_path / "state")
        assert first[first["outcome"]]["model"] == "json"
        assert second["outcome"] == "both_good"


@needs_chromium
def test_a_key_is_asked_for_and_errors_are_told(page: browser.Page) -> None:
    key, digest = new_key()
    tenants = [{"name": "ann", "key_sha256": digest, "models": ["support", "json"]}]
    with served(made(tenants=tenants).app()) as url:
        page.open(f"{url}/")
        page.until("!document.getElementById('key-form').hidden")
        page.click("#key")
        page.type("tw-wrong")
        page.press("Enter", "\r")
        page.until("document.getElementById('key-told').textContent.includes('does not know')")
        page.click("#key")
        page.value("document.getElementById('key').value = ''")
        page.type(key)
        page.press("Enter", "\r")
        page.until("document.querySelectorAll('#model-0 option').length === 2")
        assert page.value("document.getElementById('key-form').hidden")
        ask(page, "fail")
        page.until("document.querySelectorAll('.failed').length === 2")
        assert texts(page) == ["the limit of 2 requests a minute is reached"] * 2
        assert page.value("document.querySelector('.votes').hidden"), "what failed is not voted on"
        ask(page, "again")
        page.until(VOTES)


@needs_chromium
def test_over_the_whole_server(page: browser.Page, base: Base, adapters: Path, tmp_path: Path) -> None:
    said = words(base, "Yes. See you")
    values = {
        "adapters": {name: str(adapters / name) for name in ("one", "two")}, "state_folder": str(tmp_path / "state"),
    }  # fmt: skip
    parts = parts_of(config(**values), [BASE])
    with whole_served(base, lambda _: said, parts=parts, **values) as (_, _, address):
        page.open(f"http://127.0.0.1:{address[1]}/")
        page.until(LISTED)
        for which, name in enumerate(("one", "two")):
            page.value(f"document.getElementById('model-{which}').value = '{name}'")
        ask(page, "Hello!")
        page.until(VOTES)
        assert texts(page) == ["Yes. See you"] * 2
        assert page.value("document.querySelector('[data-figure=tokens]').textContent") == str(len(said))
        page.click("[data-vote=left]")
        page.until(f"{TOLD}.includes('So far one 1, two 0')")
    (line,) = votes(tmp_path / "state")
    assert line[line["outcome"]]["model"] == "one"
    assert len(line["first"]["version"]) == len(line["second"]["version"]) > 0
    assert page.complaints == []


@pytest.mark.parametrize("name", ["", *(f"page/{name}" for name in PAGE)])
def test_the_page_needs_nothing_from_elsewhere(name: str) -> None:
    came = TestClient(made().app()).get(f"/{name}")
    assert came.status_code == 200
    policy = came.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    linked = re.findall(r"""(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}""", came.text)
    assert set(linked) <= {"http://www.w3.org"}, "nothing but the namespace of a picture"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=|style=", came.text)


def test_the_page_has_no_other_files() -> None:
    assert {path.name for path in files("topwork.serving").joinpath("page").iterdir()} == set(PAGE)
    client = TestClient(made().app())
    for name in ("page.py", "..%2Fpage.js", "%2e%2e/config.py"):
        assert client.get(f"/page/{name}").status_code == 404
