"""A vLLM behind us (`--engine vllm`), for more than one machine: the same keys, routes and figures before it.

It is started here or runs elsewhere. What it is given was found to be such as it takes (`preflight.py`,
`vllm_base.py`); which adapters it has is in `vllm_adapters.py`; requests are passed on nearly as they are.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Any, TypeVar

from topwork.common.errors import RunError
from topwork.models.config import ModelConfig
from topwork.quantization.config import QuantizationConfig
from topwork.serving.backends.backend import Call, Card, Chunks, Health, Refused, Weighed
from topwork.serving.backends.preflight import allowed_rank
from topwork.serving.backends.vllm_adapters import Use, VllmAdapters
from topwork.serving.backends.vllm_answers import ShownChunks, body_for, shown
from topwork.serving.backends.vllm_base import HandedOver, hand_over
from topwork.serving.backends.vllm_client import VllmClient
from topwork.serving.backends.vllm_config import VllmConfig, vllm_command
from topwork.serving.backends.vllm_process import VllmProcess, free_port

POLL_SECONDS = 1.0
LEAST_RANK = 16
PROBE = "topwork-asks"
Say = Callable[[str], None]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Asked:
    """What is to be served.

    served    what requests call the base; `others` are names of it that no adapter may have
    adapters  those to begin with: public name -> folder
    template  a file with the chat template, where it is not the tokenizer's own
    within    where links in folders must lead that are loaded while it runs
    """

    model: ModelConfig
    quantization: QuantizationConfig
    served: str
    others: Sequence[str] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    template: Path | None = None
    within: Sequence[Path] | None = None


class VllmBackend:
    """One vLLM. `backend.Backend` says what each method does."""

    def __init__(self, asked: Asked, config: VllmConfig, work: Path, say: Say = print, key: str | None = None) -> None:
        """work: a folder of ours alone; key: what a vLLM that runs already asks for."""
        self.asked, self.config, self.work, self.say = asked, config, work, say
        self._key = key if config.url is not None else secrets.token_urlsafe(24)
        self._adapters: VllmAdapters | None = None
        self._client: VllmClient | None = None
        self._process: VllmProcess | None = None
        self._watch: asyncio.Task[None] | None = None
        self._ready, self._told = False, "vLLM has not begun"
        self._created = int(time())

    @property
    def adapters(self) -> VllmAdapters:
        """Those that it has. There are none before `start`."""
        if self._adapters is None:
            raise RunError("the server has not begun")
        return self._adapters

    async def start(self) -> None:
        """Everything is looked at first: RequestError names each adapter that vLLM would refuse. Then it is started, or
        reached, and asked until it is ready."""
        base = await asyncio.to_thread(hand_over, self.asked.model, self.asked.quantization, self.work, self.say)
        reserved = (self.asked.served, *self.asked.others)
        self._adapters = adapters = VllmAdapters(self.asked.served, reserved, base, self.work)
        taken = await asyncio.to_thread(adapters.all_taken, self.asked.adapters, self.say)
        rank = max((adapter.rank for adapter in taken.values()), default=1)
        adapters.most = allowed_rank([rank], self.config.max_lora_rank or LEAST_RANK)
        folders = await asyncio.to_thread(adapters.written, list(taken.values()))
        url = self.config.url or self._launch(base, folders)
        self._client = adapters.client = VllmClient(url, self._key)
        try:
            await self._wait()
            adapters.context_length = await self._greet()
            for internal, folder in folders.items() if self.config.url is not None else ():
                await adapters.tell_of(internal, folder)
        except BaseException:
            await self.stop(0)
            raise
        for name, adapter in taken.items():
            adapters.point(name, adapter)
        self._ready, self._told = True, ""
        self._watch = asyncio.create_task(self._watched())

    async def stop(self, grace_seconds: float) -> None:
        """A vLLM that we started is ended; another goes on, without our adapters."""
        self._ready, self._told = False, "this server has ended"
        if self._watch is not None:
            self._watch.cancel()
        if self._process is not None:
            await self._process.stop(grace_seconds)
        if self._adapters is not None and self._client is not None:
            await self._adapters.close(leave=self._process is None)
            await self._client.close()

    def cards(self) -> Sequence[Card]:
        named = self.adapters.named
        base = Card(self.asked.served, self._created, self.asked.served, None, self.adapters.context_length)
        return [base, *(named[name].card for name in sorted(named))]

    async def weigh(self, call: Call) -> Weighed:
        """Of tokens nobody here knows but vLLM, which is not asked twice: what the body says, and its choices."""
        prompts = call.body.get("prompt")
        several = isinstance(prompts, list) and len(prompts) > 0 and not isinstance(prompts[0], int)
        choices = (len(prompts) if isinstance(prompts, list) and several else 1) * int(call.body.get("n") or 1)
        most = call.body.get("max_completion_tokens") or call.body.get("max_tokens")
        if most is None:
            most = 16 if call.endpoint == "completions" else self.adapters.context_length
        return Weighed(0, choices * int(most), choices)

    async def answer(self, call: Call) -> dict[str, Any]:
        use = self.adapters.use(call)
        try:
            body = body_for(call, use.internal)
            response = await self._asked(use, lambda client: client.post(f"/v1/{call.endpoint}", body, use.hide))
            said = response.json()
        except ValueError as error:
            raise Refused(502, "vLLM said what is no JSON", "server_error", code="engine_lost") from error
        finally:
            use.end()
        return shown(said, call)

    async def stream(self, call: Call) -> Chunks:
        use = self.adapters.use(call)
        try:
            body = body_for(call, use.internal) | {"stream": True, "stream_options": {"include_usage": True}}
            events = await self._asked(use, lambda client: client.events(f"/v1/{call.endpoint}", body, use.hide))
        except BaseException:
            use.end()
            raise
        return ShownChunks(events, call, use.end)

    async def load(
        self, name: str, folder: Path, replace: bool = False, pinned: bool = False, content: str | None = None  # noqa: ARG002
    ) -> Card:  # fmt: skip
        """`pinned` says nothing here: vLLM keeps what fits, and reads the others again."""
        return await self.adapters.load(name, folder, replace, self.asked.within, content)

    async def unload(self, name: str) -> None:
        self.adapters.unload(name)

    def health(self) -> Health:
        alive = self._process is None or self._process.runs
        return Health(alive, self._ready and alive, self._told if alive else "vLLM has ended")

    async def metrics(self) -> str:
        """vLLM's own, with `engine_` before their names: `vllm:…` are the app's, of what clients see."""
        if self._client is None:
            return ""
        try:
            text = (await self._client.get("/metrics")).text
        except Refused:
            return ""
        own = [line for line in text.splitlines() if line.startswith(("vllm:", "# HELP vllm:", "# TYPE vllm:"))]
        return "".join(f"{line.replace('vllm:', 'engine_vllm:', 1)}\n" for line in own)

    async def _asked(self, use: Use, ask: Callable[[VllmClient], Awaitable[Answer]]) -> Answer:
        """Once more where it has forgotten the adapter, as one does that was started anew."""
        assert self._client is not None
        try:
            return await ask(self._client)
        except Refused as refused:
            if refused.code != "model_not_found" or not await self.adapters.tell_again(use.internal):
                raise
            return await ask(self._client)

    def _launch(self, base: HandedOver, adapters: Mapping[str, Path]) -> str:
        port, more = free_port(), [*base.options]
        if self.asked.template is not None:
            more += ["--chat-template", str(self.asked.template)]
        if self.asked.model.trust_remote_code:
            more.append("--trust-remote-code")
        rank = self.adapters.most
        command = vllm_command(self.config, base.model, self.asked.served, port, rank, adapters, more)
        env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": str(self._key), "VLLM_NO_USAGE_STATS": "1"}
        self._process = VllmProcess(command, env, self.work / "vllm.log")
        self.say(f"starting vLLM; its log: {self._process.log}")
        return f"http://127.0.0.1:{port}"

    async def _wait(self) -> None:
        assert self._client is not None
        began = monotonic()
        while not await self._client.healthy():
            if self._process is not None and not self._process.runs:
                raise RunError(self._process.ended())
            if monotonic() - began > self.config.start_seconds:
                place = self.config.url or "vLLM, which was started here,"
                raise RunError(f"{place} is not ready after {self.config.start_seconds:.0f} s (vllm.start_seconds)")
            await asyncio.sleep(min(POLL_SECONDS, 0.1 + (monotonic() - began) / 10))

    async def _greet(self) -> int:
        """The context's length of the base that it serves. Raises RunError where that is none under our name, or where
        it changes no adapters while it runs."""
        assert self._client is not None
        served = self.asked.served
        try:
            data = (await self._client.get("/v1/models")).json()["data"]
            length = int({card["id"]: card for card in data if not card.get("parent")}[served]["max_model_len"])
        except Refused as refused:
            raise RunError(f"vLLM does not tell its models: {refused.message}") from refused
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"vLLM serves no base called {served!r}; start it with --served-model-name {served}, or say "
                "served_model_name here"
            ) from error
        try:
            await self._client.post("/v1/unload_lora_adapter", {"lora_name": PROBE})
        except Refused as refused:
            if PROBE not in refused.message:
                raise RunError(
                    "vLLM loads no adapters while it runs; start it with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
                ) from refused
        return length

    async def _watched(self) -> None:
        """Whether it is still there, again and again."""
        assert self._client is not None
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self._ready = await self._client.healthy()
            self._told = "" if self._ready else "vLLM does not answer"
