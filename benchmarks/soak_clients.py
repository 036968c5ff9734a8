"""Clients that check every answer, and somebody who loads, swaps and unloads adapters under them."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from math import inf

from server_process import ask, connected, streamed
from soak_adapters import PROMPTS, TOKENS, Signed

LEAVES = 0.03
"""Part of the requests whose client goes away in the middle."""
KEEPS_LOADED = 0.6
"""Part of the changes to a loaded name that put another adapter in its place; the others unload it."""
ASKED_AGAIN, SECONDS_BETWEEN = 40, 0.05
"""How often, and how soon, a client asks again that was told there is no room for its adapter."""


class Names:
    """Which adapter a name may stand for, and when: from the moment that somebody begins to have it so until somebody
    has had it otherwise. None is that nothing is loaded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[str, list[tuple[str | None, float, float]]] = {}

    def begins(self, name: str, content: str | None) -> None:
        """From here on a request may meet this one."""
        with self._lock:
            self._spans.setdefault(name, [(None, -inf, inf)]).append((content, time.monotonic(), inf))

    def done(self, name: str) -> None:
        """From here on no request meets an older one."""
        with self._lock:
            now, spans = time.monotonic(), self._spans[name]
            self._spans[name] = [(c, since, min(until, now)) for c, since, until in spans[:-1]] + spans[-1:]

    def between(self, name: str, begun: float, ended: float) -> set[str | None]:
        """What a request may have met that was admitted meanwhile."""
        with self._lock:
            return {content for content, since, until in self._spans[name] if since <= ended and until >= begun}

    def loaded(self, name: str) -> bool:
        """Whether it is to be there."""
        with self._lock:
            return self._spans[name][-1][0] is not None

    def all(self) -> list[str]:
        """Whatever was loaded once."""
        with self._lock:
            return list(self._spans)


@dataclass
class Told:
    """What came of it: counts of requests by how they ended, of changes by what they were, and what was wrong."""

    requests: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Soak:
    """A server's address, the adapters below its folder (by the head of their content), and who is told of it."""

    def __init__(
        self, address: str, signed: Sequence[Signed], base: str, base_answers: Sequence[Sequence[int]]
    ) -> None:
        self.address, self.signed, self.base = address, list(signed), base
        self.answers: Mapping[str | None, Sequence[Sequence[int]]] = {
            **{one.content: one.answers for one in signed}, None: base_answers,
        }  # fmt: skip
        self.names, self.told = Names(), Told()
        self.room_may_lack = False
        """Whether fewer adapters stay in memory than clients may use at once, so that a 503 may ask one to wait."""
        self._lock, self._left = threading.Lock(), 0

    def load(self, name: str, signed: Signed, connection: HTTPConnection, in_place: bool = False) -> None:
        """A name stands for this adapter."""
        self.names.begins(name, signed.content)
        body = {"lora_name": name, "lora_path": signed.folder.name, "load_inplace": in_place}
        self._changed("swapped" if in_place else "loaded", *ask(connection, "/v1/load_lora_adapter", body))
        self.names.done(name)

    def unload(self, name: str, connection: HTTPConnection) -> None:
        """And for nothing."""
        self.names.begins(name, None)
        self._changed("unloaded", *ask(connection, "/v1/unload_lora_adapter", {"lora_name": name}))
        self.names.done(name)

    def run(self, requests: int, clients: int, changing: Sequence[str], seed: int = 0) -> None:
        """So many requests, while the names of `changing` are loaded, swapped and unloaded without a pause."""
        self._left = requests
        over = threading.Event()
        changer = threading.Thread(target=self._change, args=(changing, over, random.Random(seed)))
        changer.start()
        try:
            with ThreadPoolExecutor(clients) as pool:
                for done in [
                    pool.submit(self._client, random.Random((seed, number).__hash__())) for number in range(clients)
                ]:
                    done.result()
        finally:
            over.set()
            changer.join()

    def check_all(self, names: Sequence[str]) -> None:
        """Each of these is asked once; and the list has them all."""
        connection, chance = connected(self.address), random.Random(0)
        for name in names:
            self._request(connection, name, chance, leave=False)
        _, _, listed = ask(connection, "/v1/models")
        missing = set(names) - {card["id"] for card in listed["data"]}
        if missing:
            self.told.wrong.append(f"not listed: {sorted(missing)[:5]}")
        connection.close()

    def _change(self, names: Sequence[str], over: threading.Event, chance: random.Random) -> None:
        connection = connected(self.address)
        while not over.is_set():
            name, other = chance.choice(names), chance.choice(self.signed)
            if not self.names.loaded(name):
                self.load(name, other, connection)
            elif chance.random() < KEEPS_LOADED:
                self.load(name, other, connection, in_place=True)
            else:
                self.unload(name, connection)
        connection.close()

    def _client(self, chance: random.Random) -> None:
        connection, names = connected(self.address), [*self.names.all(), self.base]
        while self._another():
            leave = chance.random() < LEAVES
            try:
                self._request(connection, chance.choice(names), chance, leave)
            except (OSError, HTTPException, ValueError) as error:
                self._is_wrong(f"lost: {type(error).__name__}: {error}")
                leave = True
            if leave:
                connection.close()
                connection = connected(self.address)
        connection.close()

    def _request(self, connection: HTTPConnection, name: str, chance: random.Random, leave: bool) -> None:
        number, tokens = chance.randrange(len(PROMPTS)), chance.randint(1, TOKENS)
        body = {
            "model": name, "prompt": PROMPTS[number], "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        if leave:
            self._leave(connection, body)
            return
        streams = chance.random() < 0.5
        for _ in range(ASKED_AGAIN if self.room_may_lack and name != self.base else 1):
            begun = time.monotonic()
            if streams:
                found = streamed(connection, body)
                status, headers, said = found.status, found.headers, found.tokens
                whole = found.done and found.error is None
            else:
                status, headers, told = ask(connection, "/v1/completions", {**body, "return_token_ids": True})
                said, whole = (told["choices"][0]["token_ids"], True) if status == 200 else ([], True)
            if status != 503:
                break
            time.sleep(SECONDS_BETWEEN)  # all that fit are in use: asked again, as OpenAI's clients do
        self._check(name, number, tokens, begun, status, headers.get("x-topwork-version"), list(said), whole)

    def _check(
        self, name: str, number: int, tokens: int, begun: float, status: int, version: str | None, said: list[int],
        whole: bool,
    ) -> None:  # fmt: skip
        known = {None} if name == self.base else self.names.between(name, begun, time.monotonic())
        if status == 404 and name != self.base and None in known:
            self._count("refused while unloaded")
        elif status != 200 or not whole:
            self._is_wrong(f"{name}: status {status}, whole: {whole}")
        elif version not in known or (version is None and name != self.base):
            self._is_wrong(f"{name}: answered by {version}, where it stood for {known}")
        elif said != list(self.answers[version][number][:tokens]):
            self._is_wrong(f"{name}: {version} said {said} to prompt {number}, not {self.answers[version][number]}")
        else:
            self._count("answered")

    def _leave(self, connection: HTTPConnection, body: Mapping[str, object]) -> None:
        """Asks for more than there will be time for, and goes."""
        sent = json.dumps({**body, "max_tokens": 1000, "stream": True})
        connection.request("POST", "/v1/completions", sent, {"content-type": "application/json"})
        connection.getresponse().read1()
        self._count("gone in the middle")

    def _another(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def _changed(self, what: str, status: int, _: object, told: object) -> None:
        if status != 200:
            self._is_wrong(f"not {what}: {status} {told}")
        with self._lock:
            self.told.changes[what] += 1

    def _count(self, what: str) -> None:
        with self._lock:
            self.told.requests[what] += 1

    def _is_wrong(self, what: str) -> None:
        with self._lock:
            self.told.wrong.append(what)
