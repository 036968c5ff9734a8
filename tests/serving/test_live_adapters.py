"""Adapters that come, are replaced and go while requests run: each is answered by the version of its admission."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

from serving.scripted import BASE, Scripted, adapter_folder, scripted, words
from serving.test_refusals import COMPLETIONS, LOAD, UNLOAD, check
from topwork.adapters.graft import Adapters
from topwork.data.chat.template import ChatTemplate
from topwork.generation.versions import Capacity
from topwork.models.base import Base


def tried(base: Base, work: Any, folder: Path, **values: Any) -> None:
    async def run() -> None:
        async with scripted(base, lambda _: words(base, "Yes. No."), adapters_folder=str(folder), **values) as made:
            await work(made)

    asyncio.run(run())


async def load(made: Scripted, name: str, path: str, **fields: Any) -> None:
    response = await made.client.post(LOAD, json={"lora_name": name, "lora_path": path, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain")
    assert name in response.text


async def ask(made: Scripted, model: str, **fields: Any) -> Any:
    return await made.client.post(COMPLETIONS, json={"model": model, "prompt": "Hi", **fields})


def test_an_adapter_comes_is_listed_asked_and_goes(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        await load(made, "one", "one")
        await load(made, "org/two@v1", str(adapters / "two"))
        cards = (await made.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == [BASE, "one", "org/two@v1"]
        assert [card["parent"] for card in cards] == [None, BASE, BASE]
        assert str(adapters) not in str(cards)
        assert (await made.client.get("/v1/models/org/two@v1")).json() == cards[2]
        told = (await made.client.post(LOAD, json={"lora_name": "three", "lora_path": f"{adapters.name}/two"})).text
        assert "from the folder that adapters are loaded from" in told
        told = (await made.client.post(UNLOAD, json={"lora_name": BASE})).text
        assert "is the name of the base or of a route" in told
        one, two = await ask(made, "one"), await ask(made, "org/two@v1")
        assert one.headers["x-topwork-version"] != two.headers["x-topwork-version"]
        assert "x-topwork-version" not in (await ask(made, BASE)).headers
        assert [request.adapter for request in made.engine.requests] == ["v1", "v2", None]
        assert (await made.client.post(UNLOAD, json={"lora_name": "one", "lora_int_id": 5})).status_code == 200
        check(await ask(made, "one"), 404, "model", "model_not_found")
        assert [version.name for version in made.registry.versions()] == ["org/two@v1"]

    tried(base, work, adapters)


def test_what_runs_goes_on_with_its_version_when_the_name_is_pointed_elsewhere(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        await load(made, "it", "one")
        made.engine.least = 2
        made.engine.gate.clear()
        first = asyncio.ensure_future(ask(made, "it", n=2))
        await made.until(lambda: len(made.engine.running) == 2)
        made.engine.least = 3
        made.engine.gate.set()
        await load(made, "it", "two", load_inplace=True)
        assert [version.uses for version in made.registry.versions()] == [2, 0]
        second = asyncio.ensure_future(ask(made, "it"))
        await made.until(lambda: len(made.engine.requests) == 3)
        made.engine.least = 0
        answers = [(await one).headers["x-topwork-version"] for one in (first, second)]
        assert len(set(answers)) == 2
        assert [request.adapter for request in made.engine.requests] == ["v1", "v1", "v2"]
        await made.until(lambda: len(made.registry.versions()) == 1)

    tried(base, work, adapters)


def test_an_unloaded_adapter_is_gone_at_once_and_its_weights_with_its_last_answer(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        await load(made, "it", "one")
        made.engine.least = 2
        running = asyncio.ensure_future(ask(made, "it"))
        await made.until(lambda: made.engine.running)
        assert (await made.client.post(UNLOAD, json={"lora_name": "it"})).status_code == 200
        check(await ask(made, "it"), 404, "model", "model_not_found")
        assert [version.uses for version in made.registry.versions()] == [1]
        made.engine.least = 0
        assert (await running).status_code == 200
        await made.until(lambda: not made.registry.versions())

    tried(base, work, adapters)


def test_one_that_left_memory_comes_back_when_it_is_asked_for(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        made.registry.capacity = Capacity(resident=1)
        await load(made, "one", "one")
        await load(made, "two", "two")
        versions = {}
        for model in ("one", "two", "one", "two"):
            response = await ask(made, model)
            assert response.status_code == 200
            versions.setdefault(model, set()).add(response.headers["x-topwork-version"])
            assert len(made.registry.versions()) == 1
        assert all(len(found) == 1 for found in versions.values())
        made.engine.least = 2
        running = asyncio.ensure_future(ask(made, "one"))
        await made.until(lambda: made.engine.running)
        check(await ask(made, "two"), 503, "model", "no_room")
        made.engine.least = 0
        await running
        assert (await ask(made, "two")).status_code == 200

    tried(base, work, adapters)


def test_who_waits_for_one_that_left_memory_waits_for_one_reading(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        made.registry.capacity = Capacity(resident=1)
        await load(made, "one", "one")
        await load(made, "two", "two")
        again, read = made.registry.prepare_again, []
        made.registry.prepare_again = lambda absent: read.append(absent.name) or again(absent)
        answers = await asyncio.gather(*(ask(made, "one") for _ in range(5)))
        assert [answer.status_code for answer in answers] == [200] * 5
        assert read == ["one"]

    tried(base, work, adapters)


def test_what_comes_and_goes_in_one_moment_is_listed_as_it_is(base: Base, adapters: Path) -> None:
    async def work(made: Scripted) -> None:
        await load(made, "it", "one")
        waiting = made.backend.worker._commands
        made.engine.gate.clear()
        running = asyncio.ensure_future(ask(made, BASE))
        await made.until(lambda: made.engine.running and waiting.empty())
        asked = []
        for number, path in enumerate((LOAD, UNLOAD), 1):
            fields = {"lora_path": "two", "load_inplace": True} if path == LOAD else {}
            asked.append(asyncio.ensure_future(made.client.post(path, json={"lora_name": "it", **fields})))
            await made.until(lambda number=number: waiting.qsize() == number)
        made.engine.gate.set()
        assert [(await each).status_code for each in (*asked, running)] == [200] * 3
        cards = (await made.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == [BASE, *made.registry.names()] == [BASE]

    tried(base, work, adapters)


def test_one_whose_folder_holds_another_by_now_is_not_answered_by_it(
    base: Base, adapters: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapters / "one", tmp_path / "it")
    adapter_folder(base, tmp_path / "other", 3)

    async def work(made: Scripted) -> None:
        made.registry.capacity = Capacity(resident=1)
        await load(made, "it", "it")
        await load(made, "other", "other")
        shutil.rmtree(tmp_path / "it")
        adapter_folder(base, tmp_path / "it", 4)
        check(await ask(made, "it"), 500, "model", "adapter_lost")
        await load(made, "it", "it", load_inplace=True)
        assert (await ask(made, "it")).status_code == 200

    tried(base, work, tmp_path)


def test_an_adapter_is_put_to_its_own_chat_template(base: Base, adapters: Path) -> None:
    own = ChatTemplate(base.tokenizer, "{% for m in messages %}OWN {{ m['content'] }}{% endfor %}")

    async def work(made: Scripted) -> None:
        made.backend.templates = lambda folder: own if folder.name == "two" else None
        await load(made, "one", "one")
        await load(made, "two", "two")
        for model in ("one", "two"):
            body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
            assert (await made.client.post("/v1/chat/completions", json=body)).status_code == 200
        texts = [base.tokenizer.decode(request.prompt) for request in made.engine.requests]
        assert ["OWN Hi" in text for text in texts] == [False, True]

    tried(base, work, adapters)


def test_what_is_loaded_is_told_to_who_remembers_it(base: Base, adapters: Path) -> None:
    from topwork.serving.service import Kept

    told: list[Any] = []

    async def work(made: Scripted) -> None:
        made.service.kept = Kept(
            lambda card, folder: told.append((card.id, card.content, folder)), lambda name: told.append(name)
        )
        await load(made, "one", "one")
        check(await made.client.post(LOAD, json={"lora_name": "x", "lora_path": "nowhere"}), 404)
        await made.client.post(UNLOAD, json={"lora_name": "one"})
        content = told[0][1]
        assert told == [("one", content, (adapters / "one").resolve()), "one"]
        assert content

    tried(base, work, adapters)


def test_an_adapter_of_another_base_is_refused_unless_it_is_forced(base: Base, adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "one", tmp_path / "it")
    other = (tmp_path / "it" / "topwork.json").read_text().replace(base.fingerprint, "sha256:" + "0" * 64)
    (tmp_path / "it" / "topwork.json").write_text(other)

    async def work(made: Scripted) -> None:
        response = await made.client.post(LOAD, json={"lora_name": "it", "lora_path": "it"})
        check(response, 400, "lora_path", "adapter_refused")
        assert made.registry.names() == []
        assert not Adapters(base.module).configs
        made.backend.force = True
        await load(made, "it", "it")

    tried(base, work, tmp_path)
